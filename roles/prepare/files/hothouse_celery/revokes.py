"""Revokes that last: they are noted in Redis before the workers hear of them, and workers read the notes.

Celery keeps a revoke in the memory of the workers that run just then, and forgets it after three hours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from celery import Celery, bootsteps
from celery.app.control import Control
from celery.utils.functional import maybe_list
from celery.utils.log import get_logger
from hothouse_transport.refusals import refusal
from kombu.exceptions import OperationalError
from kombu.utils.json import dumps, loads
from redis import RedisError, ResponseError
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from hothouse_celery import dead

logger = get_logger(__name__)

# A sorted set of what was revoked, each as JSON: an id, or a stamped header and its value. By time (Unix, seconds).
KEY = "revoked"
# How many are remembered; the oldest are forgotten first.
MOST = 50_000
# How often a worker reads what is new, should it not have heard of it, and how far clocks may differ, in seconds.
READ_SECONDS, SKEW_SECONDS = 30.0, 60.0
# When it does so for the first time: its subscription may begin a moment after it has read all.
SOON_SECONDS = 1.0

# What this worker was told to revoke. Redis may lose it in a failover.
told: dict[str, float] = {}


class NotAllowed(Exception):
    """Redis refuses remote control to this process."""


def revoked_by(command: str, arguments: dict[str, Any]) -> list[str]:
    """What a control command revokes, as members of the sorted set; nothing if it is another command."""
    try:
        if command in ("revoke", "terminate"):
            return [dumps(name) for name in maybe_list(arguments.get("task_id")) or ()]
        if command == "revoke_by_stamped_headers":
            headers = arguments.get("headers") or {}
            if isinstance(headers, list):
                headers = dict(pair.split("=")[:2] for pair in headers)
            return [
                dumps([header, stamp]) for header in headers for stamp in maybe_list(headers[header]) or ()
            ]
    except (AttributeError, TypeError, ValueError):
        pass  # Celery itself says what is wrong with it
    return []


def client(app: Celery) -> Any:
    """A connection to the broker that does not hold a worker's loop for long."""
    return dead.client(app, retry=Retry(NoBackoff(), 0))


def write(app: Celery, revoked: dict[str, float]) -> None:
    """Note in Redis what was revoked when."""
    if not revoked:
        return
    with client(app) as redis, redis.pipeline(transaction=False) as steps:
        steps.zadd(dead.key(app, KEY), revoked, gt=True)
        steps.zremrangebyrank(dead.key(app, KEY), 0, -MOST - 1)
        steps.execute()


def make_lasting(app: Celery) -> None:
    """Let an application note what it revokes before workers are told, and let its workers know what was."""
    lasting.add(app)
    app.steps["consumer"].add(Remember)


def broadcast(self: Control, command: str, arguments: Any = None, *rest: Any, **options: Any) -> Any:
    """Celery's own, which all of remote control goes through."""
    if self.app not in lasting:
        return celerys_broadcast(self, command, arguments, *rest, **options)
    revoked = revoked_by(command, {**options, **(arguments or {})})
    try:
        write(self.app, dict.fromkeys(revoked, time.time()))
    except NoPermissionError:
        pass  # a worker that hears of it notes it
    except RedisError as error:
        logger.error("What is revoked could not be noted in Redis: %s", error)
    try:
        return celerys_broadcast(self, command, arguments, *rest, **options)
    except (ResponseError, OperationalError) as error:
        if not refused(error) and not refused(error.__cause__):
            raise
        raise NotAllowed(
            f"Redis does not let this process control workers ({command}): {error}. To allow it to the application, "
            "set app_may_control: true in the inventory and run site.yml."
        ) from error


def refused(error: BaseException | None) -> bool:
    """Whether Redis' ACL refuses something, be it in a script."""
    if isinstance(error, NoPermissionError):
        return True
    # Redis 7.0 says it in the second way.
    words = ("ACL failure in script", "The user executing the script")
    return isinstance(error, ResponseError) and any(word in str(error) for word in words)


