"""Addresses of both families, generated, in every form in which people write them."""

from __future__ import annotations

import ipaddress
import json
import random
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from conftest import BUNDLE, ENVIRONMENT, ansible, load_plugin, render, shipped

addresses = load_plugin("plugin_utils/hothouse_addresses")
filters = load_plugin("filter/hothouse")
firewall = load_plugin("action/hothouse_firewall")
preflight = load_plugin("action/hothouse_preflight")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def generated(count: int, seed: int) -> Iterator[Address]:
    """Addresses of hosts, of IPv6 with zeros in any place and length."""
    draw = random.Random(seed)
    for number in range(count):
        if number % 3 == 0:
            yield ipaddress.IPv4Address(draw.randrange(0x0B000000, 0x7F000000))
            continue
        groups = [draw.choice([0, 0, draw.randrange(0x10000), draw.randrange(10)]) for _ in range(8)]
        groups[0] = draw.randrange(0x2000, 0xFE00)
        yield ipaddress.IPv6Address(sum(group << (112 - 16 * place) for place, group in enumerate(groups)))


def spellings(address: Address) -> set[str]:
    """Ways to write an address."""
    if address.version == 4:
        return {str(address)}
    groups = address.exploded.split(":")
    short = [group.lstrip("0") or "0" for group in groups]
    found = {address.exploded, address.compressed, ":".join(short)}
    for place in range(8):  # any run of zeros may be left out, not the longest alone
        for end in range(place + 1, 9):
            if set(short[place:end]) == {"0"}:
                found.add(":".join(short[:place]) + "::" + ":".join(short[end:]))
    dotted = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    found.add(":".join(short[:6]) + f":{dotted}")
    return {form for text in found for form in (text, text.upper())}


def test_each_spelling_of_an_address_is_the_one_that_the_kernel_and_redis_print() -> None:
    for address in generated(400, 1):
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        for text in spellings(address):
            assert addresses.canonical(text) == socket.inet_ntop(family, socket.inet_pton(family, text)), text


@pytest.mark.parametrize("scheme", ["redis", "rediss", "smtp", "https"])
def test_a_port_behind_an_address_is_read_as_one(scheme: str) -> None:
    for address in generated(200, 2):
        for text in spellings(address):
            url = urlsplit(f"{scheme}://user:word@{addresses.bracketed(text)}:6379/0")
            assert (url.hostname, url.port) == (str(address), 6379), text
            assert addresses.bracketed(addresses.bracketed(text)) == addresses.bracketed(text)


@pytest.mark.parametrize("name", ["mail.example.com", "localhost", "redis", "почта.example.com", ""])
def test_a_name_stays_as_it_is(name: str) -> None:
    assert addresses.canonical(name) == addresses.bracketed(name) == addresses.mail_domain(name) == name


def test_a_mail_address_at_an_address_is_written_as_mail_servers_read_it() -> None:
    assert addresses.mail_domain("192.0.2.1") == "[192.0.2.1]"
    assert addresses.mail_domain("2001:DB8:0::1") == "[IPv6:2001:db8::1]"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fe80::1%eth0", "has a zone"),
        ("fe80::1%3", "has a zone"),
        ("fe80::%eth0/64", "has a zone"),
        ("[2001:db8::1]", "is in brackets"),
        ("[2001:db8::1]:22", "is in brackets"),
        ("::ffff:192.0.2.1", "write 192.0.2.1"),
        ("::FFFF:c000:201", "write 192.0.2.1"),
        ("2001:db8::1::2", "is no IP address"),
        ("2001:db8::1:22222", "is no IP address"),
        ("2001:db8::g", "is no IP address"),
        ("192.0.2.1:22", "is no IP address"),
        ("192.0.2.01", "is no IP address"),
        ("", "is no IP address"),
    ],
)
def test_what_is_no_address_is_refused_with_the_reason(text: str, reason: str) -> None:
    for read in (addresses.address_of, addresses.network_of):
        with pytest.raises(addresses.NoAddressError, match=re.escape(reason)):
            read(text)


def networks(draw: random.Random) -> list[str]:
    """Addresses and networks, some inside each other, as people write them."""
    found = []
    for address in generated(draw.randrange(8), draw.randrange(10**6)):
        wide = draw.choice([address.max_prefixlen, draw.randint(1, address.max_prefixlen)])
        text = draw.choice(sorted(spellings(address)))
        found.append(text if draw.random() < 0.5 else f"{text}/{wide}")
    return found


