"""Changing the firewall locks nobody out and touches nothing else; a host whose clock is off is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Stack
from test_firewall import LISTED, RULES, STRANGE_PORTS, listeners, scan

__all__ = ["listeners"]  # a fixture

ROLLBACK_SECONDS = 12

# Only two of them look at more than one host.
pytestmark = [pytest.mark.usefixtures("stack"), pytest.mark.scenarios("local")]
several_hosts_too = pytest.mark.scenarios("local", "prod")


def test_whoever_reloads_the_tables_of_the_host_gets_these_again(
    stack: Stack, wait: Callable[..., Any]
) -> None:
    host = stack.first("nginx")
    before = host.check_output(LISTED)
    try:
        for verb in ("start", "reload", "restart", "stop"):
            host.check_output(f"systemctl {verb} nftables.service")  # empties the kernel's tables first
            wait(lambda: host.run(LISTED).stdout.strip() == before, f"{verb} nftables.service", 10)
    finally:
        host.check_output("systemctl stop nftables.service")
    wait(lambda: host.run(LISTED).stdout.strip() == before, "the rules as before", 10)


def test_a_rule_of_ones_own_opens_a_port_and_other_tables_stay(stack: Stack, listeners: None) -> None:
    name = stack.group("nginx")[0]
    host, port = stack.host(name), STRANGE_PORTS[1]
    target = {name: stack.address(name)}
    route = subprocess.run(
        ["ip", "-json", "route", "get", stack.address(name)], capture_output=True, text=True, check=True
    ).stdout
    gateway = json.loads(route)[0]["prefsrc"]
    host.check_output("nft add table inet somebody")
    try:
        rule = json.dumps({"prepare_firewall_rules": [{"port": str(port), "from": [gateway]}]})
        done = stack.playbook("playbooks/prepare.yml", "-e", rule, "--limit", name)
        assert " changed=1 " in done.stdout
        assert scan(stack, None, target, {port, 1234}) == {name: {port}}
        stack.playbook("playbooks/prepare.yml", "--limit", name)
        assert scan(stack, None, target, {port, 1234}) == {name: set()}
        assert "table inet somebody" in host.check_output("nft list tables")
    finally:
        host.check_output("nft delete table inet somebody")


def test_without_the_firewall_nothing_of_it_is_left(stack: Stack, listeners: None) -> None:
    name = stack.group("nginx")[0]
    host, target = stack.host(name), {name: stack.address(name)}
    try:
        stack.playbook("playbooks/prepare.yml", "-e", '{"prepare_firewall": false}', "--limit", name)
        assert host.run(LISTED).rc != 0 and not host.service("hothouse-firewall").is_enabled
        assert scan(stack, None, target, {1234}) == {name: {1234}}
    finally:
        stack.playbook("playbooks/prepare.yml", "--limit", name)
    assert scan(stack, None, target, {1234}) == {name: set()}


@several_hosts_too
def test_addresses_that_leave_this_run_out_are_refused_before_anything_changes(stack: Stack) -> None:
    before = {name: stack.host(name).check_output(LISTED) for name in stack.variables}
    done = stack.playbook(
        "playbooks/prepare.yml", "-e", '{"prepare_ssh_addresses": ["192.0.2.0/24"]}', check=False
    )
    message = " ".join(done.stdout.split())
    assert done.returncode != 0 and "would lock this run out of" in message, done.stdout[-5000:]
    assert "prepare_ssh_addresses" in message and "they were not applied" in message
    assert all("changed=0" in line for line in done.stdout.splitlines() if " ok=" in line)
    assert {name: stack.host(name).check_output(LISTED) for name in stack.variables} == before


def lock_out(stack: Stack, name: str) -> Path:
    """A playbook whose rules let no SSH in, though they are said to."""
    rules = (
        "table inet hothouse\ndelete table inet hothouse\n"
        "table inet hothouse {\n chain input {\n  type filter hook input priority filter; policy drop;\n"
        "  ct state established accept\n  ip saddr 192.0.2.1 tcp dport 22 accept\n }\n}\n"
    )
    task = {"rules": rules, "path": RULES, "accepts": [{"port": 22}], "rollback_seconds": ROLLBACK_SECONDS}
    path = stack.credentials_file.parent / "lock-out.yml"
    play = {"name": "Lock out", "hosts": name, "gather_facts": False}
    path.write_text(yaml.safe_dump([play | {"tasks": [{"name": "Lock out", "hothouse_firewall": task}]}]))
    return path


@pytest.mark.parametrize("killed", [False, True])
def test_rules_that_lock_ssh_out_are_taken_back_by_the_host_itself(
    stack: Stack, wait: Callable[..., Any], killed: bool
) -> None:
    """Also when nobody is left to do it. The connection of the tests is an old one, which such rules do not end."""
    name = stack.group("nginx")[0]
    host = stack.host(name)
    before, file = host.check_output(LISTED), host.file(RULES).content_string
    run = subprocess.Popen(
        ["ansible-playbook", *stack.inventory_options, str(lock_out(stack, name))],
        cwd=REPOSITORY, env=stack.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait(lambda: "192.0.2.1" in host.run(LISTED).stdout, "the rules", 20)
        # A start of the host at this moment would load the old ones.
        assert host.file(RULES).content_string == file
        assert scan(stack, None, {name: stack.address(name)}, {22}) == {name: set()}
        if killed:
            os.killpg(run.pid, signal.SIGKILL)
        output = " ".join(run.communicate(timeout=60)[0].split())
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    if not killed:
        assert run.returncode == 2 and "no new SSH connection to" in output and "taken back" in output, output
    wait(lambda: host.run(LISTED).stdout.strip() == before, "the old rules", ROLLBACK_SECONDS + 5)
    assert scan(stack, None, {name: stack.address(name)}, {22}) == {name: {22}}
    assert host.file(RULES).content_string == file
    done = stack.playbook("playbooks/prepare.yml", "--limit", name)
    assert " changed=0 " in done.stdout


@several_hosts_too
def test_a_clock_that_is_off_is_refused_before_anything_changes(stack: Stack) -> None:
    name = list(stack.variables)[-1]
    host = stack.host(name)
    host.check_output(
        'printf \'#!/bin/sh\\nexec /usr/bin/date --date="-5 seconds" "$@"\\n\' >/usr/local/bin/date && '
        "chmod 0755 /usr/local/bin/date"
    )
    try:
        done = stack.playbook("playbooks/prepare.yml", check=False)
    finally:
        host.check_output("rm /usr/local/bin/date")
    message = " ".join(done.stdout.split())
    assert done.returncode != 0 and "The clocks are more than 2.0 s apart" in message
    assert any(f"{name} {seconds} s" in message for seconds in ("-4.9", "-5.0", "-5.1"))
    assert all("changed=0" in line for line in done.stdout.splitlines() if " ok=" in line)
