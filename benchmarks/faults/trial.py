"""A run: tasks are published and mails sent all the time, one thing after the other breaks, and all is counted."""

from __future__ import annotations

import json
import random
import secrets
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from catalogue import FAULTS, MAILS_AT_ONCE, Fault, World
from collector import Collector
from hosts import SSH, Hosts, Unready, wait

TASKS_PORT, MAIL_PORT = 2600, 2525
# As the inventory of the scenario sets it.
VISIBILITY_SECONDS = 20.0


@dataclass
class Row:
    """What one kind of fault did. Tasks and mails are counted to the fault during which they were published."""

    injected: int = 0
    # The fewest mails that were still to be sent when it was broken.
    to_send: int | None = None
    lost: int = 0
    duplicated: int = 0
    # The most of one injection.
    ambiguous: int = 0
    again: int = 0
    seconds: float = 0
    stall: float = 0
    details: list[str] = field(default_factory=list)


@dataclass
class Span:
    """One fault: when, and the campaign that was on its way."""

    fault: Fault
    domain: str
    begin: float
    end: float = 0
    campaign: str = ""
    to_send: int = 0


@dataclass
class Outcome:
    """Rows by the name of the fault, and what is true of the whole."""

    rows: dict[str, Row]
    published: int
    refused: dict[int, str]
    recipients: int
    # What was not broken or mended as it should have been, so that the rows prove less.
    problems: list[str]


