"""Flower behind nginx: whoever has the login sees every worker and task, nobody else sees anything."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Answer, Stack, exchange

LOGGED_IN = (
    "/flower/",
    "/flower/workers",
    "/flower/tasks",
    "/flower/broker",
    "/flower/api/workers",
    "/flower/api/tasks",
)


def test_flower_sees_every_worker_and_every_registered_task(stack: Stack, wait: Callable[..., Any]) -> None:
    def found() -> dict[str, Any]:
        """What Flower asks its workers for; they have a second to answer."""
        answer: dict[str, Any] = stack.request("/flower/api/workers?refresh=1", stack.login).json()
        complete = len(answer) >= len(stack.workers) and all(
            {"registered", "active_queues"} <= w.keys() for w in answer.values()
        )
        return answer if complete else {}

    assert stack.workers
    workers = wait(found, "every worker in Flower", 30)
    assert sorted(workers) == sorted(stack.workers)
    checked = stack.first("app").check_output("hothouse-run python -m hothouse_celery check")
    for name, worker in workers.items():
        for task in json.loads(checked):
            assert task in worker["registered"], name
        pool = next(
            pool for pool in stack.variables[name.partition("@")[2]]["worker_pools"]
            if name.startswith(f"{pool['name']}-")
        )  # fmt: skip
        assert [queue["name"] for queue in worker["active_queues"]] == pool["queues"]


def test_a_task_crosses_every_queue_and_shows_in_flower(stack: Stack, wait: Callable[..., Any]) -> None:
    queues = stack.variables[stack.group("app")[0]]["app_queues"]
    assert queues
    for queue in queues:
        before = pings(stack)
        assert stack.ping(queue)
        wait(lambda count=before: pings(stack) > count, f"the ping through {queue} in Flower", 15)


def pings(stack: Stack) -> int:
    """How many pings Flower has seen succeed."""
    tasks = stack.request("/flower/api/tasks?taskname=hothouse.ping&state=SUCCESS", stack.login).json()
    return len(tasks)


def test_the_scheduled_task_runs_again_and_again(stack: Stack, wait: Callable[..., Any]) -> None:
    def runs() -> int:
        tasks = stack.request("/flower/api/tasks?state=SUCCESS", stack.login).json()
        return sum(task["name"] not in ("hothouse.ping",) for task in tasks.values())

    before = runs()
    wait(lambda: runs() > before, "another run of the scheduled task", 30)


@pytest.mark.parametrize("login", [None, "admin:admin", "admin:", ":", "", "hothouse:hothouse"])
def test_a_wrong_login_is_refused_everywhere(stack: Stack, login: str | None) -> None:
    answer = stack.request("/flower/api/workers", login)
    assert answer.status in (401, 429)
    assert "hostname" not in answer.body


def test_the_generated_login_opens_every_page(stack: Stack) -> None:
    for path in LOGGED_IN:
        assert stack.request(path, stack.login).status == 200, path


def test_a_login_with_only_half_of_it_right_is_refused(stack: Stack) -> None:
    user, _, password = stack.login.partition(":")
    for login in (
        f"{user}:",
        f":{password}",
        f"{user}:{password[:-1]}",
        f"{user}:{password}x",
        f"admin:{password}",
    ):
        assert stack.request("/flower/", login).status in (401, 429), login.replace(password, "…")


@pytest.mark.parametrize(
    "path",
    [
        "/flower/metrics", "/flower/healthcheck", "/flower//metrics", "//flower/metrics", "/flower/./metrics",
        "/flower/%6detrics", "/flower/%2e/metrics", "/flower/x/../metrics", "/flower/x/..;/metrics", "/flower/metrics/",
        "/flower/Metrics", "/FLOWER/metrics", "/flower/metrics?x=1", "/flower%2fmetrics", "/flower/metrics%3f",
        "/metrics", "/healthcheck", "/flower;/metrics", "/flower/;/metrics", "/flower/health%63heck",
        "/flower/%2e%2e/metrics", "/flower/metrics%00",
    ],
)  # fmt: skip
def test_what_flower_answers_without_a_login_is_fenced(stack: Stack, path: str) -> None:
    for login in (None, stack.login):
        answer = stack.request(path, login)
        assert answer.status in (400, 401, 404, 429), path
        assert "flower_" not in answer.body and answer.body.strip() != "OK", path


def test_everything_else_is_404(stack: Stack) -> None:
    for path in (
        "/.git/config",
        "/overview",
        "/flowers",
        "/nginx_status",
        "/static/css/flower.css",
        "/api/workers",
    ):
        assert stack.request(path, stack.login).status == 404, path


def test_the_bare_prefix_leads_on_and_the_prefix_is_kept(stack: Stack) -> None:
    answer = stack.request("/flower")
    assert (answer.status, answer.headers["location"].endswith("/flower/")) == (308, True)
    page = stack.request("/flower/", stack.login).body
    assert 'href="/flower/' in page


def test_an_action_from_a_browser_works_through_the_proxy(stack: Stack, wait: Callable[..., Any]) -> None:
    worker = stack.workers[0]
    name = stack.variables[stack.group("nginx")[0]]["nginx_server_name"]
    path = f"/flower/api/worker/pool/grow/{worker}?n=1"
    answer = stack.request(path, stack.login, "POST", {"Origin": f"https://{name}"})
    assert answer.status == 200, answer.body
    stack.request(path.replace("grow", "shrink"), stack.login, "POST", {"Origin": f"https://{name}"})
    foreign = stack.request(path, stack.login, "POST", {"Origin": "https://elsewhere.example.com"})
    assert foreign.status == 403


def test_headers_that_a_client_makes_up_do_not_reach_flower(stack: Stack) -> None:
    """Flower would compare Origin with a Host of the client's choice, and believe its address."""
    made_up = {"Origin": "https://elsewhere.example.com", "X-Forwarded-Host": "elsewhere.example.com"}
    path = f"/flower/api/worker/pool/grow/{stack.workers[0]}"
    assert stack.request(path, stack.login, "POST", made_up).status == 403
    stack.request(
        "/flower/api/workers",
        "ops:wrong",
        headers={"X-Forwarded-For": "203.0.113.7", "X-Real-Ip": "203.0.113.7"},
    )
    journal = stack.first("flower").check_output("journalctl -u celery-flower --no-pager -n 200")
    assert "203.0.113.7" not in journal


