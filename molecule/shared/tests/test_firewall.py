"""The firewall lets in what the inventory asks for and nothing else; chrony runs.

A port is open only where something listens. So the scans try every port that something listens on, on any host and any
address, the well-known ones, and those of listeners that a test puts where no service should be reached.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from shlex import quote
from typing import Any

import pytest
from conftest import Stack

# The firewall of own-app is that of staging.
pytestmark = [pytest.mark.usefixtures("stack"), pytest.mark.scenarios("local", "staging", "prod")]

RULES = "/etc/hothouse/firewall.nft"
LISTED = "nft --stateless list table inet hothouse"
LISTENER = "hothouse-test-listener"
STRANGE_PORTS = (1234, 8000, 50000)  # of no service
DHCPV6_PORT = 546  # of the client

# Connects to many ports at once; a second packet follows the first after one second. Prints which of them answered.
SCAN = """
import errno, json, resource, select, socket, sys, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
targets, ports = json.loads(sys.argv[1])
wanted = [(name, address, port) for name, address in targets.items() for port in ports]
size = min(hard - 100, 4000)
seen = {name: {"open": [], "refused": []} for name in targets}
for first in range(0, len(wanted), size):
    poll, waiting, deadline = select.epoll(), {}, time.monotonic() + 2.5
    for name, address, port in wanted[first : first + size]:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        connection = socket.socket(family, kind, protocol)
        connection.setblocking(False)
        connection.connect_ex(place)
        poll.register(connection, select.EPOLLOUT)
        waiting[connection.fileno()] = name, port, connection
    while waiting and time.monotonic() < deadline:
        for number, _ in poll.poll(0.1):
            name, port, connection = waiting.pop(number)
            said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            poll.unregister(number)
            connection.close()
            if said in (0, errno.ECONNREFUSED):
                seen[name]["refused" if said else "open"].append(port)
    for _, _, connection in waiting.values():
        connection.close()
print(json.dumps(seen))
"""
# Accepts on these ports of each address of the network device, unless a service does, and answers UDP there.
LISTEN = """
import json, os, select, socket, subprocess, sys
address, ports, others = json.loads(sys.argv[1])
shown = json.loads(subprocess.check_output(["ip", "-json", "address", "show", "dev", "eth0"]))[0]["addr_info"]
places = {entry["local"]: 0 for entry in shown} | {
    entry["local"]: socket.if_nametoindex("eth0") for entry in shown if entry["scope"] == "link"
}
poll, held = select.epoll(), {}
for where, zone in places.items():
    family = socket.AF_INET6 if ":" in where else socket.AF_INET
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        for port in ports if where == address else others:
            held_one = socket.socket(family, kind)
            held_one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                held_one.bind((where, port, 0, zone) if zone else (where, port))
            except OSError:
                continue
            if kind == socket.SOCK_STREAM:
                held_one.listen(100)
            else:
                poll.register(held_one, select.EPOLLIN)
            held[held_one.fileno()] = held_one
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
while True:
    for number, _ in poll.poll():
        text, sender = held[number].recvfrom(100)
        held[number].sendto(text, sender)
