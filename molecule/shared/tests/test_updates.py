"""Security updates install themselves, and an upgrade of the packages below a running stack loses no task."""

from __future__ import annotations

import re
from collections.abc import Callable
from shlex import quote
from typing import Any

import pytest
import test_rotation
from conftest import Stack
from testinfra.host import Host

pytestmark = pytest.mark.scenarios("prod")

# Tasks that are published without a pause.
publisher = test_rotation.publisher

FIGURES = "/var/lib/prometheus/node-exporter/upkeep.prom"
# An upgrade as dpkg carries it out, with the scripts of the packages. To dpkg it is as if the packages' own
# configuration had changed in between, in each of the files that ours took the place of: without our settings it would
# ask, and end.
UPGRADE = r"""
set -eu
for package in "$@"; do
  awk -v wanted="Package: $package" '
    /^Package: / { mine = $0 == wanted } /^[^ ]/ { conffiles = mine && /^Conffiles:/ }
    conffiles && /^ / { $2 = "00000000000000000000000000000000"; $0 = " " $0 } { print }
  ' /var/lib/dpkg/status >/var/lib/dpkg/status.test
  mv /var/lib/dpkg/status.test /var/lib/dpkg/status
done
DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get install --yes --quiet --reinstall "$@" </dev/null
"""
CONFIGURED = {
    "redis-server": "/etc/redis/redis.conf",
    "redis-sentinel": "/etc/redis/sentinel.conf",
    "haproxy": "/etc/haproxy/haproxy.cfg",
    "nginx-common": "/etc/nginx/nginx.conf",
}
# The binaries that the scripts of nginx-common do not restart alone.
TOGETHER = {"nginx-common": ["nginx-common", "nginx"]}


def upgrade(host: Host, packages: list[str]) -> None:
    words = [word for package in packages for word in TOGETHER.get(package, [package])]
    done = host.run(f"bash -c {quote(UPGRADE)} upgrade {' '.join(words)}")
    assert done.rc == 0, done.stdout + done.stderr


def started(host: Host, unit: str) -> str:
    return host.check_output(f"systemctl show --property=ExecMainStartTimestampMonotonic --value {unit}")


@pytest.fixture(scope="module")
def updating(stack: Stack) -> list[str]:
    """Two hosts, of either Debian, that install security updates by themselves, which local hosts do not."""
    hosts = [next(name for name in stack.group("redis") if name != stack.primary()), *stack.group("nginx")]
    assert all(
        'Unattended-Upgrade "0";' in stack.host(name).check_output("apt-config dump") for name in hosts
    )
    stack.playbook("playbooks/prepare.yml", "--limit", ",".join(hosts), "-e", "prepare_security_updates=true")
    return hosts


def test_an_upgrade_of_the_packages_loses_no_task(
    stack: Stack,
    publisher: None,
    wait: Callable[..., Any],
) -> None:
    """Of Redis, Sentinel, HAProxy and nginx, on one host after the other as their times of the day have it."""
    load = test_rotation.Load(stack)
    load.before = load.count()
    primary = stack.primary()
    # The primary in between: the next one is upgraded as well.
    redis = sorted(stack.group("redis"), key=lambda name: (name == primary, name))
    for name in [redis[0], primary, *redis[1:-1], stack.group("worker")[0], *stack.group("nginx")]:
        host = stack.host(name)
        packages = [package for package in CONFIGURED if host.package(package).is_installed]
        assert packages, name
        files = {path: host.file(path).sha256sum for path in map(CONFIGURED.__getitem__, packages)}
        upgrade(host, packages)
        assert {path: host.file(path).sha256sum for path in files} == files, name
        for package in packages:
            assert host.service(package.removesuffix("-common")).is_running, (name, package)
        if name in redis:
            assert stack.redis("PING", node=name) == "PONG"
        if name == primary:  # it handed over, and may be handed over to when the next one is upgraded
            assert stack.primary() != primary
    wait(
        lambda: all(
            "master_link_status:down" not in stack.redis("INFO", "replication", node=name) for name in redis
        ),
        "all follow",
        60,
    )
    assert load.count() > 100
    # Of a worker that lost its connection as it took one Redis holds it, and gives it out again after a while.
    held = stack.redis("HVALS", "q:unacked")
    assert [task for task in load.unfinished().split() if task not in held] == []
    assert stack.request("/flower/", stack.login).status == 200


