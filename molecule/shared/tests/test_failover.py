"""Redis on three hosts: whatever ends the primary, another one takes over with everything that was queued."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Stack
from test_monitor import query

pytestmark = pytest.mark.scenarios("prod")

QUEUE = "q:kept"
TASKS = 200


@pytest.fixture(autouse=True)
def healthy(stack: Stack, wait: Callable[..., Any]) -> Iterator[None]:
    """Before and after each test: one primary, every other node copies it, every Sentinel sees all others."""
    wait(lambda: nodes_are_healthy(stack), "a primary with all its replicas, and all Sentinels", 60)
    yield
    wait(lambda: nodes_are_healthy(stack), "a primary with all its replicas, and all Sentinels", 60)
    stack.redis("DEL", QUEUE)


def nodes_are_healthy(stack: Stack) -> bool:
    names = stack.group("redis")
    usable = f"{len(names)} usable Sentinels"
    return f"connected_slaves:{len(names) - 1}" in stack.redis("INFO", "replication") and all(
        usable in sentinel(stack, name, "SENTINEL", "CKQUORUM", "hothouse")
        and (
            name == stack.primary()
            or "master_link_status:up" in stack.redis("INFO", "replication", node=name)
        )
        for name in names
    )


def sentinel(stack: Stack, name: str, *words: str) -> str:
    return stack.host(name).run(f"hothouse-redis-cli --sentinel {' '.join(words)}").stdout.strip()


def replicas(stack: Stack) -> list[str]:
    return [name for name in stack.group("redis") if name != stack.primary()]


def queue_tasks(stack: Stack) -> None:
    """Messages in a queue that nobody consumes, which a replica has too. WAIT counts what its own connection wrote."""
    commands = f"RPUSH {QUEUE} {' '.join(str(number) for number in range(TASKS))}\\nWAIT 1 5000\\n"
    replies = stack.first("redis").check_output(f"printf '{commands}' | hothouse-redis-cli --primary")
    assert int(replies.split()[-1]) >= 1


def all_tasks_are_there(stack: Stack) -> bool:
    return stack.redis("LRANGE", QUEUE, "0", "-1").split() == [str(number) for number in range(TASKS)]


def others_have_taken_over(stack: Stack, former: str) -> bool:
    """Whether another node is the primary, and the former one copies it."""
    return stack.primary() != former and "role:slave" in stack.redis("INFO", "replication", node=former)


def begin_anew(stack: Stack, name: str) -> None:
    """With a restart by hand the counters of restarts, which other tests read, begin anew."""
    stack.host(name).check_output("systemctl restart redis-server.service redis-sentinel.service")


def test_a_killed_primary_is_replaced_and_comes_back_as_a_replica(
    stack: Stack, wait: Callable[..., Any]
) -> None:
    former = stack.primary()
    queue_tasks(stack)
    stack.host(former).check_output("systemctl kill --signal=KILL redis-server.service")
    wait(lambda: stack.primary() != former, "another primary", 10)
    # The way of every client: its own HAProxy.
    assert stack.ping("default")
    wait(lambda: others_have_taken_over(stack, former), "the return of the former primary", 30)
    assert all_tasks_are_there(stack)

    present = stack.primary()
    done = stack.playbook("playbooks/redis.yml")
    assert all("changed=0" in line for line in done.stdout.splitlines() if " ok=" in line)
    assert stack.primary() == present
    begin_anew(stack, former)


def test_a_primary_that_is_stopped_hands_over_first(stack: Stack) -> None:
    former = stack.primary()
    queue_tasks(stack)
    host = stack.host(former)
    host.check_output("systemctl restart redis-server.service")
    assert stack.primary() != former
    # Before it stopped: afterwards the Sentinels would have done it too, but later.
    told = host.check_output("journalctl --unit=redis-server.service --since=-60s --output=cat")
    assert f"{stack.address(stack.primary())} is the primary now" in told
    # Its start counts as done when it has copied everything.
    assert "master_link_status:up" in stack.redis("INFO", "replication", node=former)
    assert all_tasks_are_there(stack)
    assert stack.ping("default")


def test_a_frozen_primary_is_replaced_and_turned_into_a_replica(
    stack: Stack, wait: Callable[..., Any]
) -> None:
    former = stack.primary()
    queue_tasks(stack)
    host = stack.host(former)
    host.check_output("systemctl kill --signal=STOP redis-server.service")
    try:
        other = next(name for name in stack.group("redis") if name != former)
        address = stack.address(former)
        known = "/opt/hothouse/lib/hothouse_redis.py primary"
        wait(lambda: stack.host(other).check_output(known) != address, "another primary", 10)
        assert stack.ping("default")
    finally:
        host.check_output("systemctl kill --signal=CONT redis-server.service")
    wait(lambda: others_have_taken_over(stack, former), "the end of the former primary", 40)
    assert all_tasks_are_there(stack)


def test_a_primary_whose_disk_was_lost_copies_the_others_instead_of_emptying_them(
    stack: Stack, wait: Callable[..., Any]
) -> None:
    former = stack.primary()
    queue_tasks(stack)
    stack.host(former).check_output(
        "rm -rf /var/lib/redis/*; systemctl kill --signal=KILL redis-server.service redis-sentinel.service"
    )
    wait(lambda: others_have_taken_over(stack, former), "the return of the node without data", 60)
    assert all_tasks_are_there(stack)
    wait(lambda: nodes_are_healthy(stack), "three nodes, and no more Sentinels than before", 60)
    assert stack.redis("CONFIG", "GET", "replica-priority", node=former).split()[1] == "100"
    begin_anew(stack, former)


def test_sentinels_ask_for_a_password(stack: Stack) -> None:
    for name in stack.group("redis"):
        for secret in ("", "x", stack.secrets["redis_admin"]):
            answer = stack.host(name).run(f"REDISCLI_AUTH={secret} hothouse-redis-cli --sentinel PING").stdout
            assert "NOAUTH" in answer


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of a CA that nobody here knows."""
    folder = tmp_path_factory.mktemp("stranger")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=redis1",
         "-keyout", folder / "host.key", "-out", folder / "host.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("port", [6379, 26379])
