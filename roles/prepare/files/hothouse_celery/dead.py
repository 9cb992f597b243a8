"""Dead letters: messages that were put aside because whoever took them died each time.

hothouse_transport puts one aside when its worker died, hothouse_celery.worker when a pool's child did.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import hothouse_transport
from celery import Celery
from redis import Redis, ResponseError
from redis.backoff import NoBackoff
from redis.retry import Retry

from hothouse_celery import credential

FIELDS = ("message", "queue", "routing_key", "exchange", "task", "id", "reason", "deliveries", "time")
PARTS = ("headers", "properties")
# How long a letter that somebody is putting back is left alone by others.
HELD_SECONDS = 60
GONE = "somebody else has settled it"


class Refused(Exception):
    """Why a letter stays where it is."""


def client(app: Celery, **options: Any) -> Redis[str]:
    """A connection of its own to the broker. Keys have the prefix of key(). No bytes are refused."""
    options = {"decode_responses": True, "encoding_errors": "surrogateescape", **options}
    return Redis.from_url(credential("broker_url"), socket_timeout=10, socket_connect_timeout=3, **options)


def key(app: Celery, name: str) -> str:
    """A key of the broker, under the name by which Redis knows it."""
    return f"{app.conf.broker_transport_options.get('global_keyprefix', '')}{name}"


def list_key(app: Celery) -> str:
    """The list of dead letters."""
    return key(app, app.conf.broker_transport_options.get("dead_letter_key", "dead-letter"))


def bury(app: Celery, message: Any, reason: str, runs: int) -> None:
    """Put a message aside that this process holds. Acknowledging it after that does no harm."""
    if hasattr(message.channel, "bury"):
        hothouse_transport.dead_letter(message.channel, message, reason, runs)
        return
    from hothouse_transport.channel import dead_letter_of

    with client(app) as redis:
        redis.lpush(list_key(app), json.dumps(dead_letter_of(message._raw, None, reason, runs)))


def letters(app: Celery) -> Iterator[dict[str, Any]]:
    """All dead letters, the oldest first."""
    with client(app) as redis:
        yield from (letter_of(entry) for entry in reversed(redis.lrange(list_key(app), 0, -1)))


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


def settle(app: Celery, ids: list[str], requeue: bool) -> Iterator[tuple[str, str]]:
    """Take letters with these ids, without any all, off the list; back into their queues or not.

    For each its id, and why that could not be done, or nothing.
    """
    # What is retried blindly might be done twice.
    with client(app, retry=Retry(NoBackoff(), 0)) as redis:
        for entry in reversed(redis.lrange(list_key(app), 0, -1)):
            letter = letter_of(entry)
            if ids and letter["id"] not in ids:
                continue
            try:
                if held(letter):
                    raise Refused(f"somebody else is putting it back; if not, try again in {HELD_SECONDS} s")
                if requeue:
                    put_back(app, redis, as_bytes(entry), letter)
                elif not redis.lrem(list_key(app), 1, as_bytes(entry)):
                    raise Refused(GONE)
            except (Refused, ResponseError) as error:
                yield letter["id"], str(error)
            else:
                yield letter["id"], ""


def put_back(app: Celery, redis: Redis[str], entry: bytes, letter: dict[str, Any]) -> None:
    """Move the message of a letter into its queue, once however many try.

    The ACL leaves no command to `app` that would push only if the entry was still there, neither WATCH nor a script. So
    the entry is first exchanged for a copy that names its holder, which others leave alone, and that one for the
    message; both exchanges are transactions. Who ends in between leaves the copy: a letter again after HELD_SECONDS.
    Nothing is lost then. Twice in a queue would be only what is put back by two at once, of whom the second one ends
    before it has removed its copy, or who stands still in between for longer than HELD_SECONDS.
    """
    message = json.dumps(revived(letter["message"]))
    if not readable(letter["queue"]):
        raise Refused("it names no queue")
    queue, dead_letters = key(app, letter["queue"]), list_key(app)
    redis.llen(queue)  # no list: an error now, and not halfway
    copy = json.dumps({**letter, "holder": uuid.uuid4().hex, "held": time.time()})
    if not exchange(redis, dead_letters, entry, dead_letters, copy):
        redis.lrem(dead_letters, 1, copy)
        raise Refused(GONE)
    if not exchange(redis, dead_letters, copy, queue, message):
        raise Refused("it is in its queue, but may be in this list as well: look, and drop it")


def exchange(redis: Redis[str], source: str, entry: str | bytes, target: str, value: str) -> bool:
    """Remove an entry from a list and push a value onto another, atomically. Whether the entry was there."""
    with redis.pipeline(transaction=True) as steps:
        steps.lrem(source, 1, entry)
        steps.lpush(target, value)
        return bool(steps.execute()[0])


def held(letter: dict[str, Any]) -> bool:
    """Whether somebody is just putting this letter back."""
    since = letter.get("held")
    return isinstance(since, int | float) and abs(time.time() - since) < HELD_SECONDS


def revived(message: Any) -> dict[str, Any]:
    """The message as if it had never been taken; Refused if it is none."""
    try:
        fresh = json.loads(message) if isinstance(message, str) else message
    except (ValueError, RecursionError) as error:
        raise Refused(f"its message cannot be read: {error}") from None
    if not (isinstance(fresh, dict) and all(isinstance(fresh.get(part, {}), dict) for part in PARTS)):
        raise Refused("its message is not one of Celery's")
    fresh.get("headers", {}).pop("losses", None)
    return fresh