def test_security_headers_are_on_every_answer(stack: Stack) -> None:
    for path, login in (("/flower/", stack.login), ("/flower/", None), ("/nothing", None)):
        headers = stack.request(path, login).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["x-frame-options"] == "DENY", path
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
        assert headers["server"] == "nginx", path


def handshake(stack: Stack, version: ssl.TLSVersion, name: str) -> str | None:
    """The protocol of a connection that allows one version of TLS only; errors are raised."""
    context = ssl.create_default_context(cafile=str(stack.ca_file))
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    address = (stack.address(stack.group("nginx")[0]), 443)
    with (
        socket.create_connection(address, timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=name) as connection,
    ):
        return connection.version()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_only_tls_1_2_and_1_3_are_spoken(stack: Stack) -> None:
    name = stack.variables[stack.group("nginx")[0]]["nginx_server_name"]
    assert handshake(stack, ssl.TLSVersion.TLSv1_2, name) == "TLSv1.2"
    assert handshake(stack, ssl.TLSVersion.TLSv1_3, name) == "TLSv1.3"
    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            handshake(stack, version, name)


def test_an_unknown_name_gets_no_certificate(stack: Stack) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(stack, ssl.TLSVersion.TLSv1_3, "elsewhere.example.com")


def plain(stack: Stack, port: int, path: str, host: str, login: str | None = None) -> Answer:
    connection = http.client.HTTPConnection(stack.address(stack.group("nginx")[0]), port, timeout=10)
    return exchange(connection, path, login, "GET", {"Host": host})


def test_plain_http_leads_to_https_for_the_known_name_only(stack: Stack) -> None:
    name = stack.variables[stack.group("nginx")[0]]["nginx_server_name"]
    answer = plain(stack, 80, "/flower/", name)
    assert (answer.status, answer.headers["location"]) == (301, f"https://{name}/flower/")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        plain(stack, 80, "/flower/", "elsewhere.example.com")


def test_the_development_listener_asks_for_the_same_login(stack: Stack) -> None:
    port = stack.variables[stack.group("nginx")[0]]["nginx_development_port"]
    if port:
        assert plain(stack, int(port), "/", "localhost:5555").headers["location"].endswith("/flower/")
        assert plain(stack, int(port), "/flower/", "localhost:5555", "admin:admin").status in (401, 429)
        assert plain(stack, int(port), "/flower/metrics", "localhost:5555", stack.login).status == 404
        assert plain(stack, int(port), "/flower/", "localhost:5555", stack.login).status == 200
    else:
        with pytest.raises(OSError):
            socket.create_connection((stack.address(stack.group("nginx")[0]), 5556), timeout=3)


def test_failed_logins_are_limited_and_good_ones_are_not(stack: Stack) -> None:
    assert stack.login  # read before the threads ask for it
    with ThreadPoolExecutor(10) as pool:
        statuses = list(pool.map(lambda _: stack.request("/flower/", "ops:wrong").status, range(60)))
    assert set(statuses) <= {401, 429}
    assert 429 in statuses
    assert {stack.request("/flower/api/workers", stack.login).status for _ in range(30)} == {200}


def test_tasks_show_the_columns_of_the_guide(stack: Stack) -> None:
    page = stack.request("/flower/tasks", stack.login).body
    for column in ("Name", "UUID", "State", "Received", "Started", "Runtime", "args", "Worker"):
        assert column.lower() in page.lower(), column


def test_the_state_of_flower_is_kept_on_disk(stack: Stack, wait: Callable[..., Any]) -> None:
    folder = stack.first("flower").file("/var/lib/hothouse/flower")
    assert (folder.user, folder.mode) == ("hothouse-flower", 0o700)
    wait(
        lambda: stack.first("flower").run("ls /var/lib/hothouse/flower").stdout.strip(), "the saved state", 90
    )
