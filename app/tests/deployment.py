"""What a deployment adds to the app: the broker. Also the `-A` of the tests' real worker."""

import os

from campaigns.celery import app

app.conf.update(
    broker_url=os.environ.get("TEST_BROKER_URL"),
    broker_transport_options={"global_keyprefix": "q:"},
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
)
