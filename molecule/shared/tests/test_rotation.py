"""Every password and the CA are replaced at once, while tasks run, by a run that has to be repeated."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from shlex import quote
from typing import Any

import pytest
from conftest import REPOSITORY, Stack

SCENARIOS = ("prod",)

PUBLISHER, STOP, LOG = "hothouse-test-publisher", "/run/hothouse-test-stop", "/run/hothouse-test-published"
# For some seconds, as an application that is restarted when it cannot log in: what is printed was accepted. Not the
# deployment's own ping, which is acknowledged before it runs.
TASK = "campaigns.tasks.check_scheduled_campaigns"
PUBLISH = f"""
import itertools, sys, time
from hothouse_celery import app
end = time.monotonic() + 5
for queue in itertools.cycle(sys.argv[1:]):
    print(app.send_task("{TASK}", queue=queue).id, flush=True)
    time.sleep(0.05)
    if time.monotonic() > end:
        break
"""
UNFINISHED = """
import sys, time
from hothouse_celery import app
left, deadline = set(sys.stdin.read().split()), time.monotonic() + 60
while (left := {task for task in left if app.AsyncResult(task).state != "SUCCESS"}) and time.monotonic() < deadline:
    time.sleep(0.5)
print(*left)
"""
USERS = ("admin", "app", "beat", "exporter", "flower", "haproxy", "replica", "sentinel", "worker")


@pytest.fixture
def published(stack: Stack) -> Iterator[Callable[[], int]]:
    """Publishes until it is asked how many were accepted."""
    host = stack.first("app")
    queues = " ".join(stack.variables[stack.group("app")[0]]["app_queues"])
    program = f"hothouse-run python -c {quote(PUBLISH)} {queues} >>{LOG} 2>/dev/null"
    loop = base64.b64encode(f"until [ -e {STOP} ]; do {program} || sleep 0.2; done".encode()).decode()
    host.check_output(f"rm -f {STOP} {LOG}")
    host.check_output(f"systemd-run --unit={PUBLISHER} bash -c 'eval \"$(echo {loop} | base64 -d)\"'")

    def stop() -> int:
        host.check_output(f"touch {STOP}; while systemctl is-active --quiet {PUBLISHER}; do sleep 0.1; done")
        return int(host.check_output(f"wc -l <{LOG}"))

    yield stop
    host.run(f"touch {STOP}; systemctl stop {PUBLISHER}; rm -f {LOG} {STOP}")


def interrupted(stack: Stack, task: str, *words: str) -> None:
    """Run ansible-playbook as `stack.playbook` does, and kill it when it begins a task."""
    run = subprocess.Popen(
        ["ansible-playbook", *stack.inventory_options, *words],
        cwd=REPOSITORY, env=stack.environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert run.stdout
    seen = next((line for line in run.stdout if task in line), None)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert seen, f"the run never came to {task}"


def epochs(stack: Stack) -> set[str]:
    command = "grep -h config-epoch /var/lib/redis/sentinel.conf || true"
    return {stack.host(name).check_output(command) for name in stack.group("redis")}


def test_everything_is_replaced_at_once_and_nothing_is_lost(
    stack: Stack, published: Callable[[], int], wait: Callable[..., Any]
) -> None:
    """As on a controller that was lost with its credentials."""
    primary, failovers, old = stack.primary(), epochs(stack), dict(stack.secrets)
    stack.credentials_file.rename(stack.credentials_file.with_name("credentials.before"))
    try:
        interrupted(
            stack, "redis : Run Redis on the other replicas", "site.yml", "-e", "credentials_replace=true"
        )
        stack.playbook("site.yml")
    finally:
        if not stack.credentials_file.exists():
            stack.credentials_file.with_name("credentials.before").rename(stack.credentials_file)
        stack.__dict__.pop("secrets")
    assert not {name for name, value in stack.secrets.items() if value == old.get(name)}
    assert published() > 100
    assert stack.first("app").check_output(f"hothouse-run python -c {quote(UNFINISHED)} <{LOG}") == ""
    for user in USERS:
        assert "NOAUTH" in stack.redis("PING", user=user, password=old[f"redis_{user}"])
    for node in stack.group("redis"):
        assert "NOAUTH" in stack.redis("PING", password=old["redis_admin"], node=node)
    assert stack.request("/flower/", stack.login).status == 200
    wait(lambda: set(stack.refusals()) == set(), "nobody who comes with an old password", 30)
    # A failover begins another epoch.
    assert (stack.primary(), epochs(stack)) == (primary, failovers)
