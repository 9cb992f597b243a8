"""Whatever a queue holds, the worker stays: what it cannot run becomes a dead letter, an unknown task is set aside.

Celery ends the worker for some messages, and acknowledges others, which are then gone. So each message is looked at
before Celery handles it, and whatever goes wrong afterwards, before the pool has it, is answered as well.
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import json
import math
import uuid
from collections.abc import Callable
from pickle import PicklingError
from types import NoneType
from typing import Any

import celery.worker.consumer
import celery.worker.request
from celery import Celery, signals
from celery.app.task import Context
from celery.canvas import maybe_signature
from celery.exceptions import NotRegistered, TaskRevokedError
from celery.utils.log import get_logger
from celery.utils.time import timezone
from celery.worker import state
from hothouse_transport import names
from hothouse_transport.messages import completed, identity, is_name
from hothouse_transport.refusals import is_lost
from kombu.asynchronous.timer import to_timestamp
from kombu.serialization import SKIP_DECODE

from hothouse_celery import dead

logger = get_logger(__name__)

# Deeper than anything that is written by hand or by Celery's canvas, and far from where Python's own limits are.
DEEPEST = 200
LONGEST_SECONDS = 1e9
# A message's header of such a name would replace a method of the task's request.
METHODS = frozenset(name for name, value in vars(Context).items() if callable(value) or name.startswith("_"))


class Unfit(Exception):
    """Why no worker can run a message."""


class UnknownTask(Exception):
    """The name of a task that this worker's release does not have."""


def check(app: Celery, message: Any) -> None:
    """Unfit or UnknownTask if the message cannot be run here; whatever a decoder raises if it cannot be read.

    What other languages' clients write as null is changed in place to what it stands for.
    """
    headers = message.headers
    protocol_2 = "task" in headers
    payload: Any = None if protocol_2 else message.payload
    if not protocol_2 and not (isinstance(payload, dict) and "task" in payload):
        raise Unfit("it names no task")
    name = (headers if protocol_2 else payload)["task"]
    if not isinstance(name, str) or name not in app.tasks:
        if is_name(name):
            raise UnknownTask(name)
        raise Unfit(f"its task has no usable name, but {shown(name)}")
    _encoding(message.content_encoding)
    payload = message.payload
    _without_empty(headers)
    if isinstance(payload, dict) and ("args" in payload or not protocol_2):
        _arguments(payload)
        _without_empty(payload)
        fields = {**payload, **headers}
    else:
        if not isinstance(payload, list | tuple) or len(payload) != 3:
            raise Unfit("its body is not a list of arguments, keyword arguments and the rest")
        if None in payload[:2]:
            payload = _without_nulls(message, payload)
        _arguments({"args": payload[0], "kwargs": payload[1]})
        if not isinstance(payload[2], dict | NoneType):
            raise Unfit(f"the third part of its body is no object, but {shown(payload[2])}")
        fields = {**headers, **(payload[2] or {})}
    if too_deep(message, payload):
        raise Unfit(f"it is nested in more than {DEEPEST} levels")
    _fields(app, fields)


def _encoding(name: Any) -> None:
    """Decoders of JSON do not look at it."""
    try:
        if name and name.lower() not in SKIP_DECODE:
            codecs.lookup(name)
    except (LookupError, AttributeError, ValueError):
        raise Unfit(f"its content encoding is not known: {shown(name)}") from None


def _without_empty(fields: dict[str, Any]) -> None:
    """Leave out what some write empty, and Celery would take for a value."""
    for name in ("retries", "eta", "expires"):
        if fields.get(name, 0) in (None, ""):
            del fields[name]


def _arguments(body: dict[str, Any]) -> None:
    for name, empty in (("args", []), ("kwargs", {})):
        if body.get(name, empty) is None:
            body[name] = empty
    args, kwargs = body.get("args", []), body.get("kwargs", {})
    if not isinstance(args, list | tuple):
        raise Unfit(f"its arguments are no list, but {shown(args)}")
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise Unfit(f"its keyword arguments are no object, but {shown(kwargs)}")


