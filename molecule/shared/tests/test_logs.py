"""The journal: one line of logfmt per event of a task, found by campaign or task, and no more of it than is meant."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Stack
from test_campaign import create, fresh_domain, show

pytestmark = pytest.mark.scenarios("local", "staging", "prod")

PAIR = r'([A-Za-z_][\w.-]*)=("(?:[^"\\]|\\.)*"|[^\s"=\\]+)'
LINE = re.compile(rf"{PAIR}(?: {PAIR})*")
PRIORITIES = {"debug": "7", "info": "6", "warning": "4", "error": "3", "critical": "2"}

Line = dict[str, str]


def parse(text: str) -> Line:
    """The values of a line of logfmt."""
    assert LINE.fullmatch(text), f"not logfmt: {text[:300]!r}"
    return {key: json.loads(value) if value[0] == '"' else value for key, value in re.findall(PAIR, text)}


def records(stack: Stack, host: str, *options: str) -> list[dict[str, Any]]:
    """What the workers and beat of a host have written to the journal, as it keeps it."""
    stack.host(host).check_output("journalctl --sync")
    written = stack.host(host).run(
        "journalctl --all --output=json --identifier=celery --unit='celery-worker@*' --unit=celery-beat "
        + " ".join(options)
    )
    return [json.loads(line) for line in written.stdout.splitlines() if line.startswith("{")]


def everywhere(stack: Stack, *options: str) -> list[Line]:
    """The lines of all hosts with these options of journalctl, taken apart."""
    hosts = sorted({*stack.group("worker"), *stack.group("beat")})
    return [parse(record["MESSAGE"]) for host in hosts for record in records(stack, host, *options)]


@pytest.fixture(scope="module")
def campaign(stack: Stack) -> tuple[str, int, str]:
    """A campaign that was sent: its id, its size and when it began (Unix time)."""
    host, domain, size = stack.first("app"), fresh_domain("logged"), 120
    since = host.check_output("date +%s.%6N")
    return create(host, "logged", [f"reader{n}@{domain}" for n in range(size)]), size, since


@pytest.fixture
def finished(stack: Stack, wait: Callable[..., Any], campaign: tuple[str, int, str]) -> tuple[str, int, str]:
    wait(lambda: show(stack.first("app"), campaign[0])["state"] == "finished", "the end", 120)
    return campaign


def test_every_record_of_workers_and_beat_is_one_line_of_logfmt_with_its_priority(
    stack: Stack, finished: tuple[str, int, str]
) -> None:
    _, _, since = finished
    for noun, events in (("worker", {"received", "batch", "succeeded"}), ("beat", {"log"})):
        found = set()
        for host in stack.group(noun):
            for record in records(stack, host, f"--since=@{since}"):
                line = parse(record["MESSAGE"])
                assert list(line)[:2] == ["level", "event"], line
                assert record["PRIORITY"] == PRIORITIES[line["level"]], line
                assert record.get("_LINE_BREAK") != "line-max", line
                found.add(line["event"])
        assert events <= found, noun


def test_the_id_of_a_campaign_finds_every_line_of_its_batches(
    stack: Stack, finished: tuple[str, int, str]
) -> None:
    campaign, size, since = finished
    lines = everywhere(stack, f"--since=@{since}", f"--grep={campaign}")
    batches = {line["id"]: line for line in lines if line["event"] == "batch"}
    assert sum(int(line["sent"]) for line in batches.values()) == size
    assert {line["campaign"] for line in batches.values()} == {campaign}
    for task in batches:
        mine = [line for line in lines if line["id"] == task]
        assert sorted(line["event"] for line in mine) == ["batch", "received", "succeeded"]
        assert {line["task"] for line in mine} == {"campaigns.tasks.send_batch"}
        assert everywhere(stack, f"--since=@{since}", f"--grep={task}") == mine


def test_a_failing_task_is_one_line_with_its_whole_traceback_at_the_priority_of_an_error(
    stack: Stack, wait: Callable[..., Any]
) -> None:
    code = "import hothouse_celery as h; print(h.app.send_task('hothouse.ping', ['nobody']).id)"
    task = stack.first("app").check_output(f'hothouse-run python -c "{code}"')
    [line] = wait(lambda: everywhere(stack, "--priority=err", f"--grep={task}"), "the failure")
    assert (line["event"], line["level"], line["id"]) == ("failed", "error", task)
    assert line["exception"].startswith("TypeError(")
    assert "nobody" in line["args"]
    assert line["traceback"].startswith("Traceback (most recent call last):\n")
    assert line["traceback"].splitlines()[-1].startswith("TypeError: ")


def test_the_journal_is_bounded_in_size_and_time(stack: Stack) -> None:
    """The defaults of the role prepare, the last word of all of journald's files, and read by the running one."""
    for name in stack.variables:
        host = stack.host(name)
        configured = host.check_output("systemd-analyze cat-config systemd/journald.conf")
        settings = dict(re.findall(r"^(\w+)=(.*)$", configured, re.MULTILINE))
        assert (settings["SystemMaxUse"], settings["MaxRetentionSec"]) == ("1G", "30day"), name
        assert settings["Storage"] == "persistent", name
        written = host.check_output("stat --format=%Z /etc/systemd/journald.conf.d/hothouse.conf")
        started = host.check_output(
            'date --date="$(systemctl show --value -p ExecMainStartTimestamp systemd-journald)" +%s'
        )
        assert int(started) >= int(written), name


def test_the_journal_outlives_a_reboot(stack: Stack) -> None:
    """Each host was rebooted before these tests: its oldest line is older than the present run of systemd."""
    for name in stack.variables:
        host = stack.host(name)
        oldest = float(host.check_output("journalctl --quiet --output=short-unix | head -n 1").split()[0])
        booted = host.check_output("systemctl show --timestamp=unix --value --property=UserspaceTimestamp")
        assert oldest < int(booted.removeprefix("@")), name
