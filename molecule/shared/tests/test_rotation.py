"""Passwords, the CA and everything at once are replaced while tasks run, by runs that are interrupted, too."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from shlex import quote
from typing import Any

import pytest
from conftest import REPOSITORY, Stack
from test_links import ASK, CA, CERTIFICATE, KEY, offered, python
from testinfra.host import Host

pytestmark = pytest.mark.scenarios("prod")

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
# Asks over one connection for as long as it lives.
HOLD = """
import socket, time
with socket.create_connection(("127.0.0.1", 6379), timeout=10) as connection:
    while True:
        connection.sendall(b"PING\\r\\n")
        assert connection.recv(100), "closed"
        time.sleep(0.2)
"""
HOLDER = "hothouse-test-holder"
USERS = ("admin", "app", "beat", "exporter", "flower", "haproxy", "replica", "sentinel", "worker")
# What is replaced in one run of its own: what Redis is managed with, what its hosts use between them, and what clients
# use. With EACH=1 it is each password.
ALONE = [
    ["redis_admin"],
    ["redis_haproxy", "redis_replica", "redis_sentinel"],
    [
        "redis_app",
        "redis_beat",
        "redis_exporter",
        "redis_flower",
        "redis_worker",
        "monitor",
        "flower_password",
    ],
]
if os.environ.get("EACH"):
    ALONE = [[name] for names in ALONE for name in names]
# What `ansible-vault edit` opens the file with: removes the values named, or gives one another name.
EDITOR = r"""
import pathlib, re, sys
*changes, path = sys.argv[1:]
file = pathlib.Path(path)
text = file.read_text()
for change in changes:
    name, _, new = change.partition("=")
    pattern, by = (rf"(?m)^  {name}:", f"  {new}:") if new else (rf"(?m)^  {name}:.*\n(?:    .*\n)*", "")
    text, found = re.subn(pattern, by, text)
    assert found == 1, change
