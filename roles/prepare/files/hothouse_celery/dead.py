"""Dead letters: messages that were put aside because whoever took them died each time.

hothouse_transport puts one aside when its worker died, hothouse_celery.worker when a pool's child did.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import hothouse_transport
from celery import Celery
from redis import Redis

from hothouse_celery import credential


def client(app: Celery) -> Redis[str]:
    """A connection of its own to the broker. Keys have the prefix of key()."""
    return Redis.from_url(
        credential("broker_url"), decode_responses=True, socket_timeout=10, socket_connect_timeout=3
    )


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
        yield from (json.loads(entry) for entry in reversed(redis.lrange(list_key(app), 0, -1)))


def settle(app: Celery, ids: list[str], requeue: bool) -> list[str]:
    """Take letters with these ids, without any all, off the list; back into their queues or not. The ids of those."""
    settled = []
    with client(app) as redis:
        for entry in reversed(redis.lrange(list_key(app), 0, -1)):
            letter = json.loads(entry)
            if ids and letter["id"] not in ids:
                continue
            with redis.pipeline(transaction=True) as steps:
                if requeue:
                    steps.lpush(key(app, letter["queue"]), json.dumps(revived(letter["message"])))
                steps.lrem(list_key(app), 1, entry)
                steps.execute()
            settled.append(letter["id"])
    return settled


def revived(message: Any) -> dict[str, Any]:
    """The message as if it had never been taken."""
    fresh: dict[str, Any] = json.loads(message) if isinstance(message, str) else message
    fresh["headers"].pop("losses", None)
    return fresh
