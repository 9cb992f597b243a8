"""Messages that were put aside: dead letters, and tasks that no release on a host knew.

A dead letter is a message that no worker can run (hothouse_celery.messages), or whose taker died each time:
hothouse_transport puts it aside when that was a worker, hothouse_celery.worker when it was a pool's child.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import hothouse_transport
from celery import Celery
from hothouse_transport.messages import dead_letter_of, is_name
from hothouse_transport.names import unusable
from kombu.utils.json import dumps
from redis import Redis, ResponseError
from redis.backoff import NoBackoff
from redis.retry import Retry

from hothouse_celery import credential

FIELDS = ("message", "queue", "routing_key", "exchange", "task", "id", "reason", "deliveries", "time")
PARTS = ("headers", "properties")
KINDS = ("dead", "unknown")
GONE = "someone else has settled it"
# Take an entry off its list, and put a message into a queue instead, if one is given. With the name of a task, that is
# counted as well. KEYS list, hash of names, queue; ARGV entry, name or nothing, message. Whether the entry was there.
SETTLE = """
if KEYS[3] then redis.call('LLEN', KEYS[3]) end -- no list: an error now, when nothing has changed yet
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
if ARGV[2] ~= '' and redis.call('HINCRBY', KEYS[2], ARGV[2], -1) < 1 then redis.call('HDEL', KEYS[2], ARGV[2]) end
if KEYS[3] then redis.call('LPUSH', KEYS[3], ARGV[3]) end
return 1
"""


class Refused(Exception):
    """Why a letter stays where it is."""


def client(app: Celery, **options: Any) -> Redis[str]:
    """A connection of its own to the broker. Keys have the prefix of key(). No bytes are refused."""
    options = {"decode_responses": True, "encoding_errors": "surrogateescape", **options}
    return Redis.from_url(credential("broker_url"), socket_timeout=10, socket_connect_timeout=3, **options)


def key(app: Celery, name: str) -> str:
    """A key of the broker, under the name by which Redis knows it."""
    return f"{app.conf.broker_transport_options.get('global_keyprefix', '')}{name}"


def list_key(app: Celery, kind: str = "dead") -> str:
    """The list of dead letters, or of tasks that no one knew."""
    option, default = {
        "dead": ("dead_letter_key", "dead-letter"),
        "unknown": ("unknown_task_key", "unknown-task"),
    }[kind]
    return key(app, app.conf.broker_transport_options.get(option, default))


def names_key(app: Celery) -> str:
    """The hash that counts unknown tasks by their name."""
    return f"{list_key(app, 'unknown')}.names"


def bury(app: Celery, message: Any, reason: str, runs: int, unknown: str = "") -> None:
    """Put a message aside that this process holds. Acknowledging it after that does no harm.

    `unknown` is the name of its task, if that is what no one knows.
    """
    if hasattr(message.channel, "bury"):
        hothouse_transport.dead_letter(message.channel, message, reason, runs, unknown)
    elif not message.acknowledged:
        push(app, message._raw, None, reason, runs, unknown)
        message.ack()


def push(app: Celery, raw: Any, queue: str | None, reason: str, runs: int = 0, unknown: str = "") -> None:
    """Add a message to a list, of which kombu's own transport holds the original."""
    letter = dead_letter_of(raw, queue, reason, runs)
    try:
        entry = dumps(letter)  # kombu has read it, dates and the like among its headers as well
    except RecursionError:  # it was read, which has another limit than writing
        entry = json.dumps({**letter, "message": None, "reason": f"{reason}; nested too deep to be kept"})
    with client(app) as redis, redis.pipeline(transaction=True) as steps:
        steps.lpush(list_key(app, "unknown" if unknown else "dead"), entry)
        if unknown:
            steps.hincrby(names_key(app), unknown, 1)
        steps.execute()


def unknown_tasks(app: Celery) -> dict[str, int]:
    """How many messages were set aside for each task that no one knew."""
    with client(app) as redis:
        return {name: int(count) for name, count in sorted(redis.hgetall(names_key(app)).items())}


def known(app: Celery) -> set[str]:
    """The tasks of this release."""
    app.loader.import_default_modules()
    return set(app.tasks)


def letters(app: Celery, kinds: tuple[str, ...] = KINDS) -> Iterator[dict[str, Any]]:
    """All that was put aside, of each kind the oldest first."""
    with client(app) as redis:
        for kind in kinds:
            for entry in reversed(redis.lrange(list_key(app, kind), 0, -1)):
                yield {**letter_of(entry), "kind": kind}


def letter_of(entry: str) -> dict[str, Any]:
    """A dead letter from its entry in the list, whatever that is, with an id by which it can be named."""
    try:
        found = json.loads(entry)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        found = {"message": entry, "reason": "not an entry of hothouse_transport"}
    letter: dict[str, Any] = {**dict.fromkeys(FIELDS), **found}
    if not readable(letter["id"]):
        letter["id"] = hashlib.sha256(as_bytes(entry)).hexdigest()[:12]
    return letter


def readable(name: Any) -> bool:
    """Whether this can be the name of anything."""
    return isinstance(name, str) and name != "" and name.isprintable()


def as_bytes(entry: str) -> bytes:
    """An entry as Redis has it; hiredis would not encode what client() could not decode."""
    return entry.encode(errors="surrogateescape")


def settle(
    app: Celery,
    wanted: Callable[[dict[str, Any]], bool],
    requeue: bool,
    kinds: tuple[str, ...] = KINDS,
) -> Iterator[tuple[str, str]]:
    """Take the letters that are wanted off their list; back into their queues or not.

    For each its id, and why that could not be done, or nothing.
    """
    # What is retried blindly would seem to be settled by someone else.
    with client(app, retry=Retry(NoBackoff(), 0)) as redis:
        script = redis.register_script(SETTLE)
        for kind in kinds:
            for entry in reversed(redis.lrange(list_key(app, kind), 0, -1)):
                letter = letter_of(entry)
                if not wanted({**letter, "kind": kind}):
                    continue
                keys, arguments = [list_key(app, kind), names_key(app)], [as_bytes(entry), ""]
                if kind == "unknown" and is_name(letter["task"]):
                    arguments[1] = letter["task"]
                try:
                    if requeue:
                        arguments.append(json.dumps(revived(letter["message"])))
                        if unusable(letter["queue"]):
                            raise Refused("it names no queue")
                        keys.append(key(app, letter["queue"]))
                    if not script(keys, arguments):
                        raise Refused(GONE)
                except (Refused, ResponseError) as error:
                    yield letter["id"], str(error)
                else:
                    yield letter["id"], ""


def revived(message: Any) -> dict[str, Any]:
    """The message as if it had never been taken; Refused if it is none."""
    try:
        fresh = json.loads(message) if isinstance(message, str) else message
    except (ValueError, RecursionError) as error:
        raise Refused(f"its message cannot be read: {error}") from None
    if not (isinstance(fresh, dict) and all(isinstance(fresh.get(part) or {}, dict) for part in PARTS)):
        raise Refused("its message is not one of Celery's")
    (fresh.get("headers") or {}).pop("losses", None)
    return fresh
