"""What is killed, frozen, full or demoted: real workers lose nothing, and with kombu's own transport they do."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from conftest import Notebook, Proxy, Server, Worker, publisher, running, wait_until

KILLS, TASKS = int(os.environ.get("TEST_KILLS", "40")), int(os.environ.get("TEST_TASKS", "4000"))


@pytest.mark.parametrize("scheme", ["hothouse", "redis"])
def test_a_worker_that_is_killed_right_after_taking_a_message_loses_it_only_with_kombus_own_transport(
    scheme: str,
    server: Server,
    notebook: Notebook,
    proxy: Proxy,
    start_worker: Callable[..., Worker],
    publish: Callable[..., None],
) -> None:
    user = "worker" if scheme == "hothouse" else "default"
    url = (
        server.url("worker", scheme, proxy.port) if user == "worker" else f"redis://127.0.0.1:{proxy.port}/0"
    )
    worker = start_worker(server, url)
    # From the moment on at which Redis hands the message out, nothing that the worker says arrives.
    proxy.hold_after = b"tasks.note"
    publish([1])
    assert proxy.holding.wait(10)
    worker.kill()
    taken = server.admin.zcard("q:unacked_index") + server.admin.llen("q:one")
    assert taken == (1 if scheme == "hothouse" else 0)
    if scheme == "hothouse":
        start_worker(server)
        wait_until(lambda: notebook.done() == {1: 1})


def test_no_task_is_lost_however_often_workers_are_killed(
    server: Server, notebook: Notebook, start_worker: Callable[..., Worker], publish: Callable[..., None]
) -> None:
    import multiprocessing

    import tasks

    def work() -> None:
        # Forked from here, a worker is there in a moment; it is Celery's own all the same.
        os.setsid()
        tasks.app.conf.broker_url = server.url()
        tasks.notes.connection_pool = redis.ConnectionPool.from_url(notebook.url)
        arguments = ["-Q", "one,two", "-P", "threads", "-c", "4", "-l", "ERROR"]
        tasks.app.worker_main(
            ["worker", *arguments, "--without-gossip", "--without-mingle", "--without-heartbeat"]
        )

    fork = multiprocessing.get_context("fork")
    for queue in ("one", "two"):
        publish(range(TASKS // 2) if queue == "one" else range(TASKS // 2, TASKS), queue)
    kills = 0
    while kills < KILLS:
        worker = fork.Process(target=work)
        worker.start()
        before = len(notebook.done())
        # Killed while it works, at another moment each time.
        wanted = min(before + 10 + 7 * (kills % 9), TASKS)
        wait_until(lambda: len(notebook.done()) >= wanted or server.admin.llen("q:one") == 0)  # noqa: B023
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        kills += 1
    start_worker(server, queues="one,two", concurrency=8)
    wait_until(lambda: len(notebook.done()) == TASKS, 60)
    assert sum(notebook.done().values()) < TASKS * 1.2, "and few ran twice"
    wait_until(lambda: not server.admin.exists("q:unacked", "q:unacked_index", "q:one", "q:two"))


def test_a_task_that_takes_its_worker_along_ends_among_the_dead_letters(
    server: Server, notebook: Notebook, start_worker: Callable[..., Worker], publish: Callable[..., None]
) -> None:
    import tasks

    options = {"visibility_timeout": 1, "max_deliveries": 3}
    publish([1], task=tasks.kill_worker)
    for _ in range(3):
        worker = start_worker(server, options=options, wait=False, TEST_POOL="threads")
        worker.process.wait(20)
    start_worker(server, options=options)
    [letter] = wait_until(server.dead_letters)
    publish([2])
    wait_until(lambda: notebook.done() == {2: 1})
    assert letter["task"] == "tasks.kill_worker"
    assert letter["queue"] == letter["routing_key"] == "one"
    assert letter["deliveries"] == 3
    assert letter["message"]["headers"]["id"] == letter["id"]
    assert letter["reason"] == "its consumers vanished"
    assert abs(letter["time"] - time.time()) < 60
    assert notebook.client.get("killed") == "3"
    assert not server.admin.exists("q:deliveries", "q:unacked", "q:unacked_index")


def test_a_task_that_survives_a_vanished_worker_leaves_no_count_behind(
    server: Server, notebook: Notebook, start_worker: Callable[..., Worker], publish: Callable[..., None]
) -> None:
    worker = start_worker(server, options={"visibility_timeout": 1})
    publish([1], seconds=2)
    wait_until(lambda: notebook.started())
    worker.kill()
    start_worker(server, options={"visibility_timeout": 1})
    wait_until(lambda: server.admin.hvals("q:deliveries") == ["1"])
    wait_until(lambda: notebook.done().get(1))
    wait_until(lambda: not server.admin.exists("q:deliveries", "q:unacked"))
    assert server.dead_letters() == []


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_what_a_worker_that_lives_holds_for_long_is_run_once(
    pool: str,
    server: Server,
    notebook: Notebook,
    start_worker: Callable[..., Worker],
    publish: Callable[..., None],
) -> None:
    options = {"visibility_timeout": 3, "max_deliveries": 2}
    workers = [start_worker(server, pool=pool, options=options) for _ in range(2)]
    publish([1], countdown=10)
    publish([2], seconds=8)
    wait_until(lambda: notebook.started() == [2])
    held = server.admin.zrange("q:unacked_index", 0, -1)
    assert len(held) == 2
    while not notebook.done().get(1):
        # Both are noted all the time, so neither is ever in the queue.
        assert server.admin.llen("q:one") == 0 and not server.admin.exists("q:deliveries", "q:dead-letter")
        time.sleep(0.05)
    wait_until(lambda: not server.admin.exists("q:unacked", "q:unacked_index"))
    time.sleep(1)
    assert notebook.done() == {1: 1, 2: 1} and notebook.started() == [2]
    assert server.admin.zcard("q:unacked_index") == server.admin.llen("q:one") == 0
    assert not any("vanished" in worker.text() or "Traceback" in worker.text() for worker in workers)


def test_what_a_worker_holds_comes_back_when_its_loop_stands_still(
    server: Server, notebook: Notebook, start_worker: Callable[..., Worker], publish: Callable[..., None]
) -> None:
    hung = start_worker(server)
    publish([1], seconds=6)
    wait_until(lambda: notebook.started() == [1])
    hung.process.send_signal(signal.SIGSTOP)
    start_worker(server)
    wait_until(lambda: notebook.started() == [1, 1])
    assert server.admin.hvals("q:deliveries") == ["1"]
    hung.process.send_signal(signal.SIGCONT)
    wait_until(lambda: notebook.done() == {1: 2})
    wait_until(lambda: not server.admin.exists("q:unacked", "q:unacked_index", "q:one"))


@pytest.mark.parametrize("scheme", ["hothouse", "redis"])
def test_a_worker_whose_clock_is_ahead_gives_back_too_early_only_with_kombus_own_transport(
    scheme: str,
    server: Server,
    notebook: Notebook,
    start_worker: Callable[..., Worker],
    publish: Callable[..., None],
) -> None:
    options = {"visibility_timeout": 600}
    url = server.url() if scheme == "hothouse" else f"redis://127.0.0.1:{server.port}/0"
    start_worker(server, url, options=options, concurrency=1)
    publish([1], seconds=5)
    wait_until(lambda: notebook.started())
    ahead = start_worker(server, url, options=options, TEST_CLOCK="3600")
    publish([2])
    wait_until(lambda: 2 in notebook.done())
    command = "cmdstat_zrangebyscore" if scheme == "hothouse" else "cmdstat_zrange"

    def looked() -> int:
        return int(server.admin.info("commandstats").get(command, {"calls": 0})["calls"])

    before = looked()
    wait_until(lambda: looked() > before + 3)
    assert notebook.started() == ([1] if scheme == "hothouse" else [1, 1])
    ahead.kill()


def test_what_a_worker_hands_back_at_its_stop_is_no_failed_delivery(
    server: Server, notebook: Notebook, start_worker: Callable[..., Worker], publish: Callable[..., None]
) -> None:
    worker = start_worker(
        server, pool="prefork", options={"visibility_timeout": 600}, REMAP_SIGTERM="SIGQUIT"
    )
    publish(range(6), seconds=60)
    wait_until(lambda: len(notebook.started()) == 2)
    worker.process.send_signal(signal.SIGTERM)
    worker.process.wait(20)
    assert server.admin.llen("q:one") == 6
    assert not server.admin.exists("q:unacked", "q:unacked_index", "q:deliveries")
    assert "Traceback" not in worker.text()


def test_a_full_memory_stops_no_worker_and_loses_nothing(
    tmp_path: Path, notebook: Notebook, start_worker: Callable[..., Worker]
) -> None:
    with running(tmp_path / "full", "maxmemory-policy noeviction") as server:
        admin, publish = server.admin, publisher(server)
        worker = start_worker(server, concurrency=4)
        for first in range(0, 500, 100):
            publish(range(first, first + 100))
            admin.config_set("maxmemory", 1)
            with pytest.raises(Exception, match="OOM"):
                publish([1000], retries=1)
            # What is queued is taken and acknowledged all the same, and makes room.
            wait_until(lambda: len(notebook.done()) == first + 100 and not admin.exists("q:unacked"))  # noqa: B023
            admin.config_set("maxmemory", 0)
        # Who publishes meanwhile, on a new connection and as `delay` does it, waits and gets no error.
        admin.config_set("maxmemory", 1)
        freed = threading.Timer(2.5, admin.config_set, ["maxmemory", 0])
        freed.start()
        publisher(server)([1001], queue="one")
        assert not freed.is_alive(), "it was published when there was room again"
        wait_until(lambda: notebook.done().get(1001) == 1)
        assert worker.process.poll() is None
        assert "Traceback" not in worker.text()


def test_a_primary_that_becomes_a_replica_costs_nothing_but_time(
    tmp_path: Path, notebook: Notebook, start_worker: Callable[..., Worker]
) -> None:
    with running(tmp_path / "first") as server, running(tmp_path / "second") as other:
        worker, publish = start_worker(server, concurrency=2), publisher(server)
        publish(range(20))
        wait_until(lambda: len(notebook.done()) == 20)
        server.admin.replicaof("127.0.0.1", other.port)
        wait_until(lambda: "READONLY" in worker.text() or "Refused" in worker.text(), 15)
        server.admin.replicaof("no", "one")
        publish(range(100, 120))
        wait_until(lambda: notebook.done().keys() >= set(range(100, 120)), 30)
        assert worker.process.poll() is None


def test_too_few_replicas_stop_the_publisher_and_no_worker(
    tmp_path: Path, notebook: Notebook, start_worker: Callable[..., Worker]
) -> None:
    with running(tmp_path / "primary") as server, running(tmp_path / "replica") as replica:
        replica.admin.replicaof("127.0.0.1", server.port)
        wait_until(lambda: server.admin.info("replication")["connected_slaves"] == 1)
        wait_until(lambda: server.admin.wait(1, 100) == 1)
        publish = publisher(server, confirm_replicas=1, confirm_timeout=0.5)
        worker = start_worker(server)
        publish(range(10))
        replica.process.send_signal(signal.SIGSTOP)
        with pytest.raises(Exception, match="0 of 1 replicas have it"):
            publish([50], retries=0)
        server.admin.config_set("min-replicas-max-lag", 1)
        server.admin.config_set("min-replicas-to-write", 1)
        wait_until(lambda: server.admin.info("replication")["min_slaves_good_slaves"] == 0)
        with pytest.raises(Exception, match="NOREPLICAS"):
            publish([51], retries=1)
        wait_until(lambda: "NOREPLICAS" in worker.text())
        # Published while nothing is accepted: it waits for the replica.
        threading.Timer(2, replica.process.send_signal, [signal.SIGCONT]).start()
        publish([52])
        wait_until(lambda: notebook.done().keys() >= {*range(10), 52})
        assert worker.process.poll() is None


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_a_worker_that_hears_nothing_connects_anew(
    pool: str,
    server: Server,
    notebook: Notebook,
    proxy: Proxy,
    start_worker: Callable[..., Worker],
    publish: Callable[..., None],
) -> None:
    options = {"answer_timeout": 2, "socket_timeout": 2}
    worker = start_worker(server, server.url(port=proxy.port), pool=pool, options=options)
    publish([1])
    wait_until(lambda: notebook.done() == {1: 1})
    proxy.freeze()
    publish([2])
    wait_until(lambda: "has not answered" in worker.text())
    wait_until(lambda: 2 in notebook.done())
    assert worker.process.poll() is None


def test_a_restart_of_redis_loses_nothing(
    tmp_path: Path, notebook: Notebook, start_worker: Callable[..., Worker]
) -> None:
    with running(tmp_path / "redis", "appendonly yes", "appendfsync always") as server:
        publish = publisher(server)
        worker = start_worker(server, concurrency=4)
        for round_ in range(3):
            publish(range(round_ * 200, round_ * 200 + 200), seconds=0.01)
            wait_until(lambda: len(notebook.done()) > round_ * 200 + 20)  # noqa: B023
            server.stop()
            server.start()
        wait_until(lambda: len(notebook.done()) == 600, 40)
        assert worker.process.poll() is None
