"""Logins that may only look: they see what the operator sees, and whatever would change something is refused."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Door, Stack, basic

pytestmark = pytest.mark.scenarios("local")


def readers(stack: Stack) -> dict[str, str]:
    prefix = "flower_reader_"
    found = {
        name.removeprefix(prefix): value for name, value in stack.secrets.items() if name.startswith(prefix)
    }
    assert sorted(found) == sorted(next(iter(stack.values(["flower_readers"]).values()))["flower_readers"])
    return found


# What a reader may ask of Flower, by method and pattern of Flower's own. Whatever else Flower has is refused, so a new
# version with something new fails here until somebody has looked at it.
READS = {
    ("GET", route)
    for route in (
        "/", "/workers", "/worker/(.+)", "/task/(.+)", "/tasks", "/tasks/datatable", "/broker", "/api/workers",
        "/api/tasks", "/api/task/types", "/api/queues/length", "/api/task/info/(.*)", "/api/task/result/(.+)",
        "/static/(.*)",
    )
} | {("POST", "/tasks/datatable")}  # fmt: skip
# Not even whoever operates it gets there.
FENCED = {"/metrics", "/healthcheck"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
ROUTES = """
import json
from flower.urls import handlers
from tornado.web import RequestHandler
methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
found = {}
for handler in handlers:
    route = getattr(handler, "regex", None)
    route, kind = (route.pattern.rstrip("$"), handler.target) if route else handler[:2]
    found[route] = [m for m in methods if getattr(kind, m.lower()) is not getattr(RequestHandler, m.lower())]
print(json.dumps(found))
"""


def routes(stack: Stack) -> dict[str, list[str]]:
    """Flower's own table: pattern → methods, of the release that runs."""
    script = base64.b64encode(ROUTES.encode()).decode()
    return json.loads(
        stack.first("flower").check_output(
            f"cd / && /opt/hothouse/flower/current/bin/python -c \"import base64; exec(base64.b64decode('{script}'))\""
        )
    )


def example(route: str, worker: str) -> str:
    """A path that a pattern matches; what it would do, it would do to a worker or a task that is not there."""
    if route == "/static/(.*)":
        return "/flower/static/css/flower.css"
    return "/flower" + route.replace("(.+)", worker).replace("(.*)", worker).replace("/?", "").replace(
        ".*", "/nothing"
    )


def test_a_reader_sees_everything_and_changes_nothing(stack: Stack) -> None:
    table = routes(stack)
    assert {"/api/worker/shutdown/(.+)", "/api/task/revoke/(.+)", "/tasks/datatable"} <= set(table)
    assert {route for _, route in READS} <= set(table)
    logins = [f"{name}:{password}" for name, password in readers(stack).items()]

    def tried(route: str) -> int:
        """Asks for one route by all methods, as the operator and as each reader; how many of them are to look."""
        # The page of a worker that is not there takes seconds: Flower asks for it.
        worker = stack.workers[0] if route == "/worker/(.+)" else "nobody@nowhere"
        path, fenced = example(route, worker), route in FENCED
        operator, others = Door(stack, stack.login), [Door(stack, login) for login in logins]
        allowed = 0
        for method in METHODS:
            status, _ = operator.ask(method, path)
            # Flower itself answers the operator, if only that there is no such worker or task.
            assert status == 404 if fenced else status not in (401, 429), (method, path, status)
            assert method not in table[route] or status != 403, (method, path)
            look = ("GET" if method == "HEAD" else method, route) in READS
            for door in others[:1] if look else others:
                seen, _ = door.ask(method, path)
                assert seen == (404 if fenced else status if look else 403), (method, path, seen)
            allowed += look and method in table[route]
        return allowed

    with ThreadPoolExecutor(8) as pool:  # the workers that are not there get a second to answer
        assert sum(pool.map(tried, table)) >= len(READS)
    stack.refusals()  # Flower may not write the result of a task that it is to end