def test_what_a_host_is_not_to_run_stays_stopped_through_an_upgrade(stack: Stack) -> None:
    """As the second Sentinel of an environment that is back to one Redis, or a noun that was taken from a host."""
    host = stack.host(stack.group("worker")[0])
    host.check_output("systemctl disable --now chrony")
    try:
        upgrade(host, ["chrony"])
        assert not host.service("chrony").is_running
        assert not host.service("chrony").is_enabled
    finally:
        host.check_output("systemctl enable --now chrony")


def test_no_two_hosts_install_updates_at_once(stack: Stack) -> None:
    slots = [
        values["prepare_security_updates_slot"]
        for values in stack.values(["prepare_security_updates_slot"]).values()
    ]
    assert sorted(slots) == list(range(len(slots)))


def test_security_updates_are_installed_by_themselves(stack: Stack, updating: list[str]) -> None:
    times = set()
    for name in updating:
        host = stack.host(name)
        timer = host.check_output(
            "systemctl show -p TimersCalendar -p RandomizedDelayUSec -p ActiveState apt-daily-upgrade.timer"
        )
        assert "ActiveState=active" in timer and "RandomizedDelayUSec=0" in timer
        times.add(re.findall(r"OnCalendar=(.*?) ;", timer)[0])
        # What the timer starts, and in words.
        host.check_output("systemctl start apt-daily-upgrade.service")
        assert (
            host.check_output("systemctl show --property=Result --value apt-daily-upgrade.service")
            == "success"
        )
        said = host.check_output("unattended-upgrade --dry-run --verbose 2>&1")
        allowed = re.search(r"Allowed origins are: (.*)", said)
        assert allowed and all("label=Debian-Security" in origin for origin in allowed[1].split(", origin="))
        age = "$(( $(date +%s) - $(stat --format %Y /var/lib/apt/periodic/unattended-upgrades-stamp) ))"
        assert int(host.check_output(f"echo {age}")) < 300
    assert len(times) == len(updating)


def test_no_update_begins_while_a_run_is_at_work(stack: Stack, updating: list[str]) -> None:
    host = stack.host(updating[0])
    host.check_output("echo somebody >/run/hothouse-run")
    try:
        host.run("systemctl start apt-daily-upgrade.service")
        assert (
            host.check_output("systemctl show --property=Result --value apt-daily-upgrade.service")
            == "exec-condition"
        )
    finally:
        host.check_output(": >/run/hothouse-run; systemctl start apt-daily-upgrade.service")


def test_what_runs_old_code_is_told_and_not_restarted(
    stack: Stack, updating: list[str], wait: Callable[..., Any]
) -> None:
    """After an upgrade of a library, here of OpenSSL."""
    for name in updating:
        host = stack.host(name)
        units = [
            unit
            for unit in ("redis-server", "nginx", "haproxy")
            if host.run(f"systemctl is-active {unit}").rc == 0
        ]
        before = {unit: started(host, unit) for unit in units}
        library = host.check_output("dpkg-query --show --showformat='${Package}\\n' 'libssl3*' | head -n 1")
        host.check_output(
            f"DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --reinstall {library}"
        )
        host.check_output("touch --date='8 days ago' /run/reboot-required; systemctl start hothouse-upkeep")
        try:
            figures = host.file(FIGURES).content_string
        finally:
            host.check_output("rm /run/reboot-required; systemctl start hothouse-upkeep")
        told = set(re.findall(r'hothouse_restart_needed\{name="(.+)"\} 1', figures))
        assert {f"{unit}.service" for unit in units} <= told
        assert {unit: started(host, unit) for unit in units} == before
        since = re.search(r"^hothouse_reboot_needed_since_seconds (\d+)$", figures, re.MULTILINE)
        now = int(host.check_output("date +%s"))
        assert since and 8 * 86400 - 60 < now - int(since[1]) < 8 * 86400 + 600
        assert "hothouse_reboot_needed_since_seconds 0\n" in host.file(FIGURES).content_string
    query = "/prometheus/api/v1/query?query=count(count+by+(instance)(hothouse_restart_needed))"
    wait(
        lambda: stack.request(query, stack.login).json()["data"]["result"],
        "the figures are in Prometheus",
    )
