"""A worker's stop takes the soft shutdown time and 15 seconds at most, and loses nothing, whatever its tasks do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Redis, wait_until
from hosts import celery, python, send
from test_hothouse_worker import Manager, manager, set_settings, shim, words
from trials import ENDS, ODD

__all__ = ("manager", "shim")

POOLS = ["prefork", "threads", "solo"]
# How long a stop may take beyond the soft shutdown time, in seconds.
MORE_SECONDS = 15


def stop(process: subprocess.Popen[Any], soft_seconds: float) -> float:
    """Stop a worker as systemd does; the seconds that it took."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(soft_seconds + MORE_SECONDS) == 0
    return time.monotonic() - began


def runs_of(file: Path) -> Counter[str]:
    return Counter(file.read_text().split()) if file.exists() else Counter()


@pytest.mark.parametrize("pool", POOLS)
def test_what_finishes_while_its_worker_stops_is_done_however_large_its_answer(
    shim: Redis, tmp_path: Path, pool: str
) -> None:
    set_settings(tmp_path, worker_soft_shutdown_timeout=20, worker_redirect_stdouts=True)
    log, runs = tmp_path / "worker.log", tmp_path / "runs"
    answers = [
        [str(runs), 1, how, size] for how in ("return", "raise", "print") for size in (200_000, 5_000_000)
    ]
    with celery(log, *words(pool), "--concurrency=6", REMAP_SIGTERM="SIGQUIT") as process:
        ids = send(*(("answer", answer) for answer in answers[: 3 if pool == "solo" else None]))
        running = 1 if pool == "solo" else len(ids)
        wait_until(lambda: sum(runs_of(runs).values()) == running)
        took = stop(process, 20)
    print(f"{pool}: stopped in {took:.1f} s")
    assert took < 10
    assert not shim.admin.exists("q:unacked", "q:unacked_index")
    assert shim.admin.llen("q:trials") == len(ids) - running
    text = log.read_text()
    assert text.count("event=succeeded") + text.count("event=failed") == running
    with celery(log, *words(pool)) as process:
        wait_until(lambda: not shim.admin.exists("q:trials", "q:unacked", "q:unacked_index"))
    assert runs_of(runs) == Counter(ids)


@pytest.mark.parametrize(
    ("pool", "how"),
    [(pool, how) for pool in POOLS for how in ("sleeps", "stubborn", "prints")] + [("prefork", "stopped")],
    ids=lambda value: value,
)
def test_what_does_not_finish_goes_back_at_once(shim: Redis, tmp_path: Path, pool: str, how: str) -> None:
    set_settings(tmp_path, worker_soft_shutdown_timeout=1, worker_redirect_stdouts=True)
    log, runs = tmp_path / "worker.log", tmp_path / "runs"
    with celery(log, *words(pool), REMAP_SIGTERM="SIGQUIT") as process:
        ids = send(*[("stay", [str(runs), how])] * 3)
        wait_until(lambda: sum(runs_of(runs).values()) == (1 if pool == "solo" else 2))
        took = stop(process, 1)
    print(f"{pool}, {how}: stopped in {took:.1f} s")
    assert not shim.admin.exists("q:unacked", "q:unacked_index", "q:deliveries")
    assert shim.admin.llen("q:trials") == len(ids)


@pytest.mark.parametrize("own_transport", [True, False], ids=["own", "kombu"])
@pytest.mark.parametrize("pool", POOLS)
def test_a_second_signal_ends_the_soft_shutdown_time_and_what_waits_for_its_time_goes_back(
    shim: Redis, manager: Manager, tmp_path: Path, pool: str, own_transport: bool
) -> None:
    set_settings(tmp_path, worker_soft_shutdown_timeout=60, hothouse_transport=own_transport)
    log, runs = tmp_path / "worker.log", tmp_path / "runs"
    with celery(log, *words(pool), REMAP_SIGTERM="SIGQUIT", **manager.environment) as process:
        later = "from hothouse_celery import app; app.tasks['trials.say'].apply_async(['it'], countdown=600)"
        assert not python("-c", later).returncode
        wait_until(lambda: log.exists() and "event=received" in log.read_text())
        send(("stay", [str(runs), "sleeps"]))
        wait_until(lambda: runs_of(runs))
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: manager.said("STOPPING=1"))
        stop(process, 0)
    assert not shim.admin.exists("q:unacked", "q:unacked_index")
    assert shim.admin.llen("q:trials") == 2


