"""Every kind of fault once: nothing is lost, nothing is doubled that is not listed, and work goes on in time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks/faults"))

import control
from catalogue import FAULTS, Fault
from collector import Collector
from hosts import Hosts, wait
from trial import MAIL_PORT, TASKS_PORT, VISIBILITY_SECONDS, Outcome, Trial, table

SEED, RECIPIENTS, RATE = 1, 100, 30.0
FAILOVER_SECONDS = {"primary and a Sentinel frozen": 15.0}
MOST_RUNS = 4
NAMES = [fault.name for fault in FAULTS]


@pytest.fixture(scope="module")
def hosts() -> Hosts:
    return Hosts()


@pytest.fixture(scope="module")
def collector(hosts: Hosts) -> Iterator[Collector]:
    with Collector(hosts.gateway, TASKS_PORT, MAIL_PORT) as running:
        yield running


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints figures also when all is well, which pytest would keep to itself."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def show(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", flush=True)

    return show


@pytest.fixture(scope="module")
def outcome(hosts: Hosts, collector: Collector, report: Callable[[str], None]) -> Outcome:
    trial = Trial(hosts, collector, SEED, RECIPIENTS, RATE)
    found = trial.run(trial.series(len(FAULTS)))
    report(table(found))
    return found


def test_redis_grew_from_one_host_to_three_and_kept_what_was_queued(hosts: Hosts) -> None:
    """prepare.yml deployed Redis on one host and published these before the scenario converged with three."""
    assert hosts.healthy()
    kept = hosts.run(hosts.primary(), "hothouse-redis-cli LRANGE q:kept 0 -1").splitlines()
    assert [json.loads(message)["headers"]["argsrepr"] for message in reversed(kept)] == [
        f"[{number}, 0]" for number in range(500)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_and_nothing_doubled_that_is_not_listed(outcome: Outcome, name: str) -> None:
    row = outcome.rows[name]
    assert row.injected == 1
    assert (row.lost, row.duplicated) == (0, 0), row.details


def test_every_fault_was_injected_and_mended(outcome: Outcome) -> None:
    assert outcome.problems == []
    assert [name for name, row in outcome.rows.items() if not row.to_send] == [], "no mail was on its way"


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_no_more_recipients_are_in_doubt_than_there_is_reason_for(outcome: Outcome, fault: Fault) -> None:
    assert outcome.rows[fault.name].ambiguous <= fault.doubtful


@pytest.mark.parametrize("name", [fault.name for fault in FAULTS if fault.failover])
def test_work_goes_on_soon_after_the_primary_is_lost(outcome: Outcome, name: str) -> None:
    assert outcome.rows[name].seconds <= FAILOVER_SECONDS.get(name, 10.0)


def test_no_producer_gets_an_error_or_waits_long(outcome: Outcome) -> None:
    assert outcome.published > 1000
    assert outcome.refused == {}
    assert {name: row.stall for name, row in outcome.rows.items() if row.stall > 10} == {}


def test_the_tasks_of_a_host_without_power_are_run_elsewhere_in_time(
    hosts: Hosts, collector: Collector, outcome: Outcome, report: Callable[[str], None]
) -> None:
    tasks = collector.tasks
    host = next(name for name in hosts.groups["worker"] if name != hosts.primary())
    tasks.stopping = False
    numbers = range(10_000_000, 10_000_009)
    control.publish(hosts, "faults.note", [[number, 8] for number in numbers])
    wait(
        lambda: any(where == host for n in numbers for _, where in tasks.starts.get(n, [])),
        "a task there",
        60,
    )
    hosts.power_off(host)
    cut = time.monotonic()
    theirs = [n for n in numbers if any(where == host for _, where in tasks.starts.get(n, []))]
    theirs = [n for n in theirs if n not in tasks.ends]
    assert theirs
    try:
        wait(
            lambda: all(any(at > cut for at, _ in tasks.starts[n]) for n in theirs),
            f"the redelivery of {theirs}",
            VISIBILITY_SECONDS + 10,
        )
        report(f"redelivered after {time.monotonic() - cut:.1f} s")
    finally:
        hosts.power_on(host)
    wait(lambda: all(n in tasks.ends for n in numbers), "their end", 60)
    wait(hosts.healthy, "Redis and its Sentinels to be whole", 90)


@pytest.mark.parametrize("victim", ["child", "worker"])
def test_a_task_that_kills_whoever_runs_it_ends_in_the_dead_letter_list(
    hosts: Hosts, collector: Collector, outcome: Outcome, victim: str
) -> None:
    number = {"child": 20_000_000, "worker": 20_000_001}[victim]
    control.publish(hosts, "faults.poison", [[number, victim]])
    primary = hosts.primary()
    before = int(hosts.run(primary, "hothouse-redis-cli LLEN q:dead-letter"))
    wait(
        lambda: int(hosts.run(primary, "hothouse-redis-cli LLEN q:dead-letter")) > before,
        "the dead letter",
        (VISIBILITY_SECONDS + 10) * MOST_RUNS,
    )
    assert len(collector.tasks.starts[number]) == MOST_RUNS


def test_the_settings_that_celery_comes_with_lose_tasks(
    hosts: Hosts, collector: Collector, report: Callable[[str], None]
) -> None:
    """The control: if this loses nothing either, the tests above prove nothing."""
    lost = control.run(hosts, collector.tasks, kills=5, visibility=VISIBILITY_SECONDS)
    report(f"stock settings and transport: {lost} of {control.COUNT} tasks lost")
    assert lost > 0
