"""What the deployment adds to workers: what kills them is put aside, and one that is deaf is restarted."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Redis, wait_until
from hosts import celery, python, send, set_up
from proxy import Proxy

RUNS = 4
KEYS = ["q:trials", "q:dead-letter", "q:unacked", "q:unacked_index", "q:deliveries"]


@pytest.fixture
def shim(redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """The environment of a unit that retries tasks as a deployment does, with empty queues."""
    options = {
        "global_keyprefix": "q:",
        "visibility_timeout": 6,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        "socket_timeout": 5,
        "socket_connect_timeout": 3,
    }
    set_up(
        monkeypatch,
        tmp_path,
        redis_server.admin_url,
        hothouse_transport=True,
        task_retry_on_worker_lost=True,
        broker_connection_retry_on_startup=True,
        broker_transport_options=options,
    )
    redis_server.admin.delete(*KEYS)
    yield redis_server
    redis_server.admin.delete(*KEYS)


@pytest.fixture
def run(shim: Redis, tmp_path: Path) -> Callable[..., int]:
    """Run a task that kills by a plan, restarting the worker as systemd does, until then; its runs."""

    def run(plan: list[str], until: Callable[[], Any]) -> int:
        runs, log = tmp_path / "runs", tmp_path / "worker.log"
        runs.touch()
        if not shim.admin.llen("q:trials"):
            send(("kill", [str(runs), plan]))
        words = ["worker", "--concurrency=1", "--loglevel=INFO", "--without-gossip", "--without-mingle"]

        def ended() -> bool:
            with celery(log, *words) as process:
                wait_until(lambda: until() or process.poll() is not None, 40)
                return bool(until())

        wait_until(ended, 120)
        return len(runs.read_text().splitlines())

    return run


@pytest.mark.parametrize(
    "plan",
    [["child"], ["worker"], ["child", "worker", "child", "worker"], ["worker", "worker", "child"]],
    ids=lambda plan: "-".join(plan),
)
def test_what_kills_runs_four_times_and_is_then_put_aside(
    shim: Redis, run: Callable[..., int], plan: list[str]
) -> None:
    assert run(plan, lambda: shim.admin.llen("q:dead-letter")) == RUNS
    [letter] = (json.loads(entry) for entry in shim.admin.lrange("q:dead-letter", 0, -1))
    assert (letter["task"], letter["queue"], letter["deliveries"]) == ("trials.kill", "trials", RUNS)
    wait_until(lambda: not shim.admin.exists("q:trials", "q:unacked", "q:unacked_index", "q:deliveries"))


def test_a_task_that_recovers_is_not_put_aside(shim: Redis, run: Callable[..., int], tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    assert run(["child", "child", "child", ""], lambda: "event=succeeded" in log.read_text()) == RUNS
    assert not shim.admin.exists("q:dead-letter", "q:deliveries")


def test_dead_letters_are_listed_put_back_and_dropped(
    shim: Redis, run: Callable[..., int], tmp_path: Path
) -> None:
    def letters(*words: str) -> str:
        done = python("-m", "hothouse_celery", "dead-letters", *words)
        assert not done.returncode, done.stderr
        return done.stdout

    run(["child"], lambda: shim.admin.llen("q:dead-letter"))
    [letter] = map(json.loads, letters("--json").splitlines())
    assert letters().startswith(f"{letter['id']} ")
    assert "trials.kill queue=trials runs=4" in letters()
    assert letters("--requeue", letter["id"]) == f"{letter['id']}\n"
    assert (shim.admin.llen("q:dead-letter"), shim.admin.llen("q:trials")) == (0, 1)
    assert run(["child"], lambda: shim.admin.llen("q:dead-letter")) == 2 * RUNS
    assert letters("--drop", "--all") == f"{letter['id']}\n"
    assert not shim.admin.exists("q:dead-letter", "q:trials")
    assert python("-m", "hothouse_celery", "dead-letters", "--drop", "nobody").returncode == 1
    assert python("-m", "hothouse_celery", "dead-letters", "--requeue").returncode == 2


class Manager:
    """What systemd hears from a unit of Type=notify."""

    def __init__(self, folder: Path, watchdog_seconds: float) -> None:
        self.seconds = watchdog_seconds
        self.address = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.setblocking(False)
        self.heard: list[tuple[float, str]] = []

    @property
    def environment(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": str(int(self.seconds * 1e6))}

    def said(self, state: str, since: float = 0) -> float | None:
        """When the unit first said so, after a moment."""
        try:
            while True:
                self.heard.append((time.monotonic(), self._socket.recv(4096).decode()))
        except BlockingIOError:
            pass
        return next((at for at, text in self.heard if text == state and at >= since), None)

    def silent(self, seconds: float) -> bool:
        """Whether the watchdog's time has passed, so that systemd would restart the unit."""
        self.said("")
        last = [at for at, text in self.heard if text in ("READY=1", "WATCHDOG=1")][-1]
        return time.monotonic() - last > seconds


