"""The same files with `docker compose`, which builds with BuildKit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from common import (  # noqa: F401
    own_login,
    restart,
    test_a_login_written_into_env_is_applied_by_a_restart,
    test_every_container_is_healthy,
)
from conftest import Stack
from test_flower import test_a_task_crosses_every_queue_and_shows_in_flower  # noqa: F401

COMMAND = "docker compose up -d flower"


@pytest.fixture(autouse=True)
def started(up: None) -> None:
    """Every test needs Flower."""


def test_it_is_version_2(stack: Stack) -> None:
    assert "version 2." in stack.shell("docker compose version").stdout
    assert "version 1.29" in stack.shell("docker-compose version").stdout


def test_it_builds_the_images(stack: Stack) -> None:
    flower = stack.inspect()["flower"]
    stack.compose("build", "--no-cache", "flower")
    name = flower["Config"]["Image"]
    assert (
        stack.shell(f"docker image inspect --format '{{{{.Id}}}}' {name}").stdout.strip() != flower["Image"]
    )


def test_it_takes_the_other_file_as_well(stack: Stack, wait: Callable[..., Any]) -> None:
    """On top of this one, as a developer would go from one to the other."""
    production = Stack("docker", "compose", "-f", "docker-compose.prod.yml", proxy=True)
    production.compose("up", "-d", "flower")
    with production.forwarded(443):
        wait(lambda: production.answers(production.login) == 200, "Flower behind nginx")
        assert production.answers("admin:admin") == 401
