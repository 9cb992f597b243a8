"""A run: tasks are published and mails sent all the time, one thing after the other breaks, and all is counted."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from catalogue import FAULTS, Fault, World
from collector import Collector
from hosts import SSH, Hosts, wait

TASKS_PORT, MAIL_PORT = 2600, 2525
# As the inventory of the scenario sets it.
VISIBILITY_SECONDS = 20.0


@dataclass
class Row:
    """What one kind of fault did. Tasks and mails are counted to the fault during which they were published."""

    injected: int = 0
    lost: int = 0
    duplicated: int = 0
    ambiguous: int = 0
    again: int = 0
    seconds: float = 0
    stall: float = 0
    details: list[str] = field(default_factory=list)


@dataclass
class Span:
    """One fault: when, and the campaign that was on its way."""

    fault: Fault
    begin: float
    end: float
    campaign: str
    domain: str


@dataclass
class Outcome:
    """Rows by the name of the fault, and what is true of the whole."""

    rows: dict[str, Row]
    published: int
    refused: dict[int, str]
    recipients: int


class Trial:
    """Runs a series of faults on the hosts."""

    def __init__(self, hosts: Hosts, collector: Collector, seed: int, recipients: int, rate: float) -> None:
        """`recipients` for each fault's campaign; `rate` tasks a second."""
        self.hosts, self.collector = hosts, collector
        self.random = random.Random(seed)
        self.world = World(hosts, collector.mails, random.Random(seed))
        self.recipients, self.rate, self.seed = recipients, rate, seed
        # Never touched by a fault.
        self.front = next(name for name in hosts.groups["app"] if name not in hosts.groups["redis"])

    def series(self, count: int, names: Iterable[str] = ()) -> list[Fault]:
        """`count` faults in random order, each kind as often as the others."""
        known = [fault for fault in FAULTS if not names or fault.name in names]
        faults: list[Fault] = []
        while len(faults) < count:
            faults += self.random.sample(known, len(known))
        return faults[:count]

    def run(self, faults: list[Fault]) -> Outcome:
        """Break everything in turn, wait until all work is done or given up, and count."""
        producer = subprocess.Popen(
            ["ssh", "-F", SSH, self.front, f"hothouse-run python -m hothouse_faults {self.rate}"],
            stdout=subprocess.DEVNULL,
        )
        try:
            wait(lambda: self.collector.tasks.ends, "the first task", 60)
            spans = [self._break(number, fault) for number, fault in enumerate(faults)]
        finally:
            self.collector.tasks.stopping = True
            producer.wait(120)
        self._drain(spans)
        return self._count(spans)

    def _break(self, number: int, fault: Fault) -> Span:
        wait(self.hosts.healthy, "Redis and its Sentinels to be whole", 90)
        domain = f"fault{number}-{self.seed}.example.com"
        campaign = self._campaign(domain)
        wait(lambda: self._arrived(domain), "the first mail", 60)
        begin = time.monotonic()
        say(f"{number + 1:>3} {fault.name}")
        breaking = fault.inject(self.world)
        next(breaking)
        try:
            threading.Event().wait(fault.hold)
        finally:
            next(breaking, None)
        done = len(self.collector.tasks.ends)
        wait(lambda: len(self.collector.tasks.ends) > done, "work to go on", 90)
        return Span(fault, begin, time.monotonic(), campaign, domain)

    def _campaign(self, domain: str) -> str:
        rows = "\\n".join(["email,name", *(f"r{n}@{domain},R" for n in range(self.recipients))])
        answer = self.hosts.run(
            self.front,
            f"printf '{rows}\\n' | hothouse-run campaigns create --name faults --template welcome "
            "--sender news@example.com --recipients -",
        )
        return answer.split()[-1]

    def _arrived(self, domain: str) -> int:
        return sum(address.endswith(f"@{domain}") for address in list(self.collector.mails.delivered))

    def _report(self, campaign: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(
            self.hosts.run(self.front, f"hothouse-run campaigns show --json --limit 1000000 {campaign}")
        )
        return report

    def _drain(self, spans: list[Span]) -> None:
        """Until every campaign has ended, and until no task that was published is missing or it is too late for it."""
        tasks = self.collector.tasks
        for span in spans:
            wait(
                lambda span=span: self._report(span.campaign)["state"] == "finished",
                f"the end of the campaign during {span.fault.name}",
                300,
            )
        end = time.monotonic() + 2 * VISIBILITY_SECONDS
        while tasks.lost(0, float("inf")) and time.monotonic() < end:
            threading.Event().wait(0.5)

    def _count(self, spans: list[Span]) -> Outcome:
        rows: dict[str, Row] = defaultdict(Row)
        tasks = self.collector.tasks
        for span, later in zip(spans, [*spans[1:], None], strict=True):
            row = rows[span.fault.name]
            until = later.begin if later else float("inf")
            report = self._report(span.campaign)
            lost, doubled, ambiguous = self._mails(span, report)
            gone = tasks.lost(span.begin, until)
            row.injected += 1
            row.lost += len(lost) + len(gone)
            row.duplicated += len(doubled)
            row.ambiguous += ambiguous
            row.again += len(tasks.doubled(span.begin, until))
            row.seconds = max(row.seconds, tasks.pause(span.begin, span.end))
            row.stall = max(row.stall, tasks.stall(span.begin, until))
            row.details += [f"task {number} lost" for number in gone]
            row.details += [f"{address} got no mail and is not listed" for address in lost]
            row.details += [f"{address} got two mails and is not listed" for address in doubled]
        return Outcome(dict(rows), len(tasks.published), tasks.refused, self.recipients * len(spans))

    def _mails(self, span: Span, report: dict[str, Any]) -> tuple[list[str], list[str], int]:
        """Whom a campaign did not reach and whom it reached twice, if it does not say so; how many are ambiguous."""
        listed = {record["email"] for kind in ("ambiguous", "resent") for record in report.get(kind, [])}
        delivered = self.collector.mails.delivered
        everybody = [f"r{number}@{span.domain}" for number in range(self.recipients)]
        lost = [address for address in everybody if not delivered[address] and address not in listed]
        doubled = [address for address in everybody if delivered[address] > 1 and address not in listed]
        return lost, doubled, report["counts"].get("ambiguous", 0)


def table(outcome: Outcome) -> str:
    """The rows as text."""
    lines = [
        f"{'fault':<38}{'injected':>9}{'lost':>6}{'duplicated':>11}{'ambiguous':>10}{'run again':>10}"
        f"{'work after':>11}{'publish':>9}"
    ]
    for name, row in outcome.rows.items():
        lines.append(
            f"{name:<38}{row.injected:>9}{row.lost:>6}{row.duplicated:>11}{row.ambiguous:>10}{row.again:>10}"
            f"{row.seconds:>10.1f}s{row.stall:>8.1f}s"
        )
    lines.append(
        f"{outcome.published} tasks published, {len(outcome.refused)} refused, {outcome.recipients} recipients"
    )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