class Trial:
    """Runs a series of faults on the hosts."""

    def __init__(self, hosts: Hosts, collector: Collector, seed: int, recipients: int, rate: float) -> None:
        """`recipients` for each fault's campaign; `rate` tasks a second."""
        self.hosts, self.collector = hosts, collector
        self.random = random.Random(seed)
        self.world = World(hosts, collector.mails, random.Random(seed))
        self.recipients, self.rate = recipients, rate
        # Never touched by a fault.
        self.front = next(name for name in hosts.groups["app"] if name not in hosts.groups["redis"])
        # What an earlier run left behind is not taken for what this one does.
        self.token = secrets.token_hex(4)
        self.first = int(self.token, 16) * 10**6 + 10**8
        self.problems: list[str] = []

    def series(self, count: int, names: Iterable[str] = ()) -> list[Fault]:
        """`count` faults in random order, each kind as often as the others."""
        known = [fault for fault in FAULTS if not names or fault.name in names]
        faults: list[Fault] = []
        while len(faults) < count:
            faults += self.random.sample(known, len(known))
        return faults[:count]

    def run(self, faults: list[Fault]) -> Outcome:
        """Break everything in turn, wait until all work is done or given up, and count.

        What goes wrong on the way is a problem of the outcome, so that what was seen before is not lost.
        """
        began = time.monotonic()
        producer = subprocess.Popen(
            [
                "ssh",
                "-F",
                SSH,
                self.front,
                f"hothouse-run python -m hothouse_faults {self.rate} {self.first}",
            ],
            stdout=subprocess.DEVNULL,
        )
        spans: list[Span] = []
        try:
            wait(lambda: self.collector.tasks.ends, "the first task", 60)
            for number, fault in enumerate(faults):
                wait(self.hosts.healthy, "Redis and its Sentinels to be whole", 90)
                if fault.doubtful > MAILS_AT_ONCE:
                    # What it does to the mails of earlier campaigns would be counted there.
                    for span in spans:
                        self._await_end(span)
                say(f"{number + 1:>3} {fault.name}")
                spans.append(Span(fault, f"fault{number}-{self.token}.example.com", time.monotonic()))
                self._break(spans[-1], "hold" if number % 2 else "resend")
        except (TimeoutError, Unready) as error:
            self._problem(f"the run ended before its time: {error}")
        finally:
            self.collector.tasks.stopping = True
            try:
                producer.wait(120)
            except subprocess.TimeoutExpired:
                producer.kill()
                self._problem("the producer did not come to its end")
        if spans:
            spans[0].begin = began
        self._drain(spans)
        return self._count(spans)

    def _problem(self, text: str) -> None:
        say(text)
        self.problems.append(text)

    def _break(self, span: Span, policy: str) -> None:
        fault = span.fault
        try:
            with ExitStack() as breakage:
                former = self.hosts.primary()
                if fault.first:
                    breakage.enter_context(fault.inject(self.world))
                span.campaign = self._campaign(span.domain, policy)
                wait(lambda: self._arrived(span.domain), "the first mail", 60)
                if not fault.first:
                    span.begin = time.monotonic()
                    breakage.enter_context(fault.inject(self.world))
                span.to_send = self.recipients - self._arrived(span.domain)
                threading.Event().wait(fault.hold)
                if fault.failover and self.hosts.primary() == former:
                    raise Unready(f"{former} is still the primary")
            done = len(self.collector.tasks.ends)
            wait(lambda: len(self.collector.tasks.ends) > done, "work to go on", 90)
            if not fault.doubtful:
                # What the next fault does to its mails would be counted here.
                self._await_end(span)
        except (TimeoutError, Unready) as error:
            self._problem(f"{fault.name}: {error}")
        span.end = time.monotonic()

    def _campaign(self, domain: str, policy: str) -> str:
        rows = "\\n".join(["email,name", *(f"r{n}@{domain},R" for n in range(self.recipients))])
        answer = self.hosts.run(
            self.front,
            f"printf '{rows}\\n' | hothouse-run campaigns create --name faults --template welcome "
            f"--sender news@example.com --ambiguous {policy} --recipients -",
        )
        return answer.split()[-1]

    def _arrived(self, domain: str) -> int:
        return sum(address.endswith(f"@{domain}") for address in list(self.collector.mails.delivered))

    def _report(self, campaign: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(
            self.hosts.run(self.front, f"hothouse-run campaigns show --json --limit 1000000 {campaign}")
        )
        return report

    def _await_end(self, span: Span) -> None:
        """Wait until the campaign of a fault has ended, if it has one."""
        if not span.campaign:
            return
        wait(
            lambda: self._report(span.campaign)["state"] == "finished",
            f"the end of the campaign during {span.fault.name}",
            300,
        )

    def _drain(self, spans: list[Span]) -> None:
        """Until every campaign has ended, and until no task that was published is missing or it is too late for it."""
        tasks = self.collector.tasks
        for span in spans:
            try:
                self._await_end(span)
            except (TimeoutError, Unready) as error:
                self._problem(str(error))
        end = time.monotonic() + 2 * VISIBILITY_SECONDS
        while tasks.lost(0, float("inf")) and time.monotonic() < end:
            threading.Event().wait(0.5)

    def _count(self, spans: list[Span]) -> Outcome:
        rows: dict[str, Row] = defaultdict(Row)
        tasks = self.collector.tasks
        for span, later in zip(spans, [*spans[1:], None], strict=True):
            row = rows[span.fault.name]
            until = later.begin if later else float("inf")
            gone = tasks.lost(span.begin, until)
            row.injected += 1
            row.to_send = span.to_send if row.to_send is None else min(row.to_send, span.to_send)
            row.lost += len(gone)
            row.again += len(tasks.doubled(span.begin, until))
            row.seconds = max(row.seconds, tasks.pause(span.begin, span.end))
            row.stall = max(row.stall, tasks.stall(span.begin, until))
            row.details += [f"task {number} lost" for number in gone]
            if span.campaign:
                try:
                    self._count_mails(row, span.domain, self._report(span.campaign))
                except Unready as error:
                    self._problem(f"{span.fault.name}: its campaign was not counted: {error}")
        return Outcome(
            dict(rows), len(tasks.published), tasks.refused, self.recipients * len(spans), self.problems
        )

    def _count_mails(self, row: Row, domain: str, report: dict[str, Any]) -> None:
        """Whom a campaign did not reach, or reached more often than it says."""
        held, resent = ({record["email"] for record in report[kind]} for kind in ("ambiguous", "resent"))
        delivered = self.collector.mails.delivered
        everybody = [f"r{number}@{domain}" for number in range(self.recipients)]
        lost = [address for address in everybody if not delivered[address] and address not in held]
        doubled = [address for address in everybody if delivered[address] > (2 if address in resent else 1)]
        row.lost += len(lost)
        row.duplicated += len(doubled)
        row.ambiguous = max(row.ambiguous, len(held | resent))
        row.details += [f"{address} got no mail and is not listed" for address in lost]
        row.details += [
            f"{address} got {delivered[address]} mails, which are not listed" for address in doubled
        ]


def table(outcome: Outcome) -> str:
    """The rows as text."""
    lines = [
        f"{'fault':<38}{'injected':>9}{'to send':>8}{'lost':>6}{'duplicated':>11}{'ambiguous':>10}{'run again':>10}"
        f"{'work after':>11}{'publish':>9}"
    ]
    for name, row in outcome.rows.items():
        lines.append(
            f"{name:<38}{row.injected:>9}{row.to_send:>8}{row.lost:>6}{row.duplicated:>11}{row.ambiguous:>10}{row.again:>10}"
            f"{row.seconds:>10.1f}s{row.stall:>8.1f}s"
        )
    lines.append(
        f"{outcome.published} tasks published, {len(outcome.refused)} refused, {outcome.recipients} recipients"
    )
    lines += [f"problem: {problem}" for problem in outcome.problems]
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