def is_let_in(lines: list[str], address: Address) -> bool:
    """What nft makes of the lines for a packet from this address."""
    for line in lines:
        match = re.fullmatch(r'(?:(ip6?) saddr \{ ([^}]+) \} )?tcp dport 22 accept comment "ssh"', line)
        assert match, line
        inside = [ipaddress.ip_network(text) for text in match[2].split(", ")] if match[2] else []
        assert {network.version for network in inside} <= {6 if match[1] == "ip6" else 4}, line
        assert not any(a != b and a.version == b.version and a.overlaps(b) for a in inside for b in inside), (
            line
        )
        if not inside or any(address in network for network in inside):
            return True
    return False


def test_the_firewall_lets_in_whom_the_inventory_names_and_no_others() -> None:
    draw = random.Random(3)
    for _ in range(300):
        named = networks(draw)
        rules = filters.firewall_rules([], 22, named, [], [])
        lines = filters.nft_rules(rules)
        wanted = [ipaddress.ip_network(text, strict=False) for text in named]
        probes = [*generated(6, draw.randrange(10**6))]
        probes += [network[draw.randrange(min(network.num_addresses, 2**16))] for network in wanted]
        for probe in probes:
            expected = not wanted or any(probe in network for network in wanted)
            assert is_let_in(lines, probe) is expected, (named, probe)
            session = firewall.parse_session(f"{probe.exploded} 50000 {probe} 22")
            assert firewall.is_accepted(session, rules) is expected, (named, probe)


def test_ssh_from_an_ipv4_address_in_the_form_of_ipv6_is_ipv4() -> None:
    session = firewall.parse_session("::ffff:192.0.2.7 50000 ::ffff:192.0.2.1 22")
    assert firewall.is_accepted(session, filters.firewall_rules([], 22, ["192.0.2.0/24"], [], []))
    assert firewall.parse_session("UNKNOWN 65535 UNKNOWN 65535") is None


ROUTES = [
    "route fd00::1 fd00::1 dev eth0 proto kernel src fd00::10 metric 256 pref medium",
    "route fd00::2 fd00::2 from :: dev eth0 src FD00::0:99 metric 256 pref medium",
    "route fd00::3 RTNETLINK answers: Network is unreachable",
    "route 192.0.2.4 192.0.2.4 dev eth0 src 192.0.2.10 uid 0",
    "route fd00::5 /bin/sh: 1: ip: not found",
]


@pytest.mark.parametrize(
    ("servers", "own", "values", "said"),
    [
        ({"a": "fd00::1", "e": "fd00::5", "f": "fd00::6"}, "fd00::10", {}, []),
        ({"b": "fd00::2"}, "fd00::10", {}, ["would connect to b (fd00::2) from fd00::99"]),
        ({"b": "fd00::2"}, "fd00::10", {"prepare_firewall": False}, []),
        ({"b": "fd00::2"}, "fd00::10", {"prepare_firewall_rules": [{"from": ["fd00::/64"]}]}, []),
        ({"b": "fd00::2"}, "fd00::10", {"prepare_firewall_rules": [{"port": "6379"}]}, []),
        ({"b": "fd00::2"}, "fd00::10", {"prepare_firewall_rules": [{"from": ["192.0.2.0/24"]}]},
         ["would connect to b (fd00::2) from fd00::99"]),
        ({"c": "fd00::3"}, "fd00::10", {}, ["has no way to c (fd00::3)"]),
        ({"d": "192.0.2.4"}, "192.0.2.10", {}, []),
        ({"d": "192.0.2.4"}, "192.0.2.11", {}, ["would connect to d (192.0.2.4) from 192.0.2.10"]),
    ],
)  # fmt: skip
def test_a_host_that_would_come_from_another_address_is_noticed(
    servers: dict[str, str], own: str, values: dict[str, Any], said: list[str]
) -> None:
    assert filters.route_faults(ROUTES, own, servers, {name: values for name in servers}) == said


