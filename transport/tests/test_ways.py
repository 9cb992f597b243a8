"""The ways to Redis: encrypted, by Sentinel, without hiredis, several queues and pools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
import trustme
from conftest import HERE, Notebook, Server, Worker, free_port, publisher, running, wait_until
from kombu import Connection


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_several_queues_in_every_pool(
    pool: str,
    server: Server,
    notebook: Notebook,
    start_worker: Callable[..., Worker],
    publish: Callable[..., None],
) -> None:
    start_worker(server, queues="one,two,three", pool=pool)
    for queue in ("one", "two", "three"):
        publish(range(len(queue) * 100, len(queue) * 100 + 30), queue)
    publish(range(30), "three", seconds=0.001)
    wait_until(lambda: len(notebook.done()) == 90)
    assert sum(notebook.done().values()) == 120
    wait_until(lambda: not server.admin.exists("q:unacked", "q:unacked_index"))


def test_without_hiredis(
    server: Server, notebook: Notebook, start_worker: Callable[..., Worker], publish: Callable[..., None]
) -> None:
    start_worker(server, TEST_WITHOUT="hiredis")
    publish(range(100))
    wait_until(lambda: len(notebook.done()) == 100)


def test_inspect_reaches_a_worker_and_leaves_nothing_behind(
    server: Server, start_worker: Callable[..., Worker]
) -> None:
    start_worker(server)
    command = [sys.executable, "-m", "celery", "-A", "tasks", "inspect", "--timeout", "5", "ping"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "TEST_BROKER_URL": server.url()}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "pong" in answer.stdout
    assert not server.admin.exists("q:unacked", "q:unacked_index")


def test_tls_is_verified_on_both_sides(
    tmp_path: Path, notebook: Notebook, start_worker: Callable[..., Worker]
) -> None:
    ca, stranger = trustme.CA(), trustme.CA()
    for name, authority in (("server", ca), ("client", ca), ("stranger", stranger)):
        certificate = authority.issue_cert("127.0.0.1")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.crt")
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
    ca.cert_pem.write_to_path(tmp_path / "ca.crt")
    port = free_port()
    tls = [f"tls-port {port}", "tls-auth-clients yes", f"tls-ca-cert-file {tmp_path}/ca.crt"]
    tls += [f"tls-cert-file {tmp_path}/server.crt", f"tls-key-file {tmp_path}/server.key"]
    with running(tmp_path / "redis", *tls) as server:
        address = server.url(scheme="hothouses", port=port)

        def url(name: str) -> str:
            files = f"ssl_certfile={tmp_path}/{name}.crt&ssl_keyfile={tmp_path}/{name}.key"
            return f"{address}?ssl_ca_certs={tmp_path}/ca.crt&{files}"

        start_worker(server, url("client"), queues="one,two")
        publisher(server, url("client"))(range(50))
        wait_until(lambda: len(notebook.done()) == 50)
        # Not even without a word about it does it talk to a server that nobody vouches for.
        for refused in (address, url("stranger")):
            with (
                pytest.raises((redis.exceptions.ConnectionError, OSError)),
                Connection(refused) as connection,
            ):
                connection.connect()


@pytest.mark.parametrize("scheme", ["hothouse", "redis"])
def test_the_broker_may_have_an_ipv6_address(
    tmp_path: Path, notebook: Notebook, start_worker: Callable[..., Worker], scheme: str
) -> None:
    with running(tmp_path / "redis", "bind ::1 127.0.0.1") as server:
        login = "worker:worker@" if scheme == "hothouse" else ""
        address = f"{scheme}://{login}[::1]:{server.port}/0"
        start_worker(server, address)
        publisher(server, address)(range(20))
        wait_until(lambda: len(notebook.done()) == 20)
        # This test's own connection is the one by IPv4.
        clients = [client["addr"].rpartition(":")[0] for client in server.admin.client_list()]
        assert clients.count("127.0.0.1") == 1 and clients.count("[::1]") == len(clients) - 1 > 0


def test_workers_and_publishers_follow_a_failover_of_sentinel(
    tmp_path: Path, notebook: Notebook, start_worker: Callable[..., Worker]
) -> None:
    sentinels = [free_port() for _ in range(3)]
    with (
        running(tmp_path / "first") as first,
        running(tmp_path / "second") as second,
        running(tmp_path / "third") as third,
    ):
        for replica in (second, third):
            replica.admin.replicaof("127.0.0.1", first.port)
        wait_until(lambda: first.admin.wait(2, 100) == 2)
        watch = [
            f"sentinel monitor hothouse 127.0.0.1 {first.port} 2",
            "sentinel down-after-milliseconds hothouse 1000",
            "sentinel failover-timeout hothouse 5000",
        ]
        watching = [Sentinel(tmp_path / f"sentinel{port}", port, watch) for port in sentinels]
        try:
            wait_until(lambda: all(one.sees(2, 2) for one in watching))
            url = ";".join(f"hothouse-sentinel://worker:worker@127.0.0.1:{port}/0" for port in sentinels)
            options = {"master_name": "hothouse", "socket_timeout": 2, "confirm_replicas": 1}
            worker = start_worker(first, url, options=options)
            publish = publisher(first, url, **options)
            publish(range(20))
            wait_until(lambda: len(notebook.done()) == 20)
            first.stop()
            publish(range(100, 120))
            wait_until(lambda: notebook.done().keys() >= set(range(100, 120)), 40)
            assert worker.process.poll() is None
        finally:
            for one in watching:
                one.stop()


class Sentinel(Server):
    """A Sentinel, which is a redis-server in another mode."""

    def __init__(self, folder: Path, port: int, configuration: list[str]) -> None:
        self.folder, self.port = folder, port
        folder.mkdir()
        lines = [f"port {port}", "bind 127.0.0.1", f"dir {folder}", *configuration]
        (folder / "redis.conf").write_text("\n".join(lines) + "\n")
        self.admin = redis.Redis(port=port, decode_responses=True)
        self.start("--sentinel")

    def wait_for(self, text: str) -> None:
        super().wait_for("sentinel id is")

    def sees(self, replicas: int, others: int) -> bool:
        state = self.admin.sentinel_master("hothouse")
        return bool(state["num-slaves"] == replicas and state["num-other-sentinels"] == others)


def test_a_queue_may_have_any_name(
    server: Server, notebook: Notebook, start_worker: Callable[..., Worker], publish: Callable[..., None]
) -> None:
    name = 'a"strange"näme'
    worker = start_worker(server, queues=name, options={"visibility_timeout": 1})
    publish([1], name, seconds=30)
    wait_until(lambda: notebook.started() == [1])
    assert json.loads(server.admin.hvals("q:unacked")[0])[1:] == ["", name]
    worker.kill()
    start_worker(server, queues=name, options={"visibility_timeout": 1})
    wait_until(lambda: notebook.started() == [1, 1])
