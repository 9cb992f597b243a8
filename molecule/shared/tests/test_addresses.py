"""Both families of addresses: a host that has IPv6 alone, and hosts that have both and speak IPv6 among each other."""

from __future__ import annotations

import http.client
import importlib.util
import ipaddress
import json
import random
import re
import ssl
from collections.abc import Callable
from shlex import quote
from typing import Any

import pytest
from conftest import REPOSITORY, SCENARIO, Stack, exchange, place

pytestmark = [pytest.mark.usefixtures("stack"), pytest.mark.scenarios("local", "staging", "prod")]

only_ipv6 = pytest.mark.scenarios("staging")
both_families = pytest.mark.scenarios("prod")

# Where wrong logins come from: many addresses of one network, then one of another.
GUESSERS, OTHER = "fd00:213:21::{:x}", "fd00:213:22::1"
GUESS = """
import json, socket, ssl, sys
address, name, sources = json.loads(sys.argv[1])
context = ssl._create_unverified_context()
ask = f"GET /flower/ HTTP/1.0\\r\\nHost: {name}\\r\\nAuthorization: Basic b3BzOndyb25n\\r\\n\\r\\n".encode()
for source in sources:
    with socket.create_connection((address, 443), timeout=10, source_address=(source, 0)) as plain:
        with context.wrap_socket(plain, server_hostname=name) as connection:
            connection.sendall(ask)
            print(connection.recv(100).split()[1].decode())
"""


@only_ipv6
def test_the_host_has_no_ipv4_but_that_of_loopback(stack: Stack) -> None:
    for name in stack.variables:
        shown = json.loads(stack.host(name).check_output("ip -json -4 address show"))
        assert {device["ifname"] for device in shown} == {"lo"}, name
        assert stack.host(name).check_output("ip -4 route show") == "", name
        assert ":" in stack.address(name)


def connections(stack: Stack, name: str) -> set[tuple[str, str, str, str]]:
    """The TCP connections of a host that leave it: its address and port, and those of the other side."""
    lines = stack.host(name).check_output("ss --no-header --tcp --numeric state established").splitlines()
    ends = [[end.rpartition(":") for end in line.split()[2:4]] for line in lines]
    return {
        (mine[0].strip("[]"), mine[2], other[0].strip("[]"), other[2])
        for mine, other in ends
        if not other[0].strip("[]").startswith(("127.", "::1"))
    }


@both_families
def test_hosts_speak_ipv6_among_each_other(stack: Stack, wait: Callable[..., Any]) -> None:
    """Replicas and Sentinels, HAProxy and Redis, Prometheus and what it reads, nginx and Flower."""
    names = {stack.address(name): name for name in stack.variables}
    redis = stack.group("redis")
    primary = stack.primary()
    replicas = [name for name in redis if name != primary]
    monitor, nginx, flower = (stack.group(noun)[0] for noun in ("monitor", "nginx", "flower"))
    wanted = {(name, "6379", primary) for name in [*replicas, *stack.group("worker"), flower]}
    wanted |= {(name, "26379", other) for name in redis for other in redis if name != other}
    wanted |= {(monitor, "9100", name) for name in stack.variables if name != monitor}
    wanted |= {(monitor, "9121", name) for name in redis}
    wanted |= {(nginx, "5555", flower)}
    seen = set()

    def all_seen() -> bool:
        """What was seen so far: a connection that a restart cut comes back with the next scrape or request."""
        assert stack.request("/flower/", stack.login).status == 200
        for name in stack.variables:
            for mine, port, other, its_port in connections(stack, name):
                if port == "22":  # how the tests come, from the machine
                    continue
                assert mine == stack.address(name) and ":" in other, (name, mine, port, other, its_port)
                seen.add((name, its_port, names.get(other)))
        return wanted <= seen

    try:
        wait(all_seen, "every connection")
    except AssertionError as error:
        raise AssertionError(f"{error}: {wanted - seen}") from None


@both_families
def test_a_host_that_would_come_from_another_address_is_refused(stack: Stack) -> None:
    """As one does that prefers an address from a router's advertisement."""
    name = stack.group("monitor")[0]
    host = stack.host(name)
    network = str(ipaddress.ip_interface(f"{stack.address(name)}/64").network)
    other = str(ipaddress.ip_network(network)[0x99])
    route = f"{network} dev eth0 metric 1"
    host.check_output(f"ip address add {other}/64 dev eth0 nodad && ip -6 route add {route} src {other}")
    try:
        done = stack.playbook("playbooks/prepare.yml", "--limit", name, check=False)
    finally:
        host.check_output(f"ip -6 route del {route} && ip address del {other}/64 dev eth0")
    said = " ".join(done.stdout.split())
    server = stack.group("redis")[0]
    assert done.returncode and f"would connect to {server} ({stack.address(server)}) from {other}" in said
    assert f"from its private_address, {stack.address(name)}" in said and " changed=0 " in done.stdout