def test_a_reader_is_refused_however_the_request_is_written(stack: Stack) -> None:
    user, password = next(iter(readers(stack).items()))
    door, operator = Door(stack, f"{user}:{password}"), stack.login.partition(":")[0]
    for worker in (*stack.workers[:1], f"{stack.workers[0].replace('@', '%40')}"):
        act = f"api/worker/pool/grow/{worker}?n=1"
        for path in (
            f"/flower/{act}", f"//flower/{act}", f"/flower//{act}", f"/flower/./{act}", f"/flower/tasks/../{act}",
            f"/flower/%61pi{act[3:]}", f"/flower/tasks%2f..%2f{act}", f"/flower/{act}&/flower/tasks/datatable",
            f"/flower/{act}#/flower/tasks/datatable", f"/flower/tasks/datatable/../../{act}",
            f"/flower/tasks/datatable;/../../{act}", "/flower/api/task/revoke/x/../../../../tasks/datatable",
            "/flower/api/task/revoke/x%2f..%2f..%2f..%2f..%2ftasks/datatable", f"/flower/%2e/{act}",
        ):  # fmt: skip
            for method in ("POST", "PUT", "DELETE", "OPTIONS"):
                status, _ = door.ask(method, path)
                assert status in (400, 403), (method, path, status)
        # Who claims to be somebody else has to have the password; nothing of a header of the client goes on.
        encoded = basic(f"{user}:{password}").removeprefix("Basic ")
        for value in (
            f"Basic  {encoded}", f"basic {encoded}", f"Basic {encoded[:5]}!{encoded[5:]}",
            f"Basic {encoded}, Basic {encoded}",
            f"Bearer {encoded}", basic(f"{operator}:{password}"), basic(f"{user.upper()}:{password}"),
        ):  # fmt: skip
            status, _ = door.ask("POST", f"/flower/{act}", Authorization=value)
            assert status in (400, 401, 403, 429), (value.replace(encoded, "…"), status)
        override = {"X-HTTP-Method-Override": "POST", "X-Forwarded-User": operator}
        assert door.ask("GET", f"/flower/{act}", **override)[0] == 403
    assert door.ask("GET", "/flower/api/workers")[0] == 200
    # Flower itself knows no reader.
    status = stack.first("flower").run(
        f"curl --silent --output /dev/null --write-out '%{{http_code}}' --user '{user}:{password}' "
        "http://127.0.0.1:5555/flower/api/workers"
    )
    assert status.stdout == "401"


def test_an_address_of_flower_is_none_of_prometheus(stack: Stack) -> None:
    """What the list has for Flower, and what is a way out of it where slashes are decoded."""
    user, password = next(iter(readers(stack).items()))
    for login in (stack.login, f"{user}:{password}"):
        door = Door(stack, login)
        for way in ("worker/", "task/", "api/task/info/"):
            up = "..%2f" * (way.count("/") + 1)
            for path in (
                "prometheus/api/v1/status/config",
                "alertmanager/api/v2/status",
                "prometheus/metrics",
            ):
                status, _ = door.ask("GET", f"/flower/{way}{up}{path.replace('/', '%2f')}")
                assert status == 404, (way, path, status)


def test_a_reader_has_the_overview_page_and_its_sources(stack: Stack) -> None:
    name = stack.variables[stack.group("nginx")[0]]["nginx_server_name"]
    for user, password in readers(stack).items():
        door = Door(stack, f"{user}:{password}")
        for path in (
            "/", "/overview.js", "/config.json", "/plots.json", "/runbook.html", "/flower/workers?json=1",
            "/flower/api/tasks", "/prometheus/api/v1/alerts", "/prometheus/api/v1/query?query=up",
            "/prometheus/classic/alerts", "/alertmanager/api/v2/alerts", "/alertmanager/api/v2/silences",
        ):  # fmt: skip
            assert door.ask("GET", path)[0] == 200, path
        own = {"Origin": f"https://{name}"}
        assert door.ask("POST", "/prometheus/api/v1/query?query=up", **own)[0] == 200
        assert door.ask("POST", "/alertmanager/api/v2/silences", **own)[0] == 403
        assert door.ask("DELETE", "/alertmanager/api/v2/silence/0-0", **own)[0] == 403
        assert Door(stack, f"{user}:{password[:-1]}").ask("GET", "/")[0] == 401
    for path in ("/", "/flower/", "/prometheus/api/v1/alerts"):
        assert Door(stack, "viewer:viewer").ask("GET", path)[0] in (401, 429)


def test_a_reader_only_looks_at_the_development_port_too(stack: Stack) -> None:
    user, password = next(iter(readers(stack).items()))
    host, port = stack.first("nginx"), stack.variables[stack.group("nginx")[0]]["nginx_development_port"]
    ask = f"curl --silent --output /dev/null --write-out '%{{http_code}}' --user '{user}:{password}' --header"
    for name, method, path, status in (
        ("localhost:5555", "GET", "workers", "200"),
        ("127.0.0.1", "POST", f"api/worker/pool/grow/{stack.workers[0]}", "403"),
        ("elsewhere.example.com", "GET", "workers", "000"),
    ):
        seen = host.run(
            f"{ask} 'Host: {name}' --request {method} http://127.0.0.1:{port}/flower/{path}"
        ).stdout
        assert seen == status, (name, method, path)