@pytest.fixture
def manager(tmp_path: Path) -> Manager:
    return Manager(tmp_path, 12)


@pytest.fixture
def proxy(shim: Redis, tmp_path: Path) -> Iterator[Proxy]:
    """Between the worker and Redis."""
    proxy = Proxy(shim.admin.connection_pool.connection_kwargs["port"])
    credential = tmp_path / "broker_url"
    credential.write_text(credential.read_text().replace(f":{proxy.target}/", f":{proxy.port}/"))
    yield proxy
    proxy.close()


def words(pool: str = "prefork") -> list[str]:
    return [
        "worker",
        f"--pool={pool}",
        "--concurrency=2",
        "--loglevel=INFO",
        "--without-gossip",
        "--without-mingle",
    ]


@pytest.mark.parametrize(
    ("pool", "own_transport"), [("prefork", True), ("threads", True), ("prefork", False)], ids=str
)
def test_a_worker_whose_consumer_hangs_has_itself_restarted(
    shim: Redis, manager: Manager, tmp_path: Path, pool: str, own_transport: bool
) -> None:
    settings = tmp_path / "celery.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"hothouse_transport": own_transport}))
    with celery(tmp_path / "worker.log", *words(pool), **manager.environment):
        wait_until(lambda: manager.said("WATCHDOG=1"))
        began = time.monotonic()
        send(("stop_consumer", []))
        told = wait_until(lambda: manager.said("WATCHDOG=trigger"), 2 * manager.seconds)
    assert manager.seconds / 2 < told - began < manager.seconds * 1.5
    assert "takes no tasks and has to be restarted" in (tmp_path / "worker.log").read_text()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_whose_connection_is_dead_takes_tasks_again_without_a_restart(
    proxy: Proxy, tmp_path: Path, pool: str
) -> None:
    manager, log = Manager(tmp_path, 30), tmp_path / "worker.log"  # as in the unit
    with celery(log, *words(pool), **manager.environment):
        wait_until(lambda: manager.said("WATCHDOG=1"))
        assert proxy.freeze()
        began = time.monotonic()
        send(("say", ["after it"]))
        wait_until(lambda: "event=succeeded" in log.read_text(), 60)
        print(f"deaf for {time.monotonic() - began:.1f} s ({pool})")
        assert not manager.said("WATCHDOG=trigger") and not manager.silent(manager.seconds)


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "silent"])
def test_a_worker_is_not_restarted_while_redis_is_away(
    proxy: Proxy, manager: Manager, tmp_path: Path, silent: bool
) -> None:
    log = tmp_path / "worker.log"
    with celery(log, *words(), **manager.environment):
        wait_until(lambda: manager.said("WATCHDOG=1"))
        if silent:
            proxy.freeze(new=True)
        else:
            proxy.cut()
        away = time.monotonic()
        while time.monotonic() < away + 2 * manager.seconds:
            wait_until(lambda: manager.said("WATCHDOG=1", time.monotonic() - 1), manager.seconds * 0.7)
        proxy.mend()
        back = time.monotonic()
        send(("say", ["after it"]))
        wait_until(lambda: "event=succeeded" in log.read_text(), 30)
        print(f"consumed again after {time.monotonic() - back:.1f} s")
        assert not manager.said("WATCHDOG=trigger") and not manager.silent(manager.seconds)


def test_a_worker_that_stops_by_itself_is_not_hurried_by_the_watchdog(
    shim: Redis, manager: Manager, tmp_path: Path
) -> None:
    with celery(tmp_path / "worker.log", *words(), **manager.environment) as process:
        wait_until(lambda: manager.said("WATCHDOG=1"))
        os.kill(process.pid, 15)
        assert process.wait(20) == 0
    assert manager.said("STOPPING=1")
