"""Entries of the schedule, as RedBeat keeps them in Redis, and what the check of a release refuses of them."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import NoneType
from typing import Any

from celery import Celery
from celery.beat import ScheduleEntry
from celery.schedules import BaseSchedule, crontab
from celery.schedules import schedule as celery_schedule
from celery.utils.time import maybe_iso8601
from kombu.compression import compress
from kombu.message import Message
from kombu.serialization import dumps as serialize
from kombu.serialization import prepare_accept_content
from kombu.utils.json import JSONEncoder, object_hook
from redbeat.decoder import RedBeatJSONDecoder, RedBeatJSONEncoder
from redbeat.schedulers import RedBeatSchedulerEntry, ensure_conf, get_redis

from hothouse_celery import messages

# What stands in Redis for a schedule that RedBeat cannot write down: with `nowfun`, of the sun, an rrule, a class of
# the application's own. Every beat has the object itself.
OF_THE_APPLICATION = {"__type__": "hothouse: of the application"}
# Options of a task that are a number of seconds, and given as a timedelta where they stand for a time from now.
SECONDS = ("countdown", "expires")


class Encoder(JSONEncoder):
    """Schedules as RedBeat writes them; everything else as a message of Celery has it."""

    def default(self, value: Any) -> Any:
        if isinstance(value, BaseSchedule):
            return RedBeatJSONEncoder().default(value)
        return super().default(value)


class Decoder(RedBeatJSONDecoder):
    def dict_to_object(self, value: dict[str, Any]) -> Any:
        return object_hook(value) if "__value__" in value else super().dict_to_object(value)


def encode(value: Any) -> str:
    return json.dumps(value, cls=Encoder)


def decode(text: str) -> Any:
    return json.loads(text, cls=Decoder)


def keeps(schedule: BaseSchedule) -> bool:
    """Whether RedBeat reads a schedule back as it was. Of the zone of an rrule it keeps today's offset alone."""
    if type(schedule) not in (crontab, celery_schedule) or schedule.nowfun:
        return False
    try:
        return bool(decode(encode(schedule)) == schedule)
    except (TypeError, ValueError):  # hours as a set
        return False


def given_schedule(app: Celery, name: str) -> Any:
    """The schedule of an entry of the application; KeyError if it has no such entry."""
    entry = app.conf.beat_schedule[name]
    return entry.schedule if isinstance(entry, ScheduleEntry) else entry["schedule"]


class Entry(RedBeatSchedulerEntry):  # type: ignore[misc]  # it has no types
    """RedBeat notes times with the wall clock of their zone, which says the same twice when summer time ends."""

    def __init__(self, name: Any = None, schedule: Any = None, options: Any = None, **fields: Any) -> None:
        if schedule == OF_THE_APPLICATION:
            schedule = given_schedule(fields["app"], name)
        options = {
            key: value.total_seconds() if key in SECONDS and isinstance(value, timedelta) else value
            for key, value in (options or {}).items()
        }
        super().__init__(name=name, schedule=schedule, options=options, **fields)

    @staticmethod
    def decode_definition(definition: str) -> Any:
        return decode(definition)

    @classmethod
    def from_key(cls, key: str, app: Any = None) -> Any:
        entry = super().from_key(key, app=app)
        if entry.last_run_at:
            # Celery before 5.7 takes the hours of a crontab for those of this zone.
            entry.last_run_at = instant(entry, entry.last_run_at).astimezone(entry.schedule.tz)
        return entry

    @property
    def due_at(self) -> datetime | None:
        if self.last_run_at is None:
            return instant(self, self.app.now())
        delta = self.schedule.remaining_estimate(self.last_run_at)
        # The present after the rest until then: RedBeat cuts the seconds off, which would make it one second early.
        return None if delta is None else instant(self, self.app.now()) + max(delta, timedelta(0))

    @property
    def definition(self) -> dict[str, Any]:
        fields = ("name", "task", "args", "kwargs", "options", "enabled")
        own = self.name in (self.app.conf.beat_schedule or {}) and not keeps(self.schedule)
        schedule = OF_THE_APPLICATION if own else self.schedule
        return {**{name: getattr(self, name) for name in fields}, "schedule": schedule}

    def save(self) -> Any:
        with get_redis(self.app).pipeline() as pipe:
            pipe.hset(self.key, "definition", encode(self.definition))
            pipe.hsetnx(self.key, "meta", meta(self))
            pipe.zadd(self.app.redbeat_conf.schedule_key, {self.key: self.score})
            pipe.execute()
        return self

    def _next_instance(self, last_run_at: Any = None, only_update_last_run_at: bool = False) -> Any:
        entry = ScheduleEntry._next_instance(self, last_run_at=last_run_at)
        if only_update_last_run_at:
            entry.total_run_count = self.total_run_count
        with get_redis(self.app).pipeline() as pipe:
            pipe.hset(self.key, "meta", meta(entry, total_run_count=entry.total_run_count))
            pipe.zadd(self.app.redbeat_conf.schedule_key, {entry.key: entry.score})
            pipe.execute()
        return entry

    __next__ = next = _next_instance


