"""What really happened, noted outside of the hosts: which task ran when and where, which mail arrived how often."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
import time
from collections import Counter, defaultdict
from types import TracebackType
from typing import Any

from aiosmtpd.smtp import SMTP, Envelope, Session

# So long that the campaign of a hundred mails is still on its way when something breaks.
ANSWER_SECONDS = 0.5
SLOW_SECONDS = 3.0


class Tasks:
    """What producers and tasks told (hothouse_faults.py). Times are of the monotonic clock of this machine."""

    def __init__(self) -> None:
        self.published: dict[int, float] = {}
        self.latency: dict[int, float] = {}
        self.refused: dict[int, str] = {}
        self.starts: dict[int, list[tuple[float, str]]] = defaultdict(list)
        self.ends: dict[int, list[tuple[float, str]]] = defaultdict(list)
        self.stopping = False

    def note(self, line: str) -> str:
        """Take a line and return the answer."""
        kind, number, rest = (*line.strip().split(maxsplit=2), "")[:3]
        key, now = int(number), time.monotonic()
        if kind == "published":
            self.published[key], self.latency[key] = now, float(rest)
        elif kind == "refused":
            self.refused[key] = rest
        else:
            {"start": self.starts, "end": self.ends}[kind][key].append((now, rest))
        return "stop" if self.stopping else "go"

    def lost(self, begin: float, end: float) -> list[int]:
        """Tasks published in a time whose producer was told so, and that never ran to their end."""
        return [
            number for number, at in self.published.items() if begin <= at < end and number not in self.ends
        ]

    def doubled(self, begin: float, end: float) -> list[int]:
        """Tasks published in a time that ran to their end more than once: at least once is what is promised."""
        return [
            number
            for number, at in self.published.items()
            if begin <= at < end and len(self.ends.get(number, [])) > 1
        ]

    def pause(self, begin: float, end: float) -> float:
        """The longest time without any task coming to its end, of those that began in a time."""
        ends = sorted(at for runs in list(self.ends.values()) for at, _ in runs)
        inside = [begin, *(at for at in ends if at > begin)]
        return max((later - at for at, later in itertools.pairwise(inside) if at < end), default=0)

    def stall(self, begin: float, end: float) -> float:
        """The longest that publishing took, of what was published in a time."""
        return max((self.latency[n] for n, at in self.published.items() if begin <= at < end), default=0)


class Mails:
    """A mail server whose behaviour can be changed while it runs."""

    def __init__(self) -> None:
        self.delivered: Counter[str] = Counter()
        self.mode = "fine"
        self._seen: set[str] = set()

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """450 for whom it sees the first time while it greylists."""
        if self.mode == "greylisting" and address not in self._seen:
            self._seen.add(address)
            return "450 4.7.1 greylisted, come back later"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_MAIL(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """421 while it refuses everything."""
        if self.mode == "refusing":
            return "421 4.3.2 not now"
        envelope.mail_from = address
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        """Take the mail, and only then answer: a client that dies meanwhile has sent it all the same.

        While it drops connections, it does so after it has taken every second one.
        """
        self.delivered.update(envelope.rcpt_tos)
        dropped = self.mode == "dropping" and self.delivered.total() % 2
        await asyncio.sleep(SLOW_SECONDS if self.mode == "slow" else ANSWER_SECONDS)
        if dropped:
            assert server.transport
            server.transport.abort()
        return "250 2.0.0 queued as " + re.sub(r"\W", "", envelope.rcpt_tos[0])


class Collector:
    """Both servers on an address of this machine, in a thread of their own."""

    def __init__(self, address: str, tasks_port: int, mail_port: int) -> None:
        self.tasks, self.mails = Tasks(), Mails()
        self._where = (address, tasks_port, mail_port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    async def _listen(self) -> None:
        address, tasks_port, mail_port = self._where
        await asyncio.start_server(self._serve_tasks, address, tasks_port, backlog=512)
        await self._loop.create_server(
            lambda: SMTP(self.mails, hostname="collector", loop=self._loop), address, mail_port, backlog=512
        )

    async def _serve_tasks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(f"{self.tasks.note(line.decode())}\n".encode())
                await writer.drain()
        except ConnectionError:
            pass  # its process was killed
        finally:
            writer.close()

    async def _end(self) -> None:
        """End every connection."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def __enter__(self) -> Collector:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