def _without_nulls(message: Any, payload: Any) -> Any:
    """The body without null for no arguments; the pool reads it anew."""
    if message.content_type != "application/json":
        raise Unfit("its arguments are null")
    filled = [[] if payload[0] is None else payload[0], {} if payload[1] is None else payload[1], payload[2]]
    message.body, message.content_encoding = json.dumps(filled).encode(), "utf-8"
    message._decoded_cache = filled
    return filled


def too_deep(message: Any, payload: Any) -> bool:
    """Whether Python could fail to copy it to a child."""
    body = message.body
    brackets = DEEPEST
    if message.content_type == "application/json" and isinstance(body, bytes | str):
        kinds: Any = (b"[", b"{") if isinstance(body, bytes) else ("[", "{")
        brackets = sum(map(body.count, kinds))
    return (brackets >= DEEPEST and deeper(payload)) or deeper([message.headers, message.properties])


def deeper(value: Any, levels: int = DEEPEST) -> bool:
    """Whether lists and objects are nested in more than so many levels."""
    level = [value]
    for _ in range(levels + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def shown(value: Any) -> str:
    """A value within a reason."""
    try:
        text = repr(value)
    except RecursionError:
        return "something nested too deep"
    return text if len(text) <= 100 else f"{text[:100]}…"


def text(value: Any) -> bool:
    """Whether it is a text that can be written."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def number(value: Any, longest: float = LONGEST_SECONDS) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and 0 <= value <= longest
    )


def whole(value: Any) -> bool:
    return isinstance(value, int) and number(value)


def time_limits(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(limit is None or number(limit) for limit in value)
    )


def texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(text, value))


def mapping(value: Any) -> bool:
    return isinstance(value, dict)


# What a field has to be, unless it is null or left out.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "eta": (bool, "a time"),
    "expires": (bool, "a time"),
    "shadow": (text, "a text"),
    "root_id": (text, "a text"),
    "parent_id": (text, "a text"),
    "group": (text, "a text"),
    "taskset": (text, "a text"),
    "group_index": (whole, "a whole number"),
    "retries": (whole, "a whole number"),
    "replaced_task_nesting": (whole, "a whole number"),
    "timelimit": (time_limits, "two numbers of seconds or null, the hard and the soft limit"),
    "stamped_headers": (texts, "a list of texts"),
    "stamps": (mapping, "an object"),
    "headers": (mapping, "an object"),
}


def _fields(app: Celery, fields: dict[str, Any]) -> None:
    if not text(fields.get("id")) or not fields["id"]:
        raise Unfit(f"its id is no text, but {shown(fields.get('id'))}")
    if clash := sorted(METHODS & fields.keys()):
        raise Unfit(
            f"it has a header {clash[0]!r}, which is the name of something that Celery keeps in a request"
        )
    for name, (fits, kind) in FIELDS.items():
        value = fields.get(name)
        if value is not None and not fits(value):
            raise Unfit(f"{name} is {shown(value)}, and has to be {kind}")
    for name in ("callbacks", "errbacks", "chain"):
        value = fields.get(name)
        if value is not None and not isinstance(value, list | tuple):
            raise Unfit(f"{name} is {shown(value)}, and has to be a list of signatures")
        for entry in value or ():
            _signature(app, name, entry)
    if fields.get("chord") is not None:
        _signature(app, "chord", fields["chord"])


def _signature(app: Celery, name: str, value: Any) -> None:
    try:
        made = maybe_signature(copy.deepcopy(value), app=app)
        parts = (made["task"], made["args"], made["kwargs"], made["options"])
        fits = is_name(parts[0]) and isinstance(parts[1], list | tuple) and all(map(mapping, parts[2:]))
    except Exception:
        fits = False
    if not fits:
        raise Unfit(f"{name} has {shown(value)}, which is no signature of a task")


class Consumer(celery.worker.consumer.Consumer):
    """Takes any message, and ends for none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        apply = self.pool.apply_async

        def apply_async(*rest: Any, **options: Any) -> Any:
            try:
                return apply(*rest, **options)
            except (
                RecursionError,
                ValueError,
                TypeError,
                LookupError,
                AttributeError,
                PicklingError,
            ) as error:
                request = options["error_callback"].__self__
                self.put_aside(request.message, f"cannot be handed to the pool: {shown(error)}")
                # Its place in the pool is free again.
                raise TaskRevokedError(request.id) from error

        self.pool.apply_async = apply_async

    def add_task_queue(self, queue: Any, *args: Any, **options: Any) -> None:
        """By remote control, as well as cancel_task_queue. What cannot be the name of a queue ends no worker."""
        try:
            super().add_task_queue(queue, *args, **options)
        except Exception as error:
            if is_lost(error, self.connection_errors):
                raise
            logger.error("The queue %r is not consumed: %r", queue, error)
            with contextlib.suppress(TypeError):  # a mapping, which cannot be there
                # Or the next connection would try it again.
                self.app.amqp.queues.consume_from.pop(queue, None)

    def cancel_task_queue(self, queue: Any) -> None:
        try:
            super().cancel_task_queue(queue)
        except Exception as error:
            if is_lost(error, self.connection_errors):
                raise
            logger.error("The queue %r is not given up: %r", queue, error)

    def connect(self) -> Any:
        connection = super().connect()
        if connection.transport_cls.startswith(("redis", "sentinel")):
            self.complete(connection.transport)
        return connection

    def complete(self, transport: Any) -> None:
        """Do for kombu's own transport what hothouse_transport does itself with parts that are left out."""
        deliver = transport._deliver

        def deliver_complete(raw: Any, queue: Any) -> Any:
            try:
                properties = completed(raw)["properties"]
                properties["delivery_tag"] = str(properties.get("delivery_tag") or uuid.uuid4())
                for part, value in (("exchange", ""), ("routing_key", queue)):
                    if not isinstance(properties["delivery_info"].get(part), str):
                        properties["delivery_info"][part] = value
                transport.channels[0].decode_body(raw.get("body"), properties.get("body_encoding"))
            except Exception as error:
                if isinstance(queue, str) and names.internal(queue):
                    raise
                dead.push(self.app, raw, queue, f"unreadable: {error!r}")
                logger.error(
                    "A message in the queue %s cannot be read, it is a dead letter: %r", queue, error
                )
                return None
            return deliver(raw, queue)

        transport._deliver = deliver_complete

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> Any:
            try:
                check(self.app, message)
            except UnknownTask as unknown:
                return self.on_unknown_task(None, message, NotRegistered(str(unknown)))
            except Unfit as reason:
                return self.on_invalid_task(None, message, reason)
            except Exception as error:  # whatever a decoder raises
                return self.on_decode_error(message, error)
            try:
                return handle(message)
            except Unfit as reason:
                return self.on_invalid_task(None, message, reason)
            except Exception as error:
                if is_lost(error, self.connection_errors):
                    raise
                logger.error("A message could not be handled", exc_info=True)
                return self.put_aside(message, f"cannot be handled: {shown(error)}")

        return on_task_received

    def put_aside(self, message: Any, reason: str, unknown: str = "") -> None:
        """Make a dead letter of a message, unless it is settled."""
        for request in [*state.reserved_requests]:
            if request.message is message:
                state.task_ready(request)
        if message.acknowledged:
            return
        try:
            dead.bury(self.app, message, reason, 0, unknown)
        except Exception as error:
            if is_lost(error, self.connection_errors):
                raise
            logger.error(
                "A message could not be put aside, that is tried again after the visibility timeout: %s: %r",
                reason,
                error,
            )
            return
        message._state = "ACK"

    def on_unknown_task(self, body: Any, message: Any, exc: Any) -> None:
        name = str(exc.args[0])
        self.put_aside(message, "no release on this host knows the task", name)
        signals.task_unknown.send(
            sender=self, message=message, exc=exc, name=name, id=identity(message._raw)[1]
        )

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self.put_aside(message, "it names no task")
        signals.task_rejected.send(sender=self, message=message, exc=None)

    def on_invalid_task(self, body: Any, message: Any, exc: Any) -> None:
        self.put_aside(message, f"invalid: {exc}")
        signals.task_rejected.send(sender=self, message=message, exc=exc)

    def on_decode_error(self, message: Any, exc: Any) -> None:
        self.put_aside(message, f"cannot be read: {shown(exc)}")


class Request(celery.worker.request.Request):
    """One task of a message that was found fit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for moment in (self.eta, self.expires):
            if moment:
                try:
                    to_timestamp(timezone.to_system(moment))
                except (OverflowError, ValueError) as error:
                    raise Unfit(f"the time {moment} is out of range: {error}") from None