def instant(entry: Any, moment: datetime) -> datetime:
    """A time by the clock of the entry's schedule, in UTC."""
    return entry.schedule.maybe_make_aware(moment).astimezone(UTC)  # type: ignore[no-any-return]


def meta(entry: Any, **fields: Any) -> str:
    last = entry.last_run_at and instant(entry, entry.last_run_at)
    return json.dumps({"last_run_at": last, **fields}, cls=RedBeatJSONEncoder)


def refusals(app: Celery) -> dict[Any, str]:
    """The entries of the application's schedule that cannot be stored, or not be sent when they are due, and why."""
    ensure_conf(app)
    found: dict[Any, str] = {}
    schedule = app.conf.beat_schedule or {}
    if not isinstance(schedule, Mapping):
        return {"beat_schedule": f"it has to be a mapping of names to entries, and is {schedule!r}"}
    for name, given in schedule.items():
        try:
            reason = refusal(app, name, given)
        except (
            Exception,
            SystemExit,
        ) as error:  # whatever a type or a schedule of the application's own raises
            reason = f"{type(error).__name__}: {error}"
        if reason:
            found[name] = reason
    return found


def refusal(app: Celery, name: Any, given: Any) -> str | None:
    if not messages.text(name) or name.startswith((":", "slot:")) or name in ("", "schedulers"):
        return "this name cannot be a key of RedBeat; give it another one"
    fields = dict(given) if not isinstance(given, ScheduleEntry) else dict(vars(given))
    if unknown := fields.keys() - inspect.signature(RedBeatSchedulerEntry).parameters.keys() - {
        "app", "relative", "last_run_at", "total_run_count"}:  # fmt: skip
        return f"it has fields that no schedule knows: {', '.join(sorted(map(str, unknown)))}"
    if not isinstance(fields.get("schedule"), BaseSchedule | timedelta | int | float):
        return f"its schedule is {fields.get('schedule')!r}: give seconds, a timedelta or a schedule such as crontab()"
    entry = Entry(**{**fields, "name": name, "app": app})
    found = decode(encode(entry.definition))
    meta(entry)
    pause = entry.is_due()[1]
    # No pause is what an rrule says that has ended.
    if not isinstance(pause, int | float | NoneType) or not math.isfinite((pause or 0) + entry.score):
        return f"its schedule cannot tell when it is due next, but says {pause!r}"
    task = app.tasks.get(entry.task)
    if task is None:
        return f"it sends the task {entry.task!r}, which this release does not have"
    return message_refusal(app, task, found["args"] or (), found["kwargs"] or {}, found["options"])


def message_refusal(
    app: Celery, task: Any, arguments: Any, keywords: Any, options: dict[str, Any]
) -> str | None:
    """Why a message with these arguments and options could not be made, or be run by no worker."""
    if task.typing:
        task.__header__(*arguments, **keywords)
    known = inspect.signature(app.amqp.create_task_message).parameters.keys() - {"task_id"}
    if taken := options.keys() & {"name", "args", "kwargs", "producer", "connection", "self"}:
        return f"its options have {min(taken)!r}, which an entry cannot set"
    made = app.amqp.create_task_message(
        options.get("task_id", "an id"), task.name, arguments, keywords,
        **{key: options[key] for key in options.keys() & known},
    )  # fmt: skip
    kind, encoding, body = serialize(made.body, options.get("serializer") or task.serializer)
    if compression := options.get("compression"):
        compress(body, compression)
    headers = {**made.headers, **(options.get("headers") or {})}
    for moment in ("eta", "expires"):
        maybe_iso8601(headers.get(moment))
    message = Message(
        body, content_type=kind, content_encoding=encoding, headers=headers,
        accept=prepare_accept_content(app.conf.accept_content),
    )  # fmt: skip
    try:
        messages.check(app, message)
    except messages.Unfit as reason:
        return f"no worker can run its message: {reason}"
    return None
