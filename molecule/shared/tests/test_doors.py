"""nginx as its clients meet it: by name and by address, by HTTP/1 and 2; other names get nothing."""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Door, Stack

pytestmark = pytest.mark.scenarios("local", "staging", "prod")

REFUSED = "no handshake"
NOTHING = "nothing"


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module")
def known(stack: Stack) -> list[str]:
    """The names and addresses in the certificate, the name of the server first."""
    values = stack.values(("nginx_server_name", "nginx_alternative_names"))[stack.group("nginx")[0]]
    return [values["nginx_server_name"], *values["nginx_alternative_names"]]


def say(stack: Stack, sni: str | None, head: str, port: int = 443) -> str:
    """The status line that a request gets, sent letter by letter; NOTHING or REFUSED where there is none."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # what it shows is for other tests
    address = stack.address(stack.group("nginx")[0])
    with socket.create_connection((address, port), timeout=10) as plain:
        connection: socket.socket = plain
        try:
            if port == 443:
                connection = context.wrap_socket(plain, server_hostname=sni)
        except (ssl.SSLError, ConnectionError):
            return REFUSED
        try:
            connection.sendall(head.encode())
            return connection.recv(200).decode().partition("\r\n")[0] or NOTHING
        except (ssl.SSLError, ConnectionError):
            return NOTHING


def spellings(name: str) -> list[str]:
    """A name or address as clients write it into Host."""
    text = f"[{name}]" if ":" in name else name
    found = [text, f"{text}:443", f"{text}:8443"]
    return found if is_address(name) else [*found, text.upper(), f"{text}.", f"{text.title()}.:443"]


def heads(host: str) -> list[str]:
    """Requests that name a host: by the header, and by the address, which then counts."""
    return [
        f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n",
        f"GET / HTTP/1.0\r\nHost: {host}\r\n\r\n",
        f"GET https://{host}/ HTTP/1.1\r\nHost: elsewhere.example.com\r\nConnection: close\r\n\r\n",
    ]


FOREIGN = ("elsewhere.example.com", "127.0.0.2", "[::2]", "x.localhost", "localhost.example.com")
# Names with a meaning in nginx' own settings, which no address of the web can have.
ODD = ("_", "*", "~.")
UNKNOWN = [head for host in FOREIGN for head in heads(host)] + [
    head for host in ODD for head in heads(host)[:2]
]
NAMELESS = "GET / HTTP/1.0\r\n\r\n"


def test_every_name_and_address_of_the_certificate_leads_in(stack: Stack, known: list[str]) -> None:
    for name in known:
        # No client sends an address as a name of TLS.
        sni = None if is_address(name) else name
        for host in spellings(name):
            for head in heads(host):
                assert say(stack, sni, head) == "HTTP/1.1 401 Unauthorized", (sni, head)


def test_a_name_that_is_not_known_gets_no_handshake(stack: Stack, known: list[str]) -> None:
    for name in (
        "elsewhere.example.com",
        f"x{known[0]}",
        f"{known[0]}.example.com",
        "xn--bcher-kva.example",
    ):
        assert say(stack, name, heads(known[0])[0]) == REFUSED, name


def test_who_names_nothing_gets_a_handshake_only_where_there_is_an_address(
    stack: Stack, known: list[str]
) -> None:
    addresses = any(is_address(name) for name in known)
    for head in [*UNKNOWN, NAMELESS]:
        assert say(stack, None, head) == (NOTHING if addresses else REFUSED), head
    if not addresses:
        assert say(stack, None, heads(known[0])[0]) == REFUSED


def test_a_known_name_of_tls_opens_nothing_for_another_host(stack: Stack, known: list[str]) -> None:
    """As a browser asks that takes one connection for all names of a certificate."""
    sni = next(name for name in known if not is_address(name))
    for head in UNKNOWN:
        assert say(stack, sni, head) == NOTHING, head
    for name in known:
        assert say(stack, sni, heads(spellings(name)[0])[0]) == "HTTP/1.1 401 Unauthorized", name


def test_port_80_answers_the_same_names_only(stack: Stack, known: list[str]) -> None:
    for name in known:
        for host in spellings(name):
            assert say(stack, None, heads(host)[0], 80) == "HTTP/1.1 301 Moved Permanently", host
    for head in [*UNKNOWN, NAMELESS]:
        assert say(stack, None, head, 80) == NOTHING, head


def curl(stack: Stack, requests: list[str]) -> list[str]:
    """`STATUS VERSION` of each request: words for curl, which runs on nginx' host, with the login."""
    host, address = stack.first("nginx"), spellings(stack.address(stack.group("nginx")[0]))[0]
    lines = [
        "curl --silent --insecure --max-time 10 --netrc-file /run/hothouse-test-netrc --output /dev/null "
        f"--write-out '%{{http_code}} %{{http_version}}\\n' --connect-to '::{address}:' {request}"
        for request in requests
    ]
    user, _, password = stack.login.partition(":")
    script = (
        f"umask 077; echo 'default login {user} password {password}' >/run/hothouse-test-netrc\n"
        + "\n".join(lines)
    )
    try:
        return host.run(script).stdout.splitlines()
    finally:
        host.run("rm -f /run/hothouse-test-netrc")


