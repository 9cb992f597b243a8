"""Beat: however many hosts run it, exactly one schedules, and when that one is gone another does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Stack

pytestmark = pytest.mark.scenarios("staging", "prod")

# RedBeat's lock of 30 s and one loop of 5 s.
HANDOVER_SECONDS = 35


def slots(stack: Stack, host: str, since: str) -> list[str]:
    """What the beat of a host has sent since a time, a line per task."""
    journal = stack.host(host).check_output(
        f"journalctl -u celery-beat -o short-unix --no-pager --since=@{since}"
    )
    return re.findall(r"^.*Sending due task.*$", journal, re.MULTILINE)


def now(stack: Stack) -> str:
    return stack.first("beat").check_output("date +%s.%6N")


def test_exactly_one_beat_schedules(stack: Stack, wait: Callable[..., Any]) -> None:
    since = now(stack)
    hosts = stack.group("beat")
    wait(lambda: sum(len(slots(stack, host, since)) for host in hosts) >= 4, "four scheduled tasks", 60)
    assert len([host for host in hosts if slots(stack, host, since)]) == 1


def test_another_beat_takes_over_when_the_first_is_killed(stack: Stack, wait: Callable[..., Any]) -> None:
    """With one beat host it is systemd that starts the next one."""
    since = now(stack)
    hosts = stack.group("beat")
    first = wait(lambda: next((host for host in hosts if slots(stack, host, since)), None), "a schedule", 60)
    assert "redbeat::lock" in stack.redis("KEYS", "redbeat*")
    others = [host for host in hosts if host != first]
    stack.host(first).check_output("systemctl kill --signal=KILL celery-beat")
    try:
        if others:
            stack.host(first).check_output("systemctl stop celery-beat")
        since = now(stack)
        wait(
            lambda: any(slots(stack, host, since) for host in others or [first]),
            "the schedule to go on",
            HANDOVER_SECONDS + 5,  # what one look at the journals takes
        )
    finally:
        # The counter of restarts, which other tests read, begins anew.
        stack.host(first).check_output("systemctl stop celery-beat && systemctl start celery-beat")