def test_a_host_connects_to_those_whose_client_it_is() -> None:
    hostvars = {name: {"private_address": f"fd00::{name}"} for name in "abc"}
    services = [{"clients": ["a", "b"], "hosts": ["b", "c"]}, {"clients": ["b"], "hosts": ["a"]}]
    assert filters.servers_of(services, "a", hostvars) == {"b": "fd00::b", "c": "fd00::c"}
    assert filters.servers_of(services, "c", hostvars) == {}


def test_the_certificate_of_a_host_has_its_address_as_one() -> None:
    credentials = load_plugin("action/hothouse_credentials")
    for address in generated(50, 4):
        for text in spellings(address):
            names = credentials.general_names({"name": "host", "alt_names": [text]})
            assert [name.value for name in names] == [address]


@pytest.fixture(scope="module")
def prod(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What the roles would write for inventories/prod with IPv6 addresses, each written in its own way."""
    folder = tmp_path_factory.mktemp("ipv6") / "inventories"
    shutil.copytree(
        BUNDLE / "inventories",
        folder,
        symlinks=True,
        ignore=shutil.ignore_patterns("credentials.yml", "ca.crt"),
    )
    path = folder / "prod/hosts.yml"
    document = yaml.safe_load(path.read_text())
    for number, values in enumerate(document["all"]["hosts"].values(), 0xA0):
        address = ipaddress.IPv6Address(f"2001:db8::{number:x}")
        forms = sorted(spellings(address))
        values["ansible_host"] = forms[number % len(forms)]
    path.write_text(yaml.safe_dump(document))
    main = folder / "prod/group_vars/all/main.yml"
    settings = yaml.safe_load(main.read_text())
    settings |= {
        "app_source": str(BUNDLE / "molecule/own-app/project"),
        "app_smtp_url": "smtp+starttls://[2001:db8::25]:587",
        "monitor_smtp_url": "smtp+starttls://mail.example.com:587",
        "nginx_alternative_names": ["2001:DB8::00a6", "192.0.2.6"],
        "prepare_ssh_addresses": ["192.0.2.0/24", "2001:DB8:1::/48"],
    }
    main.write_text(yaml.safe_dump(settings))
    return {host: files["rendered"] for host, files in render("-i", folder / "prod").items()}


def test_every_file_has_each_address_in_one_form_and_brackets_before_a_port(
    prod: dict[str, dict[str, str]],
) -> None:
    found = set()
    for files in prod.values():
        for path, text in files.items():
            for match in re.finditer(r"[0-9A-Fa-f]{1,4}(:[0-9A-Fa-f]{0,4}){3,7}", text):
                if not match[0].lower().startswith("2001:"):
                    continue
                # An address with a port behind it would be another address, or none.
                assert str(ipaddress.IPv6Address(match[0])) == match[0], (path, match[0])
                assert int(match[0].rpartition(":")[2] or "0", 16) in (*range(0xA0, 0xA8), 0, 0x25), (
                    path,
                    match[0],
                )
                found.add(Path(path).name)
    assert found >= {
        "redis.conf", "sentinel.conf", "redis.json", "hothouse-redis-cli", "haproxy.cfg", "nginx.conf", "firewall.nft",
        "prometheus.yml", "alertmanager.yml", "redis-exporter.conf",
    } - {"haproxy.cfg", "alertmanager.yml"}, found  # fmt: skip


def test_each_service_reads_the_addresses_as_it_wants_them(prod: dict[str, dict[str, str]]) -> None:
    redis = prod["redis1"]
    assert "\nbind 2001:db8::a0\n" in redis["/etc/redis/redis.conf"]
    assert "\nreplica-announce-ip 2001:db8::a0\n" in redis["/etc/redis/redis.conf"]
    assert "\nsentinel announce-ip 2001:db8::a0\n" in redis["/etc/redis/sentinel.conf"]
    settings = json.loads(redis["/etc/hothouse/redis.json"])
    assert settings["address"] == "2001:db8::a0"
    assert list(settings["nodes"]) == ["2001:db8::a0", "2001:db8::a1", "2001:db8::a2"]
    exporter = redis["/etc/systemd/system/prometheus-redis-exporter.service.d/redis-exporter.conf"]
    assert (
        "--redis.addr=rediss://[2001:db8::a0]:6379 " in exporter
        and "\nIPAddressAllow=2001:db8::a0" in exporter
    )
    rules = redis["/etc/hothouse/firewall.nft"]
    assert 'ip6 saddr { 2001:db8:1::/48 } tcp dport 22 accept comment "ssh"' in rules
    assert re.search(r'ip6 saddr \{ 2001:db8::a1, [^}]*\} tcp dport 6379 accept comment "redis"', rules)
    for kind in (
        "nd-neighbor-solicit", "nd-neighbor-advert", "nd-router-advert", "mld-listener-query", "echo-request",
        "destination-unreachable", "packet-too-big", "time-exceeded", "parameter-problem",
    ):  # fmt: skip
        assert re.search(rf"icmpv6 type {{[^}}]*\b{kind}\b[^}}]*}} accept", rules), kind
    page = prod["nginx1"]["/etc/nginx/nginx.conf"]
    assert "server [2001:db8::a5]:5555;" in page and "proxy_pass https://[2001:db8::a7]:9090;" in page
    assert "server_name ops.example.com [2001:db8::a6] 192.0.2.6;" in page
    config = yaml.safe_load(prod["monitor1"]["/etc/prometheus/hothouse/prometheus.yml"])
    targets = {
        target
        for job in config["scrape_configs"]
        for one in job["static_configs"]
        for target in one["targets"]
    }
    assert {"[2001:db8::a0]:9100", "[2001:db8::a2]:26379", "[2001:db8::a5]:5555", "127.0.0.1:9100"} <= targets
    blackbox = yaml.safe_load(prod["monitor1"]["/etc/prometheus/hothouse/blackbox.yml"])
    assert {part["preferred_ip_protocol"] for module in blackbox["modules"].values()
            for part in module.values() if isinstance(part, dict)} == {"ip6"}  # fmt: skip


def test_nginx_listens_on_ipv6_where_the_kernel_knows_it(prod: dict[str, dict[str, str]]) -> None:
    def listens(text: str) -> list[str]:
        return re.findall(r"^\s+listen (.+);$", text, re.MULTILINE)

    pages = [prod["nginx1"], shipped("local")["local1"]["rendered"]]
    for page in (listens(files["/etc/nginx/nginx.conf"]) for files in pages):
        public = [line for line in page if not line.startswith(("[::]", "127."))]
        assert public
        assert sorted(line for line in page if line.startswith("[::]")) == sorted(
            f"[::]:{line}" for line in public
        )
        # Of each port one server is there for who knows no name.
        ports = sorted({line.split()[0] for line in public})
        assert sorted(line.split()[0] for line in public if "default_server" in line) == ports
    # render.yml has it say that staging1 knows no IPv6.
    without = listens(shipped("staging")["staging1"]["rendered"]["/etc/nginx/nginx.conf"])
    assert without and not any("::" in line for line in without)


def test_the_urls_of_redis_hold_an_ipv6_address(tmp_path: Path) -> None:
    text = "{{ lookup('ansible.builtin.vars', 'app_redis_url') }}"
    result = ansible(
        "ansible", "-i", BUNDLE / "inventories/staging", "all", "-m", "ansible.builtin.debug", "-a", f"msg={text}",
        "-e", '{"redis_address": "2001:DB8::1", "redis_app_password": "word"}',
        ANSIBLE_LOAD_CALLBACK_PLUGINS="1",
    )  # fmt: skip
    assert result["staging1"][0]["msg"] == "redis://app:word@[2001:db8::1]:6379/0"
    for role in ("worker", "beat", "flower"):
        broker = yaml.safe_load((BUNDLE / f"roles/{role}/vars/main.yml").read_text())[
            f"__{role}_credentials"
        ]["broker_url"]
        assert "@{{ redis_address | bracketed }}:{{ redis_port }}/" in broker


@pytest.mark.parametrize("scenario", ["staging", "prod"])
def test_a_machine_without_ipv6_is_told_so_before_a_host_is_made(scenario: str) -> None:
    done = subprocess.run(
        ["ansible-playbook", "-i", f"inventories/{scenario}", "-i", f"molecule/{scenario}/inventory",
         "molecule/shared/create.yml", "--check", "-e", '{"__has_ipv6": false}'],
        cwd=BUNDLE, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = " ".join(done.stdout.split())
    assert done.returncode != 0 and "the kernel of this machine has no IPv6, or it is switched off" in said
    assert "See which containers exist" not in said