def test_http_2_and_cookies_of_16_kilobytes(stack: Stack, known: list[str]) -> None:
    """And addresses and headers that are longer than a buffer of HAProxy usually is; all the way to each program."""
    url = f"https://{spellings(known[0])[0]}"
    paths = ["/", "/flower/", "/flower/api/workers"]
    paths += ["/prometheus/api/v1/alerts", "/alertmanager/api/v2/alerts"] if stack.group("monitor") else []

    def letters(count: int) -> str:
        return f"$(head --bytes={count} /dev/zero | tr '\\0' x)"

    wide = " ".join(f"--header X-{letter}:{letters(7000)}" for letter in "ABC")
    for version, number in (("--http2", "2"), ("--http1.1", "1.1")):
        requests = [f"{version} '{url}{path}' --header Cookie:a={letters(16384)}" for path in paths]
        requests += [f"{version} '{url}/flower/tasks?x='{letters(9000)}", f"{version} {url}/flower/ {wide}"]
        assert curl(stack, requests) == [f"200 {number}"] * len(requests), version


def test_http_2_knows_the_same_hosts(stack: Stack, known: list[str]) -> None:
    """curl makes `:authority` of Host."""
    url = f"https://{next(name for name in known if not is_address(name))}/"
    foreign = [f"--http2 {url} --header 'Host: {host}'" for host in (*FOREIGN, *ODD)]
    assert {answer.split()[0] for answer in curl(stack, foreign)} <= {"000", "400"}
    ours = [f"--http2 {url} --header 'Host: {host}'" for name in known for host in spellings(name)]
    assert curl(stack, ours) == ["200 2"] * len(ours)


@pytest.mark.scenarios("local", "prod")
def test_of_prometheus_and_alertmanager_only_what_is_listed_is_offered(stack: Stack) -> None:
    closed = [
        "/alertmanager/api/v1/status", "/alertmanager/api/v1/alerts", "/alertmanager/api/v2/status",
        "/alertmanager/metrics", "/alertmanager/-/reload", "/alertmanager/debug/pprof/heap", "/prometheus/metrics",
        "/prometheus/-/quit", "/prometheus/-/reload", "/prometheus/debug/pprof/heap", "/prometheus/federate?match[]=up",
        "/prometheus/config", "/prometheus/classic/config", "/prometheus/api/v1/status/config",
        "/prometheus/service-discovery", "/prometheus/classic/service-discovery", "/prometheus/consoles/x.html",
        "/prometheus/api/v1/read", "/prometheus/api/v1/write", "/prometheus/api/v1/admin/tsdb/snapshot",
        "/prometheus/user/x", "/prometheus/new/x",
    ]  # fmt: skip
    door = Door(stack, stack.login)
    for path in closed:
        for written in others(path):
            status, body = door.ask("GET", written)
            assert status in (400, 404), written
            assert "receivers" not in body and "scrape_configs" not in body, written
    for method in ("POST", "PUT", "DELETE"):
        for path in (
            "/alertmanager/api/v2/alerts",
            "/prometheus/api/v1/admin/tsdb/delete_series",
            "/prometheus/api/v1/alerts",
        ):
            assert door.ask(method, path)[0] == 404, (method, path)


