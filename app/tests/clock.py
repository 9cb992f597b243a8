"""Runs the scheduler of the deployment by a clock of its own, minute by minute, and prints what it sends and when.

usage: clock.py BEGIN HOURS ZONE: BEGIN in UTC, ISO 8601; HOURS how long; ZONE the application's, or `none`
"""

import json
import sys
from datetime import UTC, datetime, timedelta

import trials
from celery.schedules import crontab

clock = datetime.fromisoformat(sys.argv[1]).replace(tzinfo=UTC)
end = clock + timedelta(hours=int(sys.argv[2]))
if sys.argv[3] != "none":
    trials.app.conf.timezone = sys.argv[3]

import hothouse_celery  # noqa: E402  # it configures the application as it is now
from hothouse_celery.beat import Scheduler  # noqa: E402

app = hothouse_celery.app
type(app).now = lambda self: clock.astimezone(self.timezone)


def entry(name, schedule):
    return {"task": "trials.say", "schedule": schedule, "args": (name,)}


def ahead():
    return clock + timedelta(hours=2)


app.conf.beat_schedule = {
    name: entry(name, schedule)
    for name, schedule in {
        "noon": crontab(hour=12, minute=0),
        "night": crontab(hour=2, minute=30),
        "tens": crontab(minute="*/10"),
        "interval": timedelta(minutes=10),
        "nowfun": crontab(hour=12, minute=0, nowfun=ahead),
    }.items()
}
sent = []
scheduler = Scheduler(app=app, lazy=True)
type(app.tasks["trials.say"]).apply_async = lambda self, args, *_, **__: sent.append(
    (args[0], clock.isoformat())
)
scheduler.setup_schedule()
while clock < end:
    clock += timedelta(minutes=1)
    scheduler.tick()
json.dump(sent, sys.stdout)
