"""Every host, whatever it carries: healthy under systemd, its units up and fenced in, few doors."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Stack

pytestmark = pytest.mark.usefixtures("stack")


def listening(stack: Stack, host: str) -> set[tuple[str, int]]:
    """Every TCP socket that listens: address and port."""
    lines = stack.host(host).check_output("ss --no-header --listening --tcp --numeric").splitlines()
    return {
        (local.rpartition(":")[0], int(local.rpartition(":")[2]))
        for local in (line.split()[3] for line in lines)
    }


def allowed(stack: Stack, host: str) -> set[tuple[str, int]]:
    """Every TCP socket that may listen there, from the inventory; IPv6 addresses in brackets, as ss prints them."""
    variables = stack.variables[host]
    private, redis, mail = (
        f"[{variables[name]}]" if ":" in str(variables[name]) else variables[name]
        for name in ("private_address", "redis_listen_address", "mail_listen_address")
    )
    sockets = {("0.0.0.0", 22), ("[::]", 22)}
    if "redis" in variables["group_names"]:
        sockets |= {(redis, 6379)}
        sockets |= {(private, 26379)} if variables["redis_replicated"] else set()
    # HAProxy: in front of what has clients on other hosts, and the way to Redis.
    sockets |= {(private, service["port"]) for service in variables["haproxy_services"]}
    if variables["haproxy_redis_nodes"]:
        sockets |= {("127.0.0.1", 6379)} | ({("127.0.0.1", 8405)} if stack.group("monitor") else set())
    if "flower" in variables["group_names"]:
        sockets |= {("127.0.0.1", 5555)}
    if "nginx" in variables["group_names"]:
        development = variables["nginx_development_port"]
        for port in (80, 443, *([int(development)] if development else [])):
            sockets |= {("0.0.0.0", port), ("[::]", port)}
    for part, port in (("node", 9100), ("redis", 9121), ("nginx", 9113)):
        if part in variables["monitor_parts"]:
            sockets |= {("127.0.0.1", port)}
    if "nginx" in variables["monitor_parts"]:
        sockets |= {("127.0.0.1", 8081)}
    if "server" in variables["monitor_parts"]:
        sockets |= {("127.0.0.1", port) for port in (9090, 9093, 9115)}
    if "mail" in variables["group_names"]:
        sockets |= {(mail, 1025)}
    return sockets


def test_systemd_is_running_and_no_unit_has_failed(stack: Stack) -> None:
    for name in stack.variables:
        host = stack.host(name)
        assert host.run("systemctl --failed --no-legend --plain").stdout == "", name
        assert host.check_output("systemctl is-system-running --wait") == "running", name


def test_every_unit_is_enabled_active_and_has_not_been_restarted(stack: Stack) -> None:
    for name in stack.variables:
        host = stack.host(name)
        units = [*stack.units(name)]
        units += ["redis-server.service"] * (name in stack.group("redis"))
        units += ["nginx.service"] * (name in stack.group("nginx"))
        assert units, name
        for unit in units:
            service = host.service(unit.removesuffix(".service"))
            assert service.is_enabled, (name, unit)
            assert service.is_running, (name, unit)
            assert host.check_output(f"systemctl show --value -p NRestarts {unit}") == "0", (name, unit)


def test_units_of_ours_are_hardened(stack: Stack) -> None:
    for name in stack.variables:
        for unit in stack.units(name):
            line = stack.host(name).check_output(f"systemd-analyze security --no-pager {unit} | tail -n 1")
            assert float(line.split(":")[1].split()[0]) <= 1.5, (name, unit, line)


def test_the_stop_of_a_worker_gives_tasks_back(stack: Stack) -> None:
    for worker in stack.workers:
        unit, _, host = worker.partition("@")
        shown = stack.host(host).check_output(
            "systemctl show -p KillMode,Restart,TimeoutStopUSec,Type,Environment,User,OOMPolicy "
            f"celery-worker@{unit}.service"
        )  # fmt: skip
        properties: dict[str, Any] = dict(line.split("=", 1) for line in shown.splitlines())
        assert (properties["KillMode"], properties["Restart"], properties["Type"]) == (
            "mixed",
            "always",
            "notify",
        )
        assert (properties["TimeoutStopUSec"], properties["User"]) == ("30s", "hothouse-worker")
        assert "REMAP_SIGTERM=SIGQUIT" in properties["Environment"]
        assert properties["OOMPolicy"] == "continue"


def test_nothing_listens_but_what_the_inventory_asks_for(stack: Stack) -> None:
    for name in stack.variables:
        assert listening(stack, name) == allowed(stack, name), name


def test_files_have_the_owner_and_mode_that_their_content_asks_for(stack: Stack) -> None:
    for name in stack.variables:
        host = stack.host(name)
        credentials = host.run(
            "find /etc/hothouse/credentials -printf '%y %m %u:%g %p\\n'"
        ).stdout.splitlines()
        if set(stack.variables[name]["group_names"]) & {"redis", "app", "flower"}:
            assert len(credentials) > 1, name
        for line in credentials:
            kind, mode, owner, path = line.split()
            assert (mode, owner) == ({"d": "700", "f": "600"}[kind], "root:root"), (name, path)
        writable = host.run(
            "find /etc/hothouse /opt/hothouse -not -type l \\( -perm /022 -o -not -user root \\)"
        )
        assert writable.stdout == "", name
    assert stack.first("redis").file("/etc/redis/users.acl").mode == 0o640
    assert stack.first("nginx").file("/etc/nginx/hothouse.key").mode == 0o600


@pytest.mark.scenarios("local", "staging", "prod")
def test_the_whole_stack_on_one_host_fits_in_512_megabytes(stack: Stack) -> None:
    """Proportional set sizes, so that what processes share counts once. The libraries of own-app are its own."""
    for name in stack.variables:
        sizes = stack.host(name).check_output(
            "cat /proc/[0-9]*/smaps_rollup 2>/dev/null | awk '/^Pss:/ {sum += $2} END {print sum}'"
        )
        assert int(sizes) < 512 * 1024, name