# Applications whose revokes last; an object for remote control may be older than their settings.
lasting: WeakSet[Celery] = WeakSet()
celerys_broadcast = Control.broadcast
Control.broadcast = broadcast  # type: ignore[method-assign]  # whoever made the Control, it has to note


class Remember(bootsteps.StartStopStep):
    """Lets a worker know all revokes, those from before it connected as well."""

    requires = ("celery.worker.consumer.control:Control",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        from celery.worker import state as worker_state

        super().__init__(consumer, **options)
        self.timers: list[Any] = []
        self.read_until = 0.0
        self.unwritten = False
        note_commands(self.hear)
        worker_state.revoked.expires = 0  # seconds; they are forgotten by their number alone

    def start(self, consumer: Any) -> None:
        self.read_until, self.unwritten = 0.0, True
        self.catch_up(consumer.app)
        self.timers = [
            consumer.timer.call_after(SOON_SECONDS, self.look, (consumer.app,)),
            consumer.timer.call_repeatedly(READ_SECONDS, self.look, (consumer.app,)),
        ]

    def stop(self, consumer: Any) -> None:
        for timer in self.timers:
            timer.cancel()
        self.timers = []

    def look(self, app: Celery) -> None:
        """Catch up, or do so next time."""
        try:
            self.catch_up(app)
        except RedisError as error:
            logger.warning("The revokes could not be read from Redis: %s", error)

    def catch_up(self, app: Celery) -> None:
        """Take in what was revoked since the last time, and note again what Redis may not have.

        An error of the connection, or a refusal that passes, is for the consumer, which connects anew.
        """
        now = time.time()
        try:
            with client(app) as redis:
                take_in(redis.zrange(dead.key(app, KEY), self.read_until, "+inf", byscore=True))
            self.read_until = now - SKEW_SECONDS
        except ResponseError as error:
            if refusal(error):
                raise
            logger.error("Revokes from before this worker started are not known to it: %s", error)
        if self.unwritten:
            self.note(app)

    def hear(self, app: Celery, revoked: list[str]) -> None:
        """Note what a command to this worker revokes."""
        told.update(dict.fromkeys(revoked, time.time()))
        for name in list(told)[:-MOST]:
            del told[name]
        self.note(app, revoked)

    def note(self, app: Celery, revoked: list[str] | None = None) -> None:
        """Write some of what this worker was told into Redis, or all."""
        try:
            wanted = told if revoked is None or self.unwritten else revoked
            write(app, {name: told[name] for name in wanted if name in told})
            self.unwritten = False
        except RedisError as error:
            self.unwritten = True
            logger.error("What is revoked could not be noted in Redis, it will be tried again: %s", error)


def note_commands(hear: Callable[[Celery, list[str]], None]) -> None:
    """Let the commands that revoke tell what they revoke first."""
    from celery.worker.control import Panel

    for name in ("revoke", "terminate", "revoke_by_stamped_headers"):
        Panel.data[name] = Noted(name, Panel.data[name], hear)


class Noted:
    """A command of remote control that tells what it revokes before it does so."""

    def __init__(self, name: str, handler: Any, hear: Callable[[Celery, list[str]], None]) -> None:
        self.name, self.hear = name, hear
        self.handler = handler.handler if isinstance(handler, Noted) else handler

    def __call__(self, state: Any, **arguments: Any) -> Any:
        self.hear(state.app, revoked_by(self.name, arguments))
        return self.handler(state, **arguments)


def take_in(members: list[str]) -> None:
    """Let this worker know what was revoked."""
    from celery.worker import state

    for member in members:
        try:
            revoked = loads(member)
        except Exception:  # whatever a decoder raises; it is not ours
            continue
        if not isinstance(revoked, list):
            if isinstance(revoked, str) and revoked not in state.revoked:
                state.revoked.add(revoked)
        elif len(revoked) == 2 and isinstance(revoked[0], str):
            header, stamp = revoked
            known = maybe_list(state.revoked_stamps.get(header)) or []
            if stamp not in known:
                state.revoked_stamps[header] = [*known, stamp]
