"""The containers of one Compose file, for the shared tests of Flower and for those of this scenario."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import shlex
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from testinfra.backend.base import CommandResult

# The shared tests import this module as `conftest`: it has all that theirs has.
SHARED = Path(__file__).resolve().parents[2] / "shared/tests"
specification = importlib.util.spec_from_file_location("shared_conftest", SHARED / "conftest.py")
assert specification and specification.loader
shared = importlib.util.module_from_spec(specification)
sys.modules["shared_conftest"] = shared
specification.loader.exec_module(shared)
sys.path.append(str(SHARED))

Answer, exchange, wait = shared.Answer, shared.exchange, shared.wait
HOST = "local1"


class Stack(shared.Stack):  # type: ignore[misc]  # loaded from a file
    """What `COMPOSE -f FILE up -d flower` started; `words` is what the user typed before `up`."""

    def __init__(self, *words: str, proxy: bool) -> None:
        super().__init__()
        self.words, self.proxy = words, proxy
        self.tunnels: dict[int, int] = {}

    @cached_property
    def variables(self) -> dict[str, dict[str, Any]]:
        """The shared tests know hosts: here it is one, called as in the workers' names."""
        return {"compose": super().variables[HOST]}

    @property
    def project(self) -> Path:
        """The folder with docker-compose.yml, on the controller and on the host."""
        return self.credentials_file.parents[2]

    @property
    def env_file(self) -> Path:
        return self.project / ".env"

    @property
    def login(self) -> str:
        """As in .env, which is the developer's."""
        lines = dict(
            line.split("=", 1)
            for line in self.env_file.read_text().splitlines()
            if line.startswith("FLOWER_")
        )
        return f"{lines['FLOWER_USER']}:{lines['FLOWER_PASSWORD']}"

    def shell(self, command: str) -> CommandResult:
        """Run a command on the host as a developer does: in the folder of the files."""
        return self.host(HOST).run(f"cd {shlex.quote(str(self.project))} && {command}")

    def compose(self, *words: str) -> str:
        """Run docker-compose with these words; its output."""
        done = self.shell(shlex.join([*self.words, *words]))
        assert done.rc == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return str(done.stdout)

    def inside(self, service: str, *command: str) -> CommandResult:
        """Run a command in a service's container: `docker exec`, which starts faster than docker-compose."""
        container = f"$(docker ps --quiet --filter label=com.docker.compose.service={service})"
        return self.shell(f"docker exec {container} {shlex.join(command)}")

    def inspect(self) -> dict[str, dict[str, Any]]:
        """What the engine says of each running container, by its service."""
        containers = json.loads(self.shell("docker inspect $(docker ps --quiet)").stdout)
        return {entry["Config"]["Labels"]["com.docker.compose.service"]: entry for entry in containers}

    def health(self) -> dict[str, str]:
        """Service → starting, healthy or unhealthy."""
        return {name: entry["State"]["Health"]["Status"] for name, entry in self.inspect().items()}

    @contextlib.contextmanager
    def forwarded(self, port: int) -> Iterator[None]:
        """Make `localhost:port` of the host reachable from here while this is open."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            number = free.getsockname()[1]
        config = shared.REPOSITORY / f".hothouse/ssh/hothouse-molecule-{shared.SCENARIO}.config"
        with tempfile.TemporaryDirectory() as folder:
            ssh = ["ssh", "-F", str(config), "-S", f"{folder}/control"]
            start = [
                "-M",
                "-f",
                "-N",
                "-o",
                "ExitOnForwardFailure=yes",
                "-L",
                f"127.0.0.1:{number}:localhost:{port}",
            ]
            # It keeps the standard error open, for which a pipe would wait.
            subprocess.run([*ssh, *start, HOST], check=True, stderr=subprocess.DEVNULL)
            self.tunnels[port] = number
            try:
                yield
            finally:
                del self.tunnels[port]
                subprocess.run([*ssh, "-O", "exit", HOST], check=True, capture_output=True)

    def request(
        self, path: str, login: str | None = None, method: str = "GET", headers: dict[str, str] | None = None,
        name: str | None = None, body: str | None = None,
    ) -> Any:  # fmt: skip
        """What a browser gets: from https://localhost/flower/…, or without nginx from http://localhost:5555/…."""
        if self.proxy:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection("localhost")
            context = ssl.create_default_context(cafile=str(self.ca_file))
            plain = socket.create_connection(("127.0.0.1", self.tunnels[443]), timeout=30)
            connection.sock = context.wrap_socket(plain, server_hostname=name or "localhost")
        else:
            path = path.removeprefix("/flower")
            connection = http.client.HTTPConnection("localhost", 5555)
            connection.sock = socket.create_connection(("127.0.0.1", self.tunnels[5555]), timeout=30)
        return exchange(connection, path, login, method, headers or {}, body)

    def answers(self, login: str | None) -> int:
        """The status that Flower answers with; 0 while nobody does."""
        try:
            return int(self.request("/flower/api/workers", login).status)
        except (OSError, http.client.HTTPException):
            return 0

    def wait_until_up(self, seconds: float = 60) -> None:
        """Wait until Flower answers its login and hears every worker."""
        deadline = time.monotonic() + seconds
        while not self.is_up():
            assert time.monotonic() < deadline, f"Flower does not show every worker after {seconds:g} s"
            time.sleep(0.5)

    def is_up(self) -> bool:
        """Whether Flower answers its login and hears every worker."""
        if self.answers(self.login) != 200:
            return False
        heard = self.request("/flower/workers?json=1", self.login).json()["data"]
        return {worker["hostname"] for worker in heard if worker["status"]} >= set(self.workers)

    def ping(self, queue: str) -> str:
        """Send a task through a queue; the name of the container that ran it."""
        worker = f"worker-{self.workers[0].partition('@')[0]}"
        done = self.inside(worker, "python", "-m", "hothouse_celery", "ping", queue)
        assert done.rc == 0, done.stderr
        return str(json.loads(done.stdout)[queue])

    def redis(self, *command: str, user: str = "admin", password: str | None = None) -> str:
        """What Redis answers to its administrator."""
        line = f"REDISCLI_AUTH=$(cat /run/credentials/password) redis-cli --no-auth-warning --user {user}"
        line += f" {shlex.join(command)}"
        return str(self.inside("redis", "sh", "-c", line).stdout).strip()


@pytest.fixture(scope="module")
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """What the module's COMMAND starts. At its end Redis must have refused nobody, and nothing must be left."""
    command: str = request.module.COMMAND
    assert command.endswith(" up -d flower")
    found = Stack(*command.split()[:-3], proxy="prod" in command)
    done = found.shell(command)
    assert done.rc == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with found.forwarded(443 if found.proxy else 5555):
        found.wait_until_up()
        yield found
        assert found.redis("ACL", "LOG") in ("", "(empty array)")
    found.compose("down", "--volumes", "--remove-orphans")
    for kind in ("container", "volume"):
        assert found.shell(f"docker {kind} ls --quiet").stdout == "", kind


@pytest.fixture
def up(stack: Stack) -> None:
    """A test before may have restarted something."""
    stack.wait_until_up()
