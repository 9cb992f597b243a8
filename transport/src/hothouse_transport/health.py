"""Does the consumer of this process still hear Redis? A process that lives and hears nothing is the worst kind."""

from __future__ import annotations

import time


class Health:
    """What a watchdog asks. Written by the thread that consumes, read by any."""

    def __init__(self) -> None:
        self._ticked: float | None = None
        self._asked: dict[int, float] = {}

    def touch(self) -> None:
        """The consumer's loop runs, or a reconnect is making progress."""
        self._ticked = time.monotonic()

    def asked(self, channel: int) -> None:
        """A channel waits for an answer of Redis."""
        self._asked.setdefault(channel, time.monotonic())

    def answered(self, channel: int) -> None:
        """Redis answered, or the channel gave the connection up."""
        self._asked.pop(channel, None)

    def stale(self, seconds: float) -> str | None:
        """Why this process is deaf, if it has been so for that long. None also while nothing consumes yet."""
        if self._ticked is None:
            return None
        now = time.monotonic()
        if now - self._ticked > seconds:
            return f"the consumer's loop stands still, for {now - self._ticked:.0f} s"
        since = min(list(self._asked.values()), default=now)
        if now - since > seconds:
            return f"Redis has not answered the consumer for {now - since:.0f} s"
        return None


health = Health()