def others(path: str) -> list[str]:
    """A path in the ways in which one tries to get around a fence; all of them mean it, or nothing."""
    tool, _, rest = path[1:].partition("/")
    head, _, tail = rest.rpartition("/")
    tail = tail or "x"
    return [
        path, f"/{path}", f"/{tool}//{rest}", f"/{tool}/./{rest}", f"/{tool}/x/../{rest}", f"/{tool}/%2e/{rest}",
        f"/{tool}/api/v2/alerts/%2e%2e/%2e%2e/%2e%2e/{rest}", f"/{tool}/api/v2/alerts/..;/{rest}", f"/{tool};/{rest}",
        f"/{tool}/static/js/../../{rest}", f"/{tool}/classic/static/%2e%2e/%2e%2e/{rest}",
        f"/{tool}/static/..%2f{rest}",
        f"/{tool}/{rest}/", f"/{tool}/{rest}%00", f"/{tool}/{rest}%20", f"/{tool}/{rest};x", f"/{tool}/{rest}%3fx",
        f"/{tool}/{head}/%{ord(tail[0]):02x}{tail[1:]}", f"/{tool}/{head}%2f{tail}", f"/{tool}%2f{rest}",
        f"/{tool.upper()}/{rest}", f"/{tool}/{rest.upper()}", f"/{tool}/{rest.title()}",
        f"/{tool}/api/v1/label/x/../../../../{rest}",
        f"/flower/../{tool}/{rest}", f"/{tool}/api/v1/query/..%2f..%2f..%2f{rest}",
    ]  # fmt: skip


@pytest.mark.scenarios("local", "prod")
def test_what_the_pages_of_prometheus_load_is_offered(stack: Stack) -> None:
    door = Door(stack, stack.login)
    for page in ("graph", "alerts", "rules", "status", "targets", "flags"):
        status, body = door.ask("GET", f"/prometheus/classic/{page}")
        files = set(re.findall(r'(?:src|href)="(/prometheus/[^"]*static/[^"]+)"', body))
        assert status == 200 and files, page
        for file in files:
            assert door.ask("GET", file.replace("&amp;", "&"))[0] == 200, (page, file)


def properties(stack: Stack, *names: str) -> dict[str, str]:
    shown = stack.first("nginx").check_output(f"systemctl show --property={','.join(names)} nginx.service")
    return dict(line.split("=", 1) for line in shown.splitlines())


def test_nginx_has_a_sandbox(stack: Stack) -> None:
    for name in stack.group("nginx"):
        host = stack.host(name)
        line = host.check_output("systemd-analyze security --no-pager nginx.service | tail -n 1")
        assert float(line.split(":")[1].split()[0]) <= 2.5, line
        main = host.check_output("cat /run/nginx.pid")
        rights = "CAP_CHOWN, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_NET_BIND_SERVICE"
        wanted = {"CapEff": sum(1 << bit for bit in (0, 5, 6, 7, 10)), "NoNewPrivs": 1, "Seccomp": 2}
        shown = dict(line.split(":\t") for line in host.check_output(f"cat /proc/{main}/status").splitlines())
        assert {key: int(shown[key], 16) for key in wanted} == wanted, rights
        workers = host.check_output(f"ps --ppid {main} -o user=,pid=").splitlines()
        assert workers
        for user, pid in (worker.split() for worker in workers):
            assert user == "www-data"
            assert "CapEff:\t0000000000000000" in host.check_output(f"cat /proc/{pid}/status")
        inside = f"nsenter --target {main} --mount"
        for path in ("/etc/nginx", "/usr", "/var/log", "/run/systemd", "/etc/hothouse", "/opt"):
            assert "Read-only" in host.run(f"{inside} touch {path}/x").stderr, path
        assert host.run(f"{inside} ls /run/dbus/system_bus_socket").rc != 0


def test_nginx_is_reloaded_reopened_and_replaced_in_its_sandbox(
    stack: Stack, known: list[str], wait: Callable[..., Any]
) -> None:
    """As a run, logrotate and an upgrade of Debian's package do it; nobody is turned away meanwhile."""
    host = stack.first("nginx")
    head = heads(spellings(known[0])[0])[0]
    sni = None if is_address(known[0]) else known[0]

    def serving() -> bool:
        return say(stack, sni, head) == "HTTP/1.1 401 Unauthorized"

    def children() -> set[str]:
        return set(host.check_output("ps --ppid $(cat /run/nginx.pid) -o pid=").split())

    for command in ("systemctl reload nginx", "invoke-rc.d nginx rotate"):
        before = children()
        host.check_output(command)
        assert serving()
        wait(
            lambda old=before, command=command: "rotate" in command or not old & children(),
            "new processes",
            20,
        )
    before = host.check_output("cat /run/nginx.pid")
    host.check_output("invoke-rc.d nginx upgrade")
    assert serving()
    wait(lambda: properties(stack, "MainPID")["MainPID"] != before, "systemd's knowledge of the new one", 20)
    found = properties(stack, "MainPID", "ActiveState", "NRestarts")
    assert found["MainPID"] == host.check_output("cat /run/nginx.pid") and found["ActiveState"] == "active"
    host.check_output("systemctl reload nginx")
    assert serving()