"""


def public_ports(stack: Stack, host: str) -> set[int]:
    """What anybody may connect to."""
    variables = stack.variables[host]
    ports = {22}
    if "nginx" in variables["group_names"]:
        ports |= {80, 443} | (
            {int(variables["nginx_development_port"])} - {0} if variables["nginx_development_port"] else set()
        )
    return ports


def allowed(stack: Stack, host: str, client: str | None) -> set[int]:
    """What another host may connect to, from who talks to whom in the inventory; None is a stranger."""
    services: list[dict[str, Any]] = stack.variables[host]["private_services"]
    return public_ports(stack, host) | {
        int(service["port"])
        for service in services
        if host in service["hosts"] and client in service["clients"]
    }


def service_ports(stack: Stack) -> set[int]:
    """The ports of everything that hosts offer each other, wherever it is."""
    return {
        int(service["port"]) for values in stack.variables.values() for service in values["private_services"]
    }


def listening(stack: Stack, host: str) -> set[int]:
    lines = stack.host(host).check_output("ss --no-header --listening --tcp --numeric").splitlines()
    return {int(line.split()[3].rpartition(":")[2]) for line in lines}


@pytest.fixture(scope="module")
def listeners(stack: Stack) -> Iterator[None]:
    """On every host something listens on the port of each service that nobody should reach there."""
    everywhere = service_ports(stack) | {*STRANGE_PORTS, DHCPV6_PORT}
    for name in stack.variables:
        meant = set().union(*(allowed(stack, name, client) for client in stack.variables))
        arguments = json.dumps([stack.address(name), sorted(everywhere - meant), sorted(everywhere | meant)])
        stack.host(name).check_output(
            f"systemd-run --quiet --collect --unit={LISTENER} --service-type=notify --property=NotifyAccess=all "
            f"python3 -c {quote(LISTEN)} {quote(arguments)}"
        )
    yield
    for name in stack.variables:
        stack.host(name).check_output(f"systemctl stop {LISTENER}.service")


def scan(stack: Stack, source: str | None, targets: dict[str, str], ports: set[int]) -> dict[str, set[int]]:
    """The open ports of each target, seen from a host or, None, from the machine that runs them; none may refuse."""
    arguments = json.dumps([targets, sorted(ports)])
    if source:
        text = stack.host(source).check_output(f"python3 -c {quote(SCAN)} {quote(arguments)}")
    else:
        text = subprocess.run(
            [sys.executable, "-c", SCAN, arguments], capture_output=True, text=True, check=True
        ).stdout
    seen: dict[str, dict[str, list[int]]] = json.loads(text)
    # What is not let in is dropped without an answer.
    assert {name: found["refused"] for name, found in seen.items()} == {name: [] for name in targets}, source
    return {name: set(found["open"]) for name, found in seen.items()}


def test_open_ports_are_those_of_the_allow_list_from_every_host_and_from_outside(
    stack: Stack, listeners: None
) -> None:
    ports = {*range(1, 1025), *STRANGE_PORTS, *service_ports(stack)}
    for name in stack.variables:
        ports |= listening(stack, name)
    sources = [None, *(stack.variables if len(stack.variables) > 1 else ())]
    with ThreadPoolExecutor() as pool:
        seen = dict(
            zip(
                sources,
                pool.map(
                    lambda source: scan(
                        stack,
                        source,
                        {name: stack.address(name) for name in stack.variables if name != source},
                        ports,
                    ),
                    sources,
                ),
                strict=True,
            )
        )
    assert seen == {
        source: {name: allowed(stack, name, source) for name in stack.variables if name != source}
        for source in sources
    }


def test_no_other_address_is_a_way_around_it(stack: Stack, listeners: None) -> None:
    """Of IPv4, of IPv6, of the link: open is what is open to anybody, from outside and from another host."""
    ports = {*range(1, 100), *STRANGE_PORTS, *service_ports(stack)}
    ports |= {port for name in stack.variables for port in public_ports(stack, name)}
    others = {
        f"{name} {address}": address
        for name in stack.variables
        for address in stack.addresses(name)
        if address != stack.address(name)
    }
    assert any(":" in address for address in others.values())
    beside = next(iter(stack.variables))
    targets = {
        key: address for key, address in others.items() if key.split()[0] != beside and "%" not in address
    }
    for source, places in ((None, others), (beside, targets)):
        for key, found in (scan(stack, source, places, ports) if places else {}).items():
            assert found == public_ports(stack, key.split()[0]), (source, key)


def answers(address: str, port: int) -> bool:
    """Whether a datagram from this machine is answered."""
    family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as sender:
        sender.settimeout(0.5)
        sender.sendto(b"hello", place)
        try:
            return sender.recv(100) == b"hello"
        except TimeoutError:
            return False


def test_no_datagram_gets_in(stack: Stack, listeners: None) -> None:
    for name in stack.variables:
        assert not answers(stack.address(name), STRANGE_PORTS[0])
        ask = "import socket, sys; s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, 2); "
        ask += (
            "s.settimeout(5); s.sendto(b'hello', (sys.argv[1], int(sys.argv[2]))); print(s.recv(9).decode())"
        )
        said = stack.host(name).check_output(f'python3 -c "{ask}" {stack.address(name)} {STRANGE_PORTS[0]}')
        assert said == "hello", "nobody would have answered"


def test_what_ipv6_lives_by_gets_in(stack: Stack, listeners: None) -> None:
    """The answer of a DHCPv6 server on the link, whatever port it comes from, and who asks for the way to the host."""
    name = next(iter(stack.variables))
    link = next(address for address in stack.addresses(name) if "%" in address)
    assert answers(link, DHCPV6_PORT) and not answers(link, STRANGE_PORTS[0])
    assert not answers(stack.address(name), DHCPV6_PORT)
    # Whom the host has forgotten it has to ask for anew.
    stack.host(name).check_output("ip neighbour flush dev eth0")
    assert answers(link, DHCPV6_PORT)


def test_the_kernel_has_the_rules_that_the_next_start_loads(stack: Stack) -> None:
    for name in stack.variables:
        host = stack.host(name)
        assert host.check_output(LISTED) == host.file(f"{RULES}.listing").content_string.strip(), name
        host.check_output(f"nft --check --file {RULES}")
        for unit in ("hothouse-firewall", "chrony"):
            assert host.service(unit).is_enabled and host.service(unit).is_running, (name, unit)


def test_chrony_runs_and_never_touches_the_clock_that_containers_share(stack: Stack) -> None:
    for name in stack.variables:
        host = stack.host(name)
        assert " -x" in host.check_output("ps -o args= -C chronyd").splitlines()[0] + " ", name
        sockets = host.check_output("ss --no-header --listening --udp --numeric --processes")
        assert "chronyd" not in sockets, name
        assert host.check_output("chronyc -n sources -a | wc -l")
