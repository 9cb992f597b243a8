"""An application whose schedule has what RedBeat alone cannot keep, and with $BAD what no beat can send."""

import os
import random
import uuid
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from celery import Celery
from celery.schedules import crontab, schedule
from redbeat.schedules import rrule

app = Celery("schedules")


@app.task(name="take")
def take(value: Any, *, key: Any = None) -> None:
    pass


@app.task(name="take.pickle", serializer="pickle")
def take_pickle(value: Any) -> None:
    pass


class Often(crontab):
    """Due all the time, which no crontab is."""

    def is_due(self, last_run_at: datetime) -> Any:
        return schedule(1.0, app=self.app).is_due(last_run_at)

    def remaining_estimate(self, last_run_at: datetime, **_: Any) -> timedelta:
        return schedule(1.0, app=self.app).remaining_estimate(last_run_at)


class Failing(schedule):
    """Right when it is looked at for the first time."""

    failures: Any = iter([])

    def is_due(self, last_run_at: datetime) -> Any:
        return next(self.failures)(super().is_due(last_run_at))


class OnceRight(Failing):
    failures = iter([lambda right: right, *[lambda _: exit(3)] * 3, *[lambda _: 1 / 0] * 999])


class Odd(Failing):
    def __init__(self, answer: Any) -> None:
        super().__init__(1.0)
        self.failures = iter([lambda _: answer() if callable(answer) else answer] * 999)


def now() -> datetime:
    return datetime.now(UTC)


draw = random.Random(int(os.environ.get("SEED", "1")))
LEAVES = [
    lambda: draw.choice([None, True, "", 'schlüssel/α: "x" <b>&%20\n', "__type__", 2**70, -0.5]),
    lambda: uuid.UUID(int=draw.getrandbits(128)),
    lambda: Decimal(draw.randrange(10**6)) / 8,
    lambda: date(2026, draw.randint(1, 12), 1),
    lambda: time(draw.randrange(24), 30),
    lambda: datetime(2026, 10, 25, 2, draw.randrange(60), 1, 5, tzinfo=draw.choice([None, UTC])),
    lambda: bytes(draw.randrange(256) for _ in range(5)),
]


def value(depth: int = 3) -> Any:
    kind = draw.randrange(4) if depth else 3
    if kind == 0:
        return [value(depth - 1) for _ in range(draw.randrange(4))]
    if kind == 1:
        return {draw.choice("abcü") + str(number): value(depth - 1) for number in range(draw.randrange(4))}
    return draw.choice(LEAVES)()


def entry(when: Any, *arguments: Any, task: str = "take", **fields: Any) -> dict[str, Any]:
    return {"task": task, "schedule": when, "args": arguments, **fields}


GOOD: dict[str, dict[str, Any]] = {
    f"value {number}": entry(1.0, value(), kwargs={"key": value()}) for number in range(40)
} | {
    "expires": entry(1.0, 1, options={"expires": timedelta(seconds=30), "countdown": timedelta(0)}),
    "options": entry(1.0, 1, options={"queue": "trials", "priority": 3, "headers": {"a": uuid.UUID(int=1)}}),
    "timedelta": entry(timedelta(seconds=1), 1),
    "relative": entry(schedule(timedelta(seconds=1), relative=True), 1),
    'schlüssel/α: "x" <b>&%20': entry(1, 1),
    "nowfun": entry(schedule(1.0, nowfun=now), 1),
    "own class": entry(Often(), 1),
    "rrule": entry(rrule("SECONDLY"), 1),
    "task_id": entry(1.0, 1, options={"task_id": "always-this"}),
    "hours as a set": entry(crontab(minute=set(range(60))), 1),
}
# Good, and never sent.
NEVER: dict[str, dict[str, Any]] = {
    "ended": entry(rrule("DAILY", dtstart=datetime(2020, 1, 1), count=1), 1),
    "fails later": entry(OnceRight(1.0), 1),
}
BAD: dict[Any, Any] = {
    "a set": entry(1.0, {1, 2}),
    "an object": entry(1.0, object()),
    "a timedelta": entry(1.0, timedelta(1)),
    "eta": entry(1.0, 1, options={"eta": object()}),
    "no such task": entry(1.0, task="missing"),
    "no task": {"schedule": 1.0},
    "too few arguments": entry(1.0),
    "too many": entry(1.0, 1, 2, 3),
    "no such keyword": entry(1.0, 1, kwargs={"keys": 1}),
    "no schedule": {"task": "take", "args": (1,)},
    "a text": entry("every minute", 1),
    "a misspelled field": entry(1.0, 1, argss=(1,)),
    "serializer": entry(1.0, 1, options={"serializer": "none"}),
    "compression": entry(1.0, 1, options={"compression": "none"}),
    "headers": entry(1.0, 1, options={"headers": [1]}),
    "a header": entry(1.0, 1, options={"headers": {"timelimit": 30}}),
    "eta as a text": entry(1.0, 1, options={"eta": "soon"}),
    "expires as a text": entry(1.0, 1, options={"expires": "soon"}),
    "time limit": entry(1.0, 1, options={"time_limit": "5"}),
    "link": entry(1.0, 1, options={"link": 5, "chord": 5}),
    "id": entry(1.0, 1, options={"task_id": 5}),
    "producer": entry(1.0, 1, options={"producer": None}),
    "pickle": entry(1.0, 1, task="take.pickle"),
    "is_due raises": entry(Odd(lambda: 1 / 0), 1),
    "is_due ends": entry(Odd(exit), 1),
    "is_due is none": entry(Odd(None), 1),
    "is_due is odd": entry(Odd("no"), 1),
    "never a number": entry(Odd((True, float("nan"))), 1),
    "last run": entry(1.0, 1, last_run_at="yesterday"),
    "\ud800": entry(1.0, 1),
    ":schedule": entry(1.0, 1),
    "slot:1": entry(1.0, 1),
    "schedulers": entry(1.0, 1),
    "": entry(1.0, 1),
    7: entry(1.0, 1),
    "loop": entry(1.0, (loop := [])),
}
loop.append(loop)
app.conf.beat_schedule = GOOD | NEVER | (BAD if os.environ.get("BAD") else {})
