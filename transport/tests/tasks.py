"""The `-A` of the tests' real workers: tasks that write down that they ran.

TEST_BROKER_URL    the broker; its scheme chooses the transport
TEST_NOTEBOOK_URL  where the tasks write what they did
TEST_OPTIONS       JSON, on top of broker_transport_options
TEST_WITHOUT       modules that are not installed, with commas between them
TEST_CLOCK         seconds by which this process' clock is wrong
"""

import json
import os
import signal
import sys
import time

for module in filter(None, os.environ.get("TEST_WITHOUT", "").split(",")):
    sys.modules[module] = None  # as if it were not installed


import redis
from celery import Celery

import hothouse_transport

if wrong := float(os.environ.get("TEST_CLOCK", "0")):
    right = time.time
    time.time = lambda: right() + wrong

assert hothouse_transport.install() is None

app = Celery("tasks", broker=os.environ.get("TEST_BROKER_URL"))
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue="one",
    worker_prefetch_multiplier=1,
    broker_channel_error_retry=True,
    broker_connection_max_retries=None,
    broker_connection_retry_on_startup=True,
    broker_transport_options={
        "global_keyprefix": "q:",
        "visibility_timeout": 3,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        **json.loads(os.environ.get("TEST_OPTIONS", "{}")),
    },
    task_publish_retry_policy={
        "max_retries": 100,
        "interval_start": 0,
        "interval_step": 0.2,
        "interval_max": 0.5,
    },
)
notes = redis.Redis.from_url(os.environ.get("TEST_NOTEBOOK_URL", "redis://"), decode_responses=True)


@app.task
def note(number: int, seconds: float = 0) -> None:
    """Write the number down, before and after so many seconds."""
    if seconds:
        notes.rpush("started", number)
        time.sleep(seconds)
    notes.hincrby("done", str(number), 1)


@app.task
def kill_worker() -> None:
    """Take the whole worker along, as a host that dies would."""
    notes.incr("killed")
    os.kill(
        os.getppid() if os.environ.get("TEST_POOL", "prefork") == "prefork" else os.getpid(), signal.SIGKILL
    )
    time.sleep(60)