def test_nginx_answers_under_every_address_and_only_to_who_knows_its_name(stack: Stack) -> None:
    nginx = stack.group("nginx")[0]
    name = stack.variables[nginx]["nginx_server_name"]
    development = stack.variables[nginx]["nginx_development_port"]
    found = stack.addresses(nginx)
    assert {":" in address for address in found} == ({True} if SCENARIO == "staging" else {True, False})
    for address in found:
        assert stack.request("/flower/", address=address).status == 401, address
        with pytest.raises((ssl.SSLError, ConnectionError)):
            stack.request("/flower/", name="elsewhere.example.com", address=address)
        for port, known, status in (
            (80, name, 301),
            *([(int(development), "localhost", 302)] if development else []),
        ):
            for host in (known, "elsewhere.example.com", place(address.partition("%")[0], port)):
                connection = http.client.HTTPConnection(address, port, timeout=10)
                if host == known:
                    assert exchange(connection, "/", None, "GET", {"Host": host}).status == status, address
                else:
                    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
                        exchange(connection, "/", None, "GET", {"Host": host})


@only_ipv6
def test_wrong_logins_are_counted_by_network(stack: Stack) -> None:
    """Whoever has one IPv6 address has as many as they like."""
    nginx = stack.group("nginx")[0]
    host, name = stack.host(nginx), stack.variables[nginx]["nginx_server_name"]
    sources = [GUESSERS.format(number) for number in range(1, 41)]
    try:
        for source in [*sources, OTHER]:
            host.check_output(f"ip address add {source}/128 dev lo nodad")
        arguments = json.dumps([stack.address(nginx), name, [*sources, OTHER]])
        said = host.check_output(f"python3 -c {quote(GUESS)} {quote(arguments)}").split()
    finally:
        for source in [*sources, OTHER]:
            host.run(f"ip address del {source}/128 dev lo")
    assert said[0] == "401" and "429" in said[:-1]
    assert said[-1] == "401", "another network was held for the same"


@only_ipv6
def test_nginx_starts_on_a_kernel_without_ipv6(stack: Stack) -> None:
    """Its configuration then has no such line; the unit tests see to that. Here systemd takes IPv6 from a process."""
    host = stack.first("nginx")
    run = "systemd-run --quiet --pipe --wait --collect --property='RestrictAddressFamilies=AF_UNIX AF_INET' nginx -t -q"
    done = host.run(f"{run} -c /etc/nginx/nginx.conf")
    assert done.rc and "Address family not supported" in done.stderr
    folder = host.check_output("mktemp --directory")
    try:
        host.check_output(f"sed '/listen \\[::\\]/d' /etc/nginx/nginx.conf >{folder}/nginx.conf")
        host.check_output(f"{run} -c {folder}/nginx.conf")
    finally:
        host.check_output(f"rm -r {folder}")


@only_ipv6
def test_the_kernel_takes_the_rules_of_any_addresses(stack: Stack) -> None:
    """nft of the host reads what the filter makes of generated addresses and networks of both families."""
    spec = importlib.util.spec_from_file_location("filters", REPOSITORY / "plugins/filter/hothouse.py")
    assert spec and spec.loader
    filters = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(filters)
    draw = random.Random(6)
    lines = []
    for number in range(300):
        texts = []
        for _ in range(draw.randint(0, 6)):
            bits, kind = draw.choice([(32, ipaddress.IPv4Network), (128, ipaddress.IPv6Network)])
            value, length = draw.getrandbits(bits), draw.choice([bits, bits, draw.randint(0, bits)])
            texts.append(str(kind((value, length), strict=False)))
        port = draw.choice([str(1 + number), f"{1 + number}-{2000 + number}"])
        rule = {"name": "own", "protocol": draw.choice(["tcp", "udp"]), "port": port, "from": texts}
        lines += filters.nft_rules([rule])
    assert any("ip saddr" in line for line in lines) and any("ip6 saddr" in line for line in lines)
    rules = "\n".join(lines)
    text = f"table inet generated {{\nchain input {{\ntype filter hook input priority 0;\n{rules}\n}}\n}}\n"
    done = stack.first("nginx").run(f"nft --check --file - <<'END'\n{text}END")
    assert done.rc == 0, re.sub(r"\s+", " ", done.stderr)[:1000]
