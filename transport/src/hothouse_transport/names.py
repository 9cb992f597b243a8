"""Which names a queue can have. Of the standard library alone, so that a check can ask without kombu and redis-py."""

from __future__ import annotations

import unicodedata

# Keys that stand beside the queues in Redis, under the same prefix.
RESERVED = frozenset(
    {
        "unacked",
        "unacked_index",
        "unacked_mutex",
        "deliveries",
        "dead-letter",
        "unknown-task",
        "unknown-task.names",
        "revoked",
    }
)
RESERVED_BEGINNINGS = ("_kombu.", "flower.unacked", "app.unacked")
# Queues that Celery itself makes, for remote control and events.
INTERNAL_BEGINNINGS, INTERNAL_ENDS = ("celeryev.",), (".celery.pidbox",)
INTERNAL = frozenset({"celery.pidbox", "reply.celery.pidbox", "celeryev"})
LONGEST_BYTES = 255
# Invisible, and part of the spelling of words in some languages.
JOINERS = "\u200c\u200d"


def internal(name: str) -> bool:
    """Whether Celery makes a queue of this name for itself."""
    return name in INTERNAL or name.startswith(INTERNAL_BEGINNINGS) or name.endswith(INTERNAL_ENDS)


def reserved(name: str) -> bool:
    """Whether the transport keeps something else under this name."""
    return name in RESERVED or name.startswith(RESERVED_BEGINNINGS)


def unusable(name: object) -> str | None:
    """Why an application's queue cannot have this name; None if it can."""
    if not isinstance(name, str):
        return f"it is no text, but {type(name).__name__}"
    if not name:
        return "it is empty"
    for character in name:
        if reason := _unfit(character):
            return f"it contains {reason}"
    if len(name.encode()) > LONGEST_BYTES:
        return f"it is longer than {LONGEST_BYTES} bytes"
    if reserved(name) or internal(name):
        return "it is reserved: the transport or Celery keeps something else under this name"
    return None


def _unfit(character: str) -> str | None:
    category = unicodedata.category(character)
    if character == ",":
        return "a comma, which separates names of queues"
    if category.startswith("Z"):
        return f"a space (U+{ord(character):04X})"
    if category in ("Cc", "Cs") or (category == "Cf" and character not in JOINERS):
        return f"the control character U+{ord(character):04X}"
    return None