def test_nobody_connects_without_a_certificate_of_the_environment(
    stack: Stack, stranger: Path, port: int
) -> None:
    """From a host of the environment, so that nothing but TLS refuses it."""
    client = stack.host(replicas(stack)[0])
    files = {name: (stranger / name).read_text() for name in ("host.crt", "host.key")}
    folder = client.check_output("mktemp -d")
    try:
        for file, text in files.items():
            client.check_output(f"cat >{folder}/{file} <<'END'\n{text}END")
        for name in stack.group("redis"):
            plain = f"redis-cli -h {stack.address(name)} -p {port}"
            tls = f"{plain} --tls --cacert /etc/redis/ca.crt"
            own = "--cert /etc/redis/host.crt --key /etc/redis/host.key"
            assert "NOAUTH" in client.run(f"{tls} {own} PING").stdout, "the right certificate gets that far"
            for words in (plain, tls, f"{tls} --cert {folder}/host.crt --key {folder}/host.key"):
                done = client.run(f"timeout 5 {words} PING")
                assert done.rc != 0 and not re.search("PONG|NOAUTH", done.stdout), (name, words)
            wrong = f"{plain} --tls --cacert {folder}/host.crt {own} PING"
            assert "certificate verify failed" in client.run(wrong).stderr
    finally:
        client.check_output(f"rm -r {folder}")


def test_nodes_talk_to_each_other_by_tls_alone(stack: Stack) -> None:
    for name in stack.group("redis"):
        for option, value in (("port", "0"), ("tls-replication", "yes"), ("tls-auth-clients", "yes")):
            assert stack.redis("CONFIG", "GET", option, node=name).split() == [option, value]
        listening = stack.host(name).check_output("ss --no-header --listening --tcp --numeric --processes")
        ports = {line.split()[3] for line in listening.splitlines() if "redis-" in line}
        assert ports == {stack.place(name, port) for port in (6379, 26379)}


def test_a_sentinel_that_is_frozen_is_seen(stack: Stack, wait: Callable[..., Any]) -> None:
    """Its connections stay, so Redis counts it as before. The last test here: it looks on for a while afterwards."""
    names = stack.group("redis")
    wait(lambda: query(stack, "max(hothouse_sentinels)") == {"": len(names)}, "every Sentinel", 90)
    host = stack.host(replicas(stack)[0])
    host.check_output("systemctl kill --signal=STOP redis-sentinel.service")
    try:
        wait(lambda: query(stack, "max(hothouse_sentinels)") == {"": len(names) - 1}, "one Sentinel less", 90)
        assert query(stack, "max(hothouse_redis_sentinels)") == {"": len(names)}
    finally:
        host.check_output("systemctl kill --signal=CONT redis-sentinel.service")
