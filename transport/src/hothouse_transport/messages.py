"""Messages as they lie in a queue, whoever wrote them, and the dead letters that are made of them."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

#: Parts of a message that producers in other languages leave out, or write as null or [].
PARTS = ("headers", "properties")
LONGEST_NAME = 255


def completed(message: Any) -> dict[str, Any]:
    """The message with all its parts, changed in place; TypeError if it is none."""
    if not isinstance(message, dict):
        raise TypeError(f"a message is a JSON object, not {type(message).__name__}")
    for part in PARTS:
        _mapping(message, part)
    _mapping(message["properties"], "delivery_info")
    return message


def _mapping(owner: dict[str, Any], name: str) -> None:
    if not owner.get(name):
        owner[name] = {}
    elif not isinstance(owner[name], dict):
        raise TypeError(f"{name} is no JSON object, but {type(owner[name]).__name__}")


def part(message: Any, name: str) -> dict[str, Any]:
    """A part of what may be a message; empty if it has none."""
    value = message.get(name) if isinstance(message, dict) else None
    return value if isinstance(value, dict) else {}


def losses_of(headers: Any) -> int:
    """How many runs of the task ended with the death of the process that ran it, by the header `losses`.

    Whoever sends the message of such a run's retry may write it there, so that these count like vanished consumers.
    """
    try:
        return max(0, int(headers.get("losses", 0)))
    except (ValueError, TypeError, AttributeError, OverflowError):
        return 0


def is_name(value: Any) -> bool:
    """Whether this can be shown as the name of a task."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def identity(message: Any) -> tuple[Any, Any]:
    """The name and the id of the task, which protocol 1 keeps in the body."""
    headers = part(message, "headers")
    if "task" not in headers and isinstance(message, dict):
        try:
            text = message.get("body")
            if part(message, "properties").get("body_encoding") == "base64":
                text = base64.b64decode(text or "")
            body = json.loads(text or "null")
        except (ValueError, TypeError, RecursionError):
            body = None
        if isinstance(body, dict):
            headers = body
    return headers.get("task"), headers.get("id")


def dead_letter_of(message: Any, queue: str | None, reason: str, deliveries: int) -> dict[str, Any]:
    """The entry that a message gets among the dead letters."""
    route = part(part(message, "properties"), "delivery_info")
    task, name = identity(message)
    return {
        "message": message,
        "queue": queue or route.get("routing_key"),
        "routing_key": route.get("routing_key"),
        "exchange": route.get("exchange"),
        "task": task,
        "id": name,
        "reason": reason,
        "deliveries": deliveries,
        "time": round(time.time(), 3),
    }
