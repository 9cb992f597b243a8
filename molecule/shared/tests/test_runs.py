"""Runs of ansible-playbook as they go wrong: two at once, one that stops half-way, one with a host that is down."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Stack

pytestmark = pytest.mark.scenarios("prod")
LOCK = "/run/hothouse-run"
OTHER = "0123456789abcdef"


def said(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join(done.stdout.split())


@pytest.fixture
def other_run(stack: Stack) -> Iterator[None]:
    """A run of another controller, which one Redis host alone knows of."""
    redis = stack.host(stack.group("redis")[1])
    redis.check_output(f"printf '%s\\n' elsewhere/1/2/3 'site.yml by ops@elsewhere' >{LOCK}")
    yield
    redis.check_output(f"rm -f {LOCK}")


def test_a_run_is_refused_while_another_is_at_work_whatever_its_hosts(stack: Stack, other_run: None) -> None:
    flower = stack.group("flower")[0]
    done = stack.playbook("playbooks/flower.yml", "--limit", flower, check=False)
    assert done.returncode == 2
    assert "Another run is at work on this environment: site.yml by ops@elsewhere" in said(done)
    assert "Ask the host what it runs" not in done.stdout


def test_every_redis_host_gets_its_lock_back(stack: Stack, wait: Callable[..., Any]) -> None:
    stack.playbook("playbooks/flower.yml")
    for name in stack.group("redis"):
        wait(lambda name=name: not stack.host(name).file(LOCK).content, f"the lock of {name} is free", 10)


def test_hosts_that_differ_and_services_of_an_older_release_are_named_until_they_are_mended(
    stack: Stack,
) -> None:
    first, second = (stack.host(name) for name in stack.group("app"))
    release = second.check_output("basename $(readlink /opt/hothouse/app/current)")
    # As a deployment leaves it that did not reach the first host.
    second.check_output(
        f"cd /opt/hothouse/app && cp -a releases/{release} releases/{OTHER} && ln -sfn releases/{OTHER} current"
    )
    differ = said(stack.playbook("playbooks/verify.yml", check=False))
    assert f"{stack.group('app')[0]}: {release}; {stack.group('app')[1]}: {OTHER}" in differ
    # As one leaves it that ended before the services were restarted.
    older = stack.playbook("playbooks/app.yml", "playbooks/verify.yml", check=False)
    assert older.returncode == 2
    text = rf"celery-beat\.service(, \S+)* of {stack.group('app')[1]} started before the release {release}"
    assert re.search(text, said(older)), older.stdout
    assert first.check_output("readlink /opt/hothouse/app/current").endswith(release)
    metrics = second.file("/var/lib/prometheus/node-exporter/release.prom").content_string
    assert f'hothouse_release_info{{release="{release}"}} 1' in metrics
    stack.playbook("playbooks/worker.yml", "playbooks/beat.yml", "playbooks/verify.yml")
    second.check_output(f"rm -rf /opt/hothouse/app/releases/{OTHER}")


@pytest.fixture
def dead_host(stack: Stack) -> Iterator[str]:
    """A worker host that is down."""
    name = stack.group("worker")[1]
    container = stack.variables[name]["container_name"]
    subprocess.run(["podman", "stop", container], check=True, capture_output=True)
    yield name
    subprocess.run(["podman", "start", container], check=True, capture_output=True)
    up = ["ansible.builtin.wait_for_connection", "-a", "timeout=60"]
    subprocess.run(
        ["ansible", *stack.inventory_options, name, "-m", *up],
        env=stack.environment, check=True, capture_output=True,
    )  # fmt: skip
    command = ["podman", "exec", container, "systemctl", "is-system-running", "--wait"]
    subprocess.run(command, check=False, capture_output=True)  # degraded has the exit status 1


def test_a_host_that_is_down_is_left_out_by_a_limit_that_the_message_names(
    stack: Stack, dead_host: str
) -> None:
    done = stack.playbook("playbooks/verify.yml", check=False)
    assert done.returncode != 0
    assert f"--limit '!{dead_host}'" in said(done)
    limited = stack.playbook("playbooks/verify.yml", "--limit", f"!{dead_host}")
    assert f"Left out of this run: {dead_host}." in said(limited)
    assert "failed=0" in limited.stdout