def test_a_stop_by_remote_control_has_the_same_limit(shim: Redis, tmp_path: Path) -> None:
    set_settings(tmp_path, worker_soft_shutdown_timeout=1)
    log, runs = tmp_path / "worker.log", tmp_path / "runs"
    with celery(log, *words()) as process:
        send(("stay", [str(runs), "sleeps"]))
        wait_until(lambda: runs_of(runs))
        assert not python("-c", "from hothouse_celery import app; app.control.shutdown()").returncode
        assert process.wait(1 + MORE_SECONDS) == 0
    assert not shim.admin.exists("q:unacked", "q:unacked_index")
    assert shim.admin.llen("q:trials") == 1


def test_processes_that_are_killed_while_they_answer_hold_no_worker(shim: Redis, tmp_path: Path) -> None:
    log, runs = tmp_path / "worker.log", tmp_path / "runs"
    with celery(log, *words(), REMAP_SIGTERM="SIGQUIT") as process:
        ids = send(*[("answer", [str(runs), 0, "raise", 5_000_000])] * 20)
        for number in range(1, 9):
            wait_until(lambda least=number: sum(runs_of(runs).values()) > least)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children[: 1 + number % 2]:
                os.kill(int(child), signal.SIGKILL)
        wait_until(lambda: not shim.admin.exists("q:trials", "q:unacked", "q:unacked_index"), 60)
        assert process.poll() is None
        stop(process, 0)
    assert set(runs_of(runs)) == set(ids)


@pytest.mark.parametrize("pool", POOLS)
def test_what_cannot_be_told_ends_and_holds_no_worker(shim: Redis, tmp_path: Path, pool: str) -> None:
    """Neither is lost what comes after it."""
    options = json.loads((tmp_path / "celery.json").read_text())["broker_transport_options"]
    set_settings(
        tmp_path,
        result_backend=shim.admin_url,
        broker_transport_options=options | {"max_deliveries": 2},
    )
    log = tmp_path / "worker.log"
    kinds = [("odd", [kind]) for kind in ODD] + [("give_up", ["exit"]), ("give_up", ["interrupt"])]
    with celery(log, *words(pool), REMAP_SIGTERM="SIGQUIT") as process:
        send(*kinds, ("say", ["after it"]))
        wait_until(lambda: not shim.admin.exists("q:trials", "q:unacked", "q:unacked_index"), 60)
        assert process.poll() is None
        stop(process, 0)
    assert "said after it" in log.read_text()
    # Only what ended its process, or cannot be read outside of it, was run again.
    tasks = {json.loads(entry)["task"] for entry in shim.admin.lrange("q:dead-letter", 0, -1)}
    assert tasks == {"trials.odd" if pool == "prefork" else "trials.give_up"}
    shim.admin.delete(*shim.admin.keys("celery-task-meta-*"))


HOOKS = """
from hothouse_celery import app
app.tasks['trials.hang'].apply_async(link_error=app.tasks['trials.errback'].s())
for kind in ('exit', 'value'): app.tasks['trials.hang_hooked'].delay(kind)
"""


