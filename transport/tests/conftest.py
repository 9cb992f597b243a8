"""Real redis-servers, with users of the least rights, and real Celery workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

import hothouse_transport

HERE = Path(__file__).parent
assert hothouse_transport.install() is None


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Return the first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def redis_server() -> str:
    """The server to test with: $REDIS_SERVER, or the one of the machine."""
    path = os.environ.get("REDIS_SERVER") or shutil.which("redis-server")
    assert path, "there is no redis-server; bin/test makes one known"
    return path


def accounts() -> list[str]:
    version = subprocess.run([redis_server(), "--version"], capture_output=True, text=True, check=True).stdout
    setinfo = "" if "v=7.0." in version else "+client|setinfo"
    return (HERE / "redis.acl").read_text().format(setinfo=setinfo).splitlines()


class Server:
    """A redis-server of its own. `admin` may do everything; workers and publishers have users."""

    def __init__(self, folder: Path, *configuration: str, port: int | None = None) -> None:
        self.folder, self.port = folder, port or free_port()
        folder.mkdir(exist_ok=True)
        lines = ["bind 127.0.0.1", f"dir {folder}", 'save ""', *accounts(), *configuration]
        if not any(line.startswith("port ") for line in configuration):
            lines.append(f"port {self.port}")
        (folder / "redis.conf").write_text("\n".join(lines) + "\n")
        self.admin = redis.Redis(port=self.port, decode_responses=True)
        self.start()

    def start(self, *arguments: str) -> None:
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [redis_server(), "redis.conf", *arguments], cwd=self.folder, stdout=log
            )
        self.wait_for("ready to accept")

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in (self.folder / "log").read_text().lower())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def url(self, user: str = "worker", scheme: str = "hothouse", port: int | None = None) -> str:
        return f"{scheme}://{user}:{user}@127.0.0.1:{port or self.port}/0"

    def dead_letters(self) -> list[dict[str, Any]]:
        return [json.loads(letter) for letter in self.admin.lrange("q:dead-letter", 0, -1)]


@contextmanager
def running(folder: Path, *configuration: str) -> Iterator[Server]:
    server = Server(folder, *configuration)
    try:
        yield server
    finally:
        server.stop()


class Notebook:
    """Where tasks write what they did: a server that no fault meets."""

    def __init__(self, server: Server) -> None:
        self.client, self.url = server.admin, f"redis://127.0.0.1:{server.port}/0"

    def done(self) -> dict[int, int]:
        """The tasks that ran to their end, and how often."""
        return {int(number): int(times) for number, times in self.client.hgetall("done").items()}

    def started(self) -> list[int]:
        return [int(number) for number in self.client.lrange("started", 0, -1)]


@pytest.fixture(scope="session")
def shared_notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    with running(tmp_path_factory.mktemp("notebook")) as server:
        yield Notebook(server)


@pytest.fixture
def notebook(shared_notebook: Notebook) -> Notebook:
    shared_notebook.client.flushall()
    return shared_notebook


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """An empty server; fails if it refused a command for want of rights."""
    shared_server.admin.flushall()
    shared_server.admin.acl_log_reset()
    yield shared_server
    assert shared_server.admin.acl_log() == []


@dataclass
class Worker:
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """The whole group: the worker and its pool, as when a host dies."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def text(self) -> str:
        return self.log.read_text()


@pytest.fixture
def start_worker(tmp_path: Path, notebook: Notebook) -> Iterator[Callable[..., Worker]]:
    """Start a worker, `pool` threads unless told; `options` are transport options, `environment` is added."""
    started: list[Worker] = []

    def start(
        server: Server, url: str = "", queues: str = "one", pool: str = "threads", concurrency: int = 2,
        options: dict[str, Any] | None = None, wait: bool = True, **environment: str,
    ) -> Worker:  # fmt: skip
        log = tmp_path / f"worker{len(started)}.log"
        command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", queues, "-P", pool]
        command += ["-c", str(concurrency), "-l", "INFO", "--without-gossip", "--without-mingle"]
        values = {
            "PYTHONPATH": str(HERE),
            "TEST_BROKER_URL": url or server.url(),
            "TEST_NOTEBOOK_URL": notebook.url,
            "TEST_OPTIONS": json.dumps(options or {}),
            "TEST_POOL": pool,
        }
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**os.environ, **values, **environment},
                start_new_session=True,
            )
        worker = Worker(process, log)
        started.append(worker)
        if wait:
            wait_until(lambda: " ready." in worker.text() or process.poll() is not None)
        return worker

    yield start
    for worker in started:
        worker.kill()


@pytest.fixture
def publish(server: Server) -> Callable[..., None]:
    """Publish notes with these numbers."""
    return publisher(server)


def publisher(server: Server, url: str = "", **options: Any) -> Callable[..., None]:
    from tasks import app, note

    def send(
        numbers: Any, queue: str = "one", task: Any = note, retries: int = 100, countdown: float = 0,
        **arguments: Any,
    ) -> None:  # fmt: skip
        policy = {**app.conf.task_publish_retry_policy, "max_retries": retries}
        transport_options = {**app.conf.broker_transport_options, **options}
        broker = url or server.url("publisher")
        with app.connection_for_write(url=broker, transport_options=transport_options) as connection:
            for number in numbers:
                task.apply_async(
                    (number,) if task is note else (),
                    arguments,
                    countdown=countdown or None,
                    queue=queue,
                    connection=connection,
                    retry_policy=policy,
                )

    return send


class Proxy:
    """Passes bytes between a worker and Redis, and stops on demand, as a network does that loses packets."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.hold_after: bytes | None = (
            None  # what the server has to say for requests to be held from then on
        )
        self.holding = threading.Event()
        self.frozen = False  # nothing passes on connections that exist
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                self._sockets += [client, server]
                link = {"frozen": False}
                for source, sink, requests in ((client, server, True), (server, client, False)):
                    threading.Thread(
                        target=self._pass, args=(source, sink, requests, link), daemon=True
                    ).start()
                self.links = [*getattr(self, "links", []), link]

    def _pass(
        self, source: socket.socket, sink: socket.socket, requests: bool, link: dict[str, bool]
    ) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if link["frozen"] or (requests and self.holding.is_set()):
                    continue
                if not requests and self.hold_after and self.hold_after in data:
                    self.holding.set()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        """What is connected hears nothing any more; new connections work."""
        for link in self.links:
            link["frozen"] = True

    def close(self) -> None:
        for end in self._sockets:
            end.close()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()