file.write_text(text)
"""


@dataclass
class Load:
    """Tasks that are published without a pause, and what became of them."""

    stack: Stack
    before: int = 0

    def count(self) -> int:
        """How many were accepted since `before`."""
        return int(self.stack.first("app").check_output(f"wc -l <{LOG}")) - self.before

    def unfinished(self) -> str:
        """Those of them that do not succeed within a minute."""
        ids = f"tail -n +{self.before + 1} {LOG} | head -n {self.count()}"
        return self.stack.first("app").check_output(f"{ids} | hothouse-run python -c {quote(UNFINISHED)}")


@pytest.fixture(scope="module")
def publisher(stack: Stack) -> Iterator[None]:
    host = stack.first("app")
    queues = " ".join(stack.variables[stack.group("app")[0]]["app_queues"])
    program = f"hothouse-run python -c {quote(PUBLISH)} {queues} >>{LOG} 2>/dev/null"
    loop = base64.b64encode(f"until [ -e {STOP} ]; do {program} || sleep 0.2; done".encode()).decode()
    host.check_output(f"rm -f {STOP} {LOG}; touch {LOG}")
    host.check_output(f"systemd-run --unit={PUBLISHER} bash -c 'eval \"$(echo {loop} | base64 -d)\"'")
    yield
    host.run(f"touch {STOP}; systemctl stop {PUBLISHER}; rm -f {LOG} {STOP}")


@pytest.fixture
def replaced(stack: Stack, publisher: None, wait: Callable[..., Any]) -> Iterator[dict[str, str]]:
    """The secrets of before; afterwards nothing was lost, all works, and no Redis was taken for dead."""
    load, primary, failovers, old = Load(stack), stack.primary(), epochs(stack), dict(stack.secrets)
    load.before = load.count()
    yield old
    assert load.count() > 100
    assert load.unfinished() == ""
    assert stack.request("/flower/", stack.login).status == 200
    # Also of a change before this one, to which somebody was deaf. What publishes keeps its password for some seconds.
    came = {user for log in stack.refusals() for user in re.findall(r"username\W+(\w+)", log)}
    assert came <= {name.removeprefix("redis_") for name in changed(stack, old)} | {"app"}
    wait(lambda: stack.refusals() == [], "nobody who comes with an old password", 30)
    # A failover begins another epoch.
    assert (stack.primary(), epochs(stack)) == (primary, failovers)


def epochs(stack: Stack) -> set[str]:
    command = "grep -h config-epoch /var/lib/redis/sentinel.conf || true"
    return {stack.host(name).check_output(command) for name in stack.group("redis")}


def serials(stack: Stack) -> dict[tuple[str, int], str]:
    """The serial number of the certificate that each service shows to a client."""
    return {
        (host, service["port"]): python(
            stack, service["clients"][0], ASK, stack.address(host), str(service["port"]), CERTIFICATE, KEY, CA
        ).splitlines()[-1]
        for host, service in offered(stack)
    }


def edit(stack: Stack, *changes: str) -> None:
    """Change the credentials as the guide says: NAME removes a value, NAME=OTHER gives it another name."""
    subprocess.run(
        ["ansible-vault", "edit", stack.credentials_file],
        env=stack.environment | {"EDITOR": shlex.join([sys.executable, "-c", EDITOR, *changes])},
        check=True,
    )


def run(stack: Stack, *words: str, until: str = "") -> None:
    """Run site.yml as a user does; kill it when it begins the task `until`, if that is given."""
    stack.__dict__.pop("secrets", None)
    if not until:
        stack.playbook("site.yml", *words)
        return
    process = subprocess.Popen(
        ["ansible-playbook", *stack.inventory_options, "site.yml", *words],
        cwd=REPOSITORY, env=stack.environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    seen = next((line for line in process.stdout if until in line), None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert seen, f"the run never came to {until}"


def changed(stack: Stack, old: dict[str, str]) -> set[str]:
    return {name for name in old if stack.secrets.get(name) != old[name]}


def is_refused(stack: Stack, old: dict[str, str], name: str) -> bool:
    """Whether a password of before is of no use any more, anywhere."""
    if name == "flower_password":
        return stack.request("/flower/", f"{old['__user']}:{old[name]}").status == 401
    if name == "monitor":
        login = f"echo 'user = monitor:{old[name]}'"
        ask = f"{login} | curl -so /dev/null -w '%{{http_code}}' -K - 127.0.0.1:9090/-/healthy"
        return stack.first("monitor").check_output(ask) == "401"
    nodes = stack.group("redis")
    user = name.removeprefix("redis_")
    return all("NOAUTH" in stack.redis("PING", user=user, password=old[name], node=node) for node in nodes)


def celery_units(stack: Stack, host: str) -> list[str]:
    return [unit for unit in stack.units(host) if unit.startswith("celery")]


@contextlib.contextmanager
def connected(host: Host) -> Iterator[None]:
    """A client of Redis on a host, whose connection lasts."""
    host.check_output(f"systemd-run --unit={HOLDER} python3 -c {quote(HOLD)}")
    try:
        yield
        assert host.check_output(f"systemctl is-active {HOLDER}") == "active"
    finally:
        host.run(f"systemctl stop {HOLDER}; systemctl reset-failed {HOLDER}")


def test_everything_is_replaced_at_once_by_a_run_that_is_interrupted(
    stack: Stack, replaced: dict[str, str]
) -> None:
    """As on a controller that was lost with its credentials."""
    stack.credentials_file.rename(stack.credentials_file.with_name("credentials.before"))
    try:
        run(stack, "-e", "credentials_replace=true", until="redis : Run Redis on the other replicas")
        run(stack)
    finally:
        if not stack.credentials_file.exists():
            stack.credentials_file.with_name("credentials.before").rename(stack.credentials_file)
    assert changed(stack, replaced) == set(replaced)
    assert all(is_refused(stack, replaced, f"redis_{user}") for user in USERS)


@pytest.mark.parametrize("names", ALONE, ids=" ".join)
def test_passwords_are_replaced(stack: Stack, replaced: dict[str, str], names: list[str]) -> None:
    edit(stack, *names)
    run(stack)
    assert changed(stack, replaced) == set(names)
    assert [name for name in names if not is_refused(stack, replaced, name)] == []


def test_the_authority_is_replaced_in_two_steps(stack: Stack, replaced: dict[str, str]) -> None:
    """With it the certificate of every host: shown without a restart, and what was connected stays so."""
    watched = {
        host: [unit for unit in ("haproxy", "nginx", "prometheus", "redis-server", *celery_units(stack, host))
               if stack.host(host).run(f"systemctl is-active {unit}").rc == 0]
        for host in stack.variables
    }  # fmt: skip

    def started() -> dict[str, str]:
        return {
            host: stack.host(host).check_output(f"systemctl show -p Id,MainPID,NRestarts {' '.join(units)}")
            for host, units in watched.items()
        }

    worker = stack.host(stack.group("worker")[0])
    before, pids, since = serials(stack), started(), worker.check_output("date +%s")
    edit(stack, "ca_certificate=ca_certificate_old", "ca_key")
    with connected(worker):
        run(stack, until="haproxy : ")
    with connected(worker):
        run(stack)
    assert not set(serials(stack).values()) & set(before.values())
    edit(stack, "ca_certificate_old")
    with connected(worker):
        run(stack)
    assert started() == pids
    # After each reload HAProxy finds out who is no primary. It never lost the one that is: it trusted the new authority
    # before that one showed a certificate of it.
    journal = worker.check_output(f"journalctl -u haproxy --no-pager --since=@{since}")
    lost = set(re.findall(r"Server redis/(\S+) is DOWN", journal))
    assert lost == set(stack.group("redis")) - {stack.primary()}
    assert changed(stack, replaced) == {name for name in replaced if name.endswith("_key")}
    for host in stack.variables:
        assert stack.host(host).file("/etc/hothouse/tls/ca.crt").content_string.count("BEGIN") == 1, host
