"""The Celery application. It sets no broker: the deployment does, on top of these settings."""

from __future__ import annotations

from celery import Celery

from campaigns import settings

app = Celery("campaigns", include=["campaigns.tasks"])
app.conf.update(
    task_default_queue="default",
    task_routes={"campaigns.tasks.send_batch": {"queue": "email_senders"}},
    beat_schedule={
        "check-scheduled-campaigns": {
            "task": "campaigns.tasks.check_scheduled_campaigns",
            "schedule": float(settings.check_seconds()),
            # A check that was not run before the next one is due has nothing to add to it.
            "options": {"expires": float(settings.check_seconds())},
        }
    },
)
