"""Redis: no one without a password, everyone with the least rights, nothing evicted, everything written down."""

from __future__ import annotations

import contextlib
import re
import socket

import pytest
from conftest import Stack

# Redis of own-app is that of staging.
pytestmark = pytest.mark.scenarios("local", "staging", "prod")


@pytest.fixture(autouse=True)
def only_expected_refusals(stack: Stack) -> None:
    """The refusals that a test provokes are its own: before each of them the log has to be empty."""
    assert stack.refusals() == []


def provoked(stack: Stack) -> int:
    """How many refusals Redis counted; forgotten afterwards."""
    return sum(log.count("reason") for log in stack.refusals())


def test_nobody_was_refused_a_command_since_the_hosts_came_up(stack: Stack) -> None:
    """The fixture of this file asserts it, at its best before the other tests provoke refusals."""
    assert stack.redis("PING") == "PONG"


def test_redis_rejects_clients_without_a_password(stack: Stack) -> None:
    for name in stack.group("redis"):
        for command in ("PING", "ACL LIST"):
            assert "NOAUTH" in stack.host(name).run(f"REDISCLI_AUTH= hothouse-redis-cli {command}").stdout
    for password in ("", "x"):
        assert "NOAUTH" in stack.redis("PING", user="default", password=password)
    assert provoked(stack) >= 1


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("worker", ["CONFIG", "GET", "*"]),
        ("worker", ["KEYS", "*"]),
        ("worker", ["FLUSHALL"]),
        ("worker", ["ACL", "LIST"]),
        ("worker", ["GET", "app:x"]),
        ("worker", ["GET", "redbeat::lock"]),
        ("beat", ["BRPOP", "q:default", "1"]),
        ("beat", ["GET", "r:x"]),
        ("beat", ["GET", "app:x"]),
        ("flower", ["LPUSH", "q:default", "x"]),
        ("flower", ["BRPOP", "q:default", "1"]),
        ("flower", ["HGET", "q:unacked", "x"]),
        ("flower", ["GET", "app:x"]),
        ("exporter", ["LPUSH", "q:default", "x"]),
        ("exporter", ["DEL", "q:default"]),
        ("exporter", ["CONFIG", "GET", "*"]),
        ("exporter", ["EVAL", 'return redis.call("GET", "app:x")', "0"]),
        ("app", ["BRPOP", "q:default", "1"]),
        ("app", ["HGET", "q:unacked", "x"]),
        ("app", ["SET", "r:x", "1"]),
        ("app", ["FLUSHDB"]),
        ("app", ["KEYS", "*"]),
        ("app", ["SCRIPT", "FLUSH"]),
        ("app", ["SHUTDOWN", "NOSAVE"]),
        # Users of an environment with several Redis hosts.
        *(
            pytest.param(user, command, marks=pytest.mark.scenarios("prod"))
            for user, command in (
                ("haproxy", ["GET", "app:x"]),
                ("haproxy", ["CONFIG", "GET", "*"]),
                ("replica", ["GET", "app:x"]),
                ("replica", ["SHUTDOWN", "NOSAVE"]),
                ("sentinel", ["GET", "app:x"]),
                ("sentinel", ["CONFIG", "SET", "dir", "/tmp"]),
                ("sentinel", ["PUBLISH", "q:/0.celery.pidbox", "x"]),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_each_user_is_refused_what_its_part_does_not_need(
    stack: Stack, user: str, command: list[str]
) -> None:
    # In a script each version says it in its own way.
    assert re.search("NOPERM|ACL failure in script|can't run this command", stack.redis(*command, user=user))
    assert provoked(stack) == 1


def test_an_old_password_or_anothers_is_refused(stack: Stack) -> None:
    assert "NOAUTH" in stack.redis("PING", user="worker", password=stack.secrets["redis_beat"])
    assert provoked(stack) == 1


def test_nothing_is_evicted_and_everything_is_appended(stack: Stack) -> None:
    assert stack.redis("CONFIG", "GET", "maxmemory-policy").split() == ["maxmemory-policy", "noeviction"]
    assert stack.redis("CONFIG", "GET", "appendonly").split() == ["appendonly", "yes"]
    assert int(stack.redis("CONFIG", "GET", "maxmemory").split()[1]) > 0
    assert "aof_last_write_status:ok" in stack.redis("INFO", "persistence")


def test_passwords_are_on_the_host_as_hashes_only_where_redis_reads_them(stack: Stack) -> None:
    text = stack.first("redis").file("/etc/redis/users.acl").content_string
    assert text.startswith("user default off")
    for name, secret in stack.secrets.items():
        if name.startswith("redis_"):
            assert secret not in text, name


def test_the_protocol_port_answers_no_stranger_on_the_network(stack: Stack) -> None:
    for name in stack.group("redis"):
        if not stack.variables[name]["private_tls"]:
            with pytest.raises(OSError):
                socket.create_connection((stack.address(name), 6379), timeout=3)
            continue
        # The firewall drops whoever is no host of the environment, and Redis talks to nobody without TLS.
        with (
            contextlib.suppress(OSError),
            socket.create_connection((stack.address(name), 6379), timeout=3) as plain,
        ):
            plain.sendall(b"PING\r\n")
            assert not plain.recv(100).startswith((b"+", b"-"))


def test_transactions_survive_a_restart(stack: Stack) -> None:
    """The append-only file is replayed as the user `default`, which nobody can log in as but which needs its rights."""
    host = stack.host(stack.primary())
    host.check_output(
        "printf 'MULTI\\nSET app:kept yes\\nHSET app:table a 1\\nEXEC\\n' | hothouse-redis-cli --primary"
    )
    host.check_output("systemctl restart redis-server.service")
    assert stack.redis("GET", "app:kept") == "yes"
    assert stack.redis("HGET", "app:table", "a") == "1"
    assert stack.refusals() == []
    stack.redis("DEL", "app:kept", "app:table")


def test_a_reload_takes_new_rights_without_a_restart(stack: Stack) -> None:
    """Redis goes on with its data and its role; only connections of users may be closed, and come back."""
    for name in stack.group("redis"):
        host = stack.host(name)
        before = host.check_output("systemctl show --value -p MainPID redis-server.service")
        host.check_output("systemctl reload redis-server.service")
        assert host.check_output("systemctl show --value -p MainPID redis-server.service") == before
        assert stack.redis("PING", node=name) == "PONG"