@pytest.mark.parametrize("pool", POOLS)
def test_what_ends_whoever_handles_it_ends_no_worker_and_counts(
    shim: Redis, tmp_path: Path, pool: str
) -> None:
    """Whether it is raised as such, by an exception that is read or shown, or by what Celery calls after a task."""
    options = json.loads((tmp_path / "celery.json").read_text())["broker_transport_options"]
    set_settings(tmp_path, broker_transport_options=options | {"max_deliveries": 1})
    log = tmp_path / "worker.log"
    ends = [[how, end] for how in ("raised", "read", "becomes", "shown") for end in range(len(ENDS))]
    with celery(log, *words(pool), "--concurrency=8", REMAP_SIGTERM="SIGQUIT") as process:
        send(*(("end", list(end)) for end in ends), ("deny", ["no class"]), ("deny", ["no attributes"]))
        if pool == "prefork":  # a hard time limit, after which the worker's main process calls hooks
            assert not python("-c", HOOKS).returncode
        send(*[("say", ["after it"])] * len(ends))
        wait_until(
            lambda: (
                process.poll() is not None
                or not shim.admin.exists("q:trials", "q:unacked", "q:unacked_index")
            ),
            60,
        )
        assert process.poll() is None
        stop(process, 0)
    text = log.read_text()
    assert text.count("ready.") == 1 and text.count("said after it") == len(ends)
    reasons = [json.loads(entry)["reason"] for entry in shim.admin.lrange("q:dead-letter", 0, -1)]
    after = set(re.findall(r"What follows (trials.hang\w*)", text))
    assert after == ({"trials.hang", "trials.hang_hooked"} if pool == "prefork" else set())
    assert len(reasons) >= 2 and all("its process died in each of 1 runs" in reason for reason in reasons)


def test_a_process_that_is_killed_while_its_worker_stops_counts(shim: Redis, tmp_path: Path) -> None:
    set_settings(tmp_path, worker_soft_shutdown_timeout=20)
    log, runs, others = tmp_path / "worker.log", tmp_path / "runs", tmp_path / "others"
    with celery(log, *words(), REMAP_SIGTERM="SIGQUIT") as process:
        send(("answer", [str(runs), 1, "killed", 0]), ("answer", [str(others), 2, "return", 1]))
        wait_until(lambda: runs_of(runs) and runs_of(others))
        stop(process, 20)
    [count] = shim.admin.hvals("q:deliveries")
    assert (count, shim.admin.llen("q:trials")) == ("1", 1)
    assert not shim.admin.exists("q:unacked", "q:unacked_index")
    assert log.read_text().count("event=succeeded") == 1


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_stops_in_time_although_no_one_reads_its_log(shim: Redis, tmp_path: Path, pool: str) -> None:
    set_settings(tmp_path, worker_soft_shutdown_timeout=1)
    runs, log = tmp_path / "runs", tmp_path / "log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    with celery(log, *words(pool), REMAP_SIGTERM="SIGQUIT") as process:
        ids = send(*[("answer", [str(runs), 0.1, "print", 200_000])] * 3)
        wait_until(lambda: runs_of(runs))
        took = stop(process, 1)
    os.close(reader)
    print(f"{pool}: stopped in {took:.1f} s")
    assert not shim.admin.exists("q:unacked", "q:unacked_index")
    assert shim.admin.llen("q:trials") == len(ids)


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_stops_in_time_although_redis_does_not_answer(
    shim: Redis, tmp_path: Path, pool: str
) -> None:
    set_settings(tmp_path, worker_soft_shutdown_timeout=1)
    log, runs = tmp_path / "worker.log", tmp_path / "runs"
    with celery(log, *words(pool), REMAP_SIGTERM="SIGQUIT") as process:
        send(("stay", [str(runs), "sleeps"]))
        wait_until(lambda: runs_of(runs))
        shim.pause()
        try:
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(1 + MORE_SECONDS)
            print(f"{pool}: stopped in {time.monotonic() - began:.1f} s")
        finally:
            shim.go_on()
    assert shim.admin.hlen("q:unacked") + shim.admin.llen("q:trials") == 1
