"""Tests of every way to start the containers; the modules import what is theirs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Stack
from test_secrets import spellings

NEW_LOGIN = "developer:a-Login.of_the~developer"


@pytest.fixture
def own_login(stack: Stack) -> Iterator[Callable[[str, str], None]]:
    """Writes a login into .env as an editor does, by a new file in the old one's place; the old one comes back."""
    before, status = stack.env_file.read_text(), stack.env_file.stat()

    def write(user: str, password: str) -> None:
        text = re.sub("(?m)^FLOWER_USER=.*$", lambda _: f"FLOWER_USER={user}", before)
        put(re.sub("(?m)^FLOWER_PASSWORD=.*$", lambda _: f"FLOWER_PASSWORD={password}", text))

    def put(text: str) -> None:
        new = stack.env_file.with_name(".env.new")
        new.write_text(text)
        new.chmod(0o600)
        subprocess.run(["chown", f"{status.st_uid}:{status.st_gid}", new], check=True)
        new.replace(stack.env_file)

    yield write
    put(before)


@pytest.fixture
def restart(stack: Stack) -> Iterator[Callable[[], None]]:
    """Restarts Flower; and once more at the end, after .env is what it was."""
    yield lambda: stack.compose("restart", "flower") and None
    stack.compose("restart", "flower")


def test_flower_hears_every_worker(stack: Stack, up: None) -> None:
    assert len(stack.workers) >= 2


def test_containers_run_without_root_and_cannot_write_but_where_they_keep_state(
    stack: Stack, up: None
) -> None:
    owner = stack.env_file.stat()
    folders = ("/", "/etc", "/opt", "/usr/bin", "/var/lib")
    look = f"cat /proc/1/status; for f in {' '.join(folders)}; do test -w $f && echo writable: $f; done; true"
    for name, container in stack.inspect().items():
        assert container["Config"]["User"] == f"{owner.st_uid}:{owner.st_gid}", name
        assert owner.st_uid != 0 and container["HostConfig"]["ReadonlyRootfs"], name
        seen = stack.inside(name, "sh", "-c", look).stdout
        assert re.search(rf"^Uid:\s+{owner.st_uid}\s+{owner.st_uid}\s", seen, re.M), name
        assert re.search(r"^CapBnd:\s+0+$", seen, re.M), name
        assert re.search(r"^NoNewPrivs:\s+1$", seen, re.M), name
        assert "writable" not in seen, name


def test_ports_are_published_on_loopback_only(stack: Stack, up: None) -> None:
    published = {
        binding["HostIp"]
        for container in stack.inspect().values()
        for bindings in (container["NetworkSettings"]["Ports"] or {}).values()
        for binding in bindings or []
    }
    assert published == {"127.0.0.1"}


def test_a_login_written_into_env_is_applied_by_a_restart(
    stack: Stack,
    up: None,
    restart: Callable[[], None],
    own_login: Callable[[str, str], None],
    wait: Callable[..., Any],
) -> None:
    old = stack.login
    own_login(*NEW_LOGIN.split(":"))
    assert stack.answers(old) == 200
    restart()
    wait(lambda: stack.answers(NEW_LOGIN) == 200, "the new login")
    assert stack.answers(old) in (401, 429)
    assert stack.answers("admin:admin") in (401, 429)


def test_no_secret_is_in_what_the_engine_shows_or_in_an_environment(stack: Stack, up: None) -> None:
    secrets = [*spellings(stack), stack.login.partition(":")[2]]
    containers = "$(docker ps --quiet)"
    for command in (
        f"docker inspect {containers}",
        "docker image inspect $(docker image ls --quiet)",
        "for i in $(docker image ls --quiet); do docker history --no-trunc $i; done",
        f"for c in {containers}; do docker logs $c 2>&1; done",
        # Not the processes of this search.
        "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'",
    ):
        text = stack.shell(command).stdout
        assert len(text) > 100, command
        assert [secret[:3] for secret in secrets if secret in text] == [], command


def test_no_secret_is_in_a_file_that_others_may_read_or_that_an_image_is_built_from(stack: Stack) -> None:
    secrets = [secret.encode() for secret in (*spellings(stack), stack.login.partition(":")[2])]
    files = [path for path in stack.project.rglob("*") if path.is_file()]
    images = stack.project / ".hothouse/compose/images"
    holding = [path for path in files if any(secret in path.read_bytes() for secret in secrets)]
    assert len(holding) >= 8
    for path in holding:
        assert path.stat().st_mode & 0o077 == 0, path
        assert not path.is_relative_to(images), path


def test_every_container_is_healthy(stack: Stack, up: None, wait: Callable[..., Any]) -> None:
    wait(lambda: set(stack.health().values()) == {"healthy"}, "the health of every container", 90)
