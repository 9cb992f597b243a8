"""The overview page in a real browser: it says what Flower and Prometheus say, and when it does not know."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import Stack
from playwright.sync_api import Browser, Locator, Page, Route, sync_playwright

pytestmark = pytest.mark.scenarios("local")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
PHONE = {"width": 320, "height": 640}
DESKTOP = {"width": 1280, "height": 900}
MARKUP = '<img src="x" onerror="document.title=1"><b>bold</b>'
# Runs before any script of the page: what it would otherwise not tell.
WITNESS = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""


@pytest.fixture(scope="module")
def browser(stack: Stack) -> Iterator[Browser]:
    """Debian's Chromium, which finds the name of nginx at the address of its host."""
    nginx = stack.group("nginx")[0]
    rules = f"MAP {stack.variables[nginx]['nginx_server_name']} {stack.address(nginx)}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=[f"--host-resolver-rules={rules}"]
        )
        yield browser
        browser.close()


class Visit:
    """A page, and what it asked for and complained of. `origin` has no slash at its end."""

    def __init__(self, stack: Stack, browser: Browser, query: str = "?deployment=1", **options: Any) -> None:
        self.origin = f"https://{stack.variables[stack.group('nginx')[0]]['nginx_server_name']}"
        self.address = f"{self.origin}/{query}"
        # Given from the start: a browser that is asked first counts as a refused login.
        login = "Basic " + base64.b64encode(stack.login.encode()).decode()
        # The certificate is checked by the tests of nginx.
        context = browser.new_context(
            **{
                "viewport": DESKTOP,
                "ignore_https_errors": True,
                "extra_http_headers": {"Authorization": login},
            }
            | options
        )
        context.add_init_script(WITNESS)
        self.page: Page = context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self) -> Page:
        """The page with its first numbers."""
        self.page.goto(self.address)
        self.page.wait_for_selector("#tile-backlog")
        self.page.wait_for_selector("#figures figure, #plots-notice:visible")
        self.page.wait_for_selector("#tasks-table tbody tr[data-key]")
        return self.page

    def close(self) -> None:
        self.page.context.close()


@pytest.fixture
def visit(stack: Stack, browser: Browser) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    # With the deployment's own tasks, for they are what the tests send.
    def make(query: str = "?deployment=1", **options: Any) -> Visit:
        visits.append(Visit(stack, browser, query, **options))
        return visits[-1]

    yield make
    for one in visits:
        one.close()


@pytest.fixture(scope="module")
def rest(stack: Stack) -> Iterator[None]:
    """Nothing new happens by itself: beat is stopped, and some tasks have ended, well and badly."""
    for host in stack.group("beat"):
        stack.host(host).check_output("systemctl stop celery-beat")
    try:
        end_some_tasks(stack)
        yield
    finally:
        for host in stack.group("beat"):
            stack.host(host).check_output("systemctl start celery-beat")


def end_some_tasks(stack: Stack) -> None:
    """A ping through every queue, and some that fail: a ping takes no arguments, and theirs look like markup."""
    for queue in stack.variables[stack.group("app")[0]]["app_queues"]:
        assert stack.ping(queue)
    send = (
        "import hothouse_celery; app = hothouse_celery.load(); "
        f"[app.send_task('hothouse.ping', args=[{MARKUP!r}], ignore_result=True) for _ in range(5)]"
    )
    code = base64.b64encode(send.encode()).decode()
    stack.first("app").check_output(
        f"hothouse-run python -c \"import base64; exec(base64.b64decode('{code}'))\""
    )
    failures = 'hothouse:flower_events:increase{task="hothouse.ping", type="task-failed"} > 0.5'
    deadline = time.monotonic() + 60
    while any(worker["active"] for worker in workers_of(stack)) or not prometheus(stack, failures):
        assert time.monotonic() < deadline, "the tasks did not end, or Prometheus did not hear of it"
        time.sleep(0.5)


# ---- What the APIs say


def flower(stack: Stack, path: str, **parameters: Any) -> Any:
    answer = stack.request(f"/flower/{path}?{urlencode(parameters)}", stack.login)
    assert answer.status == 200, answer.body
    return answer.json()


def workers_of(stack: Stack) -> list[dict[str, Any]]:
    return flower(stack, "workers", json=1)["data"]


def prometheus(stack: Stack, expression: str, moment: str | None = None) -> list[dict[str, Any]]:
    """The result of a query, now or at a moment in Unix time."""
    parameters = {"query": expression} | ({"time": moment} if moment else {})
    answer = stack.request(f"/prometheus/api/v1/query?{urlencode(parameters)}", stack.login)
    assert answer.status == 200, answer.body
    return answer.json()["data"]["result"]


def by_label(stack: Stack, expression: str, label: str, moment: str | None = None) -> dict[str, float]:
    return {
        found["metric"][label]: float(found["value"][1]) for found in prometheus(stack, expression, moment)
    }


# ---- What the page says


def table(page: Page, name: str) -> dict[str, dict[str, str]]:
    """First cell of each row → heading of the column → text of the cell."""
    return page.evaluate(
        """(id) => {
          const table = document.getElementById(id);
          const heads = [...table.tHead.rows[0].cells].map((cell) => cell.firstChild.textContent.trim());
          return Object.fromEntries([...table.tBodies[0].rows].map((row) => [
            row.cells[0].textContent,
            Object.fromEntries([...row.cells].map((cell, column) => [heads[column], cell.textContent]))]));
        }""",
        f"{name}-table",
    )


def number(text: str) -> float | None:
    """The first number of a cell, times in seconds; None for a dash."""
    found = re.match(r"[<>]? ?([\d.,]+)(?: (ms|s|min|h|d))?(?![\w])", text)
    if not found:
        return None
    value = float(found[1].replace(",", ""))
    return value * {"ms": 0.001, "min": 60, "h": 3600, "d": 86400}.get(found[2] or "", 1)


def differences(stack: Stack, page: Page) -> list[str]:
    """Where page and APIs disagree by more than the page rounds."""
    found = []

    def compare(what: str, text: str, truth: float | None) -> None:
        # NaN is what Prometheus calls a rate of nothing.
        if number(text) != (
            None if truth is None or truth != truth else pytest.approx(truth, rel=0.006, abs=1e-9)
        ):
            found.append(f"{what}: the page says {text!r}, the API {truth}")

    shown = table(page, "workers")
    for worker in workers_of(stack):
        row = shown[worker["hostname"]]
        succeeded, failed = worker.get("task-succeeded", 0), worker.get("task-failed", 0)
        compare(f"{worker['hostname']} active", row["Active"], worker["active"])
        compare(f"{worker['hostname']} completed", row["Completed"], succeeded + failed)
        compare(f"{worker['hostname']} failed", row["Failed"], failed)
    online = [worker["hostname"] for worker in workers_of(stack) if worker["status"]]
    if sorted(name for name, row in shown.items() if row["State"] == "online") != sorted(online):
        found.append(f"workers online: {shown}")
    tile = page.locator("#tile-workers .value").inner_text()
    if tile != f"{len(online)} of {len(stack.workers)}":
        found.append(f"workers: {tile}")

    # Numbers over a window change with every second, so the API is asked for the moment that the page is of.
    moment = page.locator("#types-table").get_attribute("data-time")
    assert moment
    shown = table(page, "queues")
    for queue, messages in by_label(stack, "hothouse_queue_messages", "queue", moment).items():
        compare(f"{queue} waiting", shown[queue]["Waiting"], messages)
    if sorted(shown) != sorted(stack.variables[stack.group("app")[0]]["app_queues"]):
        found.append(f"queues: {shown}")

    shown = table(page, "upkeep")
    upkeep = {
        "Dead letters": "hothouse_dead_letters",
        "Unknown tasks": "hothouse_unknown_tasks",
        "Schedulers": "hothouse_schedulers",
        "Watchdog restarts": "sum(hothouse_watchdog_restarts_total) or vector(0)",
        "Ambiguous recipients": 'hothouse_app{name="ambiguous_recipients"}',
    }
    if list(shown) != [
        "Dead letters",
        "Unknown tasks",
        "Watchdog restarts",
        "Schedulers",
        "Ambiguous recipients",
    ]:
        found.append(f"upkeep: {list(shown)}")
    for what, expression in upkeep.items():
        [result] = prometheus(stack, expression, moment)
        compare(what, shown[what]["Now"], float(result["value"][1]))

    ended = "sum by (task) (hothouse:flower_events:increase{type%s})"
    shown = table(page, "types")
    runs = by_label(stack, ended % '=~"task-succeeded|task-failed"', "task", moment)
    failures = by_label(stack, ended % '="task-failed"', "task", moment)
    names = ("success:ratio", "failure:ratio", "runtime_seconds:avg", "runtime_seconds:p95")
    rules = {name: by_label(stack, f"hothouse:task_{name}", "task", moment) for name in names}
    for task, row in shown.items():
        # Whole runs on the page, fractions in the API: increase() extrapolates.
        for column, truth in (("Runs", runs.get(task, 0)), ("Failures", failures.get(task, 0))):
            if abs((number(row[column]) or 0) - truth) > 1.01:
                found.append(f"{task} {column}: the page says {row[column]!r}, the API {truth}")
        if ratio := rules["success:ratio"].get(task):
            compare(f"{task} success", row["Success"], 100 * ratio)
        compare(f"{task} average", row["Average"], rules["runtime_seconds:avg"].get(task))
        compare(f"{task} p95", row["p95"], rules["runtime_seconds:p95"].get(task))
    if set(shown) != set(runs) | set(rules["runtime_seconds:avg"]):
        found.append(f"task types: {sorted(shown)} instead of {sorted(runs)}")
    tile = page.locator("#tile-failures .value").inner_text()
    failed, ran = (sum(round(one) for one in some.values()) for some in (failures, runs))
    if ran and abs((number(tile) or 0) - 100 * failed / ran) > 5:
        found.append(f"share of failures: {tile} instead of {failed} of {ran}")
    if page.locator("#types-table").get_attribute("data-time") != moment:
        return ["the page has read anew meanwhile"]

    tasks = flower(stack, "api/tasks", limit=50, sort_by="-received")
    rows = page.locator("#tasks-table tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.querySelector('time')?.dateTime ?? cell.textContent))"
    )
    if [row[1] for row in rows] != list(tasks):
        found.append("recent tasks are others")
    else:
        for row, task in zip(rows, tasks.values(), strict=True):
            said = [page.evaluate("Date.parse", moment) / 1000 for moment in row[3:5]]
            # One that expired or was revoked before it began has neither, which is no date on the page.
            moments = pytest.approx(
                [task[moment] or float("nan") for moment in ("received", "started")],
                rel=0, abs=0.002, nan_ok=True,
            )  # fmt: skip
            if [row[0], row[2]] != [task["name"], task["state"]] or said != moments:
                found.append(f"task {row}: {task}")
            compare(f"runtime of {row[1]}", row[5], task["runtime"])
            if task["args"] != "()" and not row[6].startswith(task["args"]):
                found.append(f"arguments of {row[1]}: {row[6]}")
    return found


# ---- The tests


def test_the_page_and_its_files_need_the_login(stack: Stack) -> None:
    for path in ("/", "/overview.js", "/overview.css", "/config.json", "/plots.json", "/runbook.html"):
        assert stack.request(path).status in (401, 429), path
        answer = stack.request(path, stack.login)
        assert answer.status == 200, path
        assert answer.headers["content-security-policy"] == POLICY, path


def test_the_numbers_are_those_of_flower_and_prometheus(
    stack: Stack, rest: None, visit: Callable[..., Visit], wait: Callable[..., Any]
) -> None:
    end_some_tasks(stack)
    page = visit().open()
    last: list[str] = []

    def agree() -> bool:
        last[:] = differences(stack, page)
        return not last

    try:
        wait(agree, "the same numbers on the page and in the APIs", 120)
    except AssertionError as error:
        raise AssertionError("\n".join([str(error), *last])) from None
    ping = table(page, "types")["hothouse.ping"]
    assert (
        number(ping["Failures"])
        and number(ping["Success"])
        and number(ping["Average"])
        and number(ping["p95"])
    )
    assert ping["State"] in ("success too low", "failures")
    assert page.locator("#tile-success").get_attribute("data-level") == "bad"


def test_recent_tasks_lead_into_flower_and_can_be_filtered(
    stack: Stack, rest: None, visit: Callable[..., Visit], wait: Callable[..., Any]
) -> None:
    page = visit().open()
    rows = page.locator("#tasks-table tbody tr")
    link = rows.first.locator("a")
    assert link.get_attribute("href") == f"/flower/task/{link.inner_text()}"
    assert stack.request(f"/flower/task/{link.inner_text()}", stack.login).status == 200

    def shown() -> list[str]:
        return [row for row in rows.evaluate_all("rows => rows.map(row => row.dataset.key)") if row]

    page.select_option("#filter-state", "FAILURE")
    failures = flower(stack, "api/tasks", state="FAILURE", limit=50, sort_by="-received")
    assert failures
    wait(lambda: shown() == list(failures), "only what failed", 20)
    page.select_option("#filter-state", "")
    pings = flower(stack, "api/tasks", taskname="hothouse.ping", limit=50, sort_by="-received")
    page.fill("#filter-name", "HOUSE.pin")
    wait(lambda: shown() == list(pings), "only pings", 20)
    # The choice is in the address, for whoever it is sent to.
    again = visit(query="?" + page.url.partition("?")[2]).open()
    wait(lambda: again.locator("#tasks-table tbody tr").count() == len(pings), "the same choice", 20)


def test_what_needs_a_hand_is_counted_and_says_where_to_look(
    stack: Stack, rest: None, visit: Callable[..., Visit], wait: Callable[..., Any]
) -> None:
    stack.redis("LPUSH", "q:dead-letter", "{}")
    stack.redis("ZADD", "app:campaigns:ambiguous", "1", "test/1", "1", "test/2")
    try:
        page = visit().open()
        wait(lambda: table(page, "upkeep")["Dead letters"]["Now"] == "1", "the dead letter", 60)
        shown = table(page, "upkeep")
        assert shown["Dead letters"]["State"] == "set aside"
        assert shown["Dead letters"]["Meaning"].endswith(
            "hothouse-run python -m hothouse_celery dead-letters"
        )
        assert (shown["Ambiguous recipients"]["Now"], shown["Ambiguous recipients"]["State"]) == (
            "2",
            "too many",
        )
        assert page.locator("#nodes-panel").is_hidden()
        assert violations(page) == []
    finally:
        stack.redis("DEL", "q:dead-letter")
        stack.redis("ZREM", "app:campaigns:ambiguous", "test/1", "test/2")


def test_tasks_that_no_release_knows_are_named_whatever_they_are_called(
    stack: Stack, rest: None, visit: Callable[..., Visit], wait: Callable[..., Any]
) -> None:
    names = {MARKUP: 3, "shop.täglich_почта{{ x }}": 2, "shop." + "x" * 500: 2}
    names |= {f"shop.more{number:02}": 1 for number in range(60)}
    key = "q:unknown-task"
    stack.redis("LPUSH", key, *["{}"] * sum(names.values()))
    stack.redis("HSET", f"{key}.names", *(str(word) for pair in names.items() for word in pair))
    try:
        # What the exporter makes of them is exposition that Prometheus takes, each with its name.
        counts: dict[str, float] = {}

        def seen() -> bool:
            counts.update(by_label(stack, "hothouse_unknown_task", "task"))
            return len(counts) == 50

        wait(seen, "the names in Prometheus", 60)
        assert counts[MARKUP] == 3 and set(counts) < {*names, "shop." + "x" * 95 + "..."}
        assert [job["metric"]["job"] for job in prometheus(stack, 'up{job="redis"} == 0')] == []
        page = visit().open()
        wait(lambda: table(page, "upkeep")["Unknown tasks"]["Now"] == "67", "the unknown tasks", 60)
        row = table(page, "upkeep")["Unknown tasks"]
        assert row["State"] == "set aside"
        assert f"{MARKUP} (3), shop." in row["Meaning"] and "(1), others. " in row["Meaning"]
        assert row["Meaning"].endswith(
            "hothouse-run python -m hothouse_celery dead-letters --requeue --unknown"
        )
        assert page.locator("#upkeep-table img").count() == 0
        # So is each alert about one of them.
        summary = f"3 messages of the task {MARKUP} were set aside: no release knows it"
        wait(lambda: summary in page.locator("#alerts-list li span").all_inner_texts(), "the alert", 60)
        assert violations(page) == []
        page.set_viewport_size(PHONE)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    finally:
        stack.redis("DEL", key, f"{key}.names")


NODES = ["redis1", "redis2", "redis3"]


def of_several_nodes() -> list[tuple[str, float, dict[str, str]]]:
    """What Prometheus says when redis1 was killed, redis2 took over and redis3 does not follow it."""
    figures: list[tuple[str, float, dict[str, str]]] = [
        ("hothouse_redis_primary", 1, {"instance": "redis2"}),
        ("hothouse_redis_replicas", 0, {"instance": "redis2"}),
        ("redis_master_link_up", 0, {"instance": "redis3"}),
        ("hothouse_sentinels", 2, {}),
        ("hothouse_redis_primaries", 2, {}),
        ("hothouse_acme_renewal_failed", 1, {"instance": "nginx1"}),
        ("hothouse_acme_renewal_failed", 0, {"instance": "nginx2"}),
        ("haproxy_backend_active_servers", 1, {"instance": "worker1", "proxy": "redis"}),
        ("haproxy_backend_active_servers", 0, {"instance": "worker2", "proxy": "redis"}),
    ]
    for node in NODES:
        figures.append(("redis_up", float(node != "redis1"), {"instance": node}))
        if node != "redis1":
            figures.append(("hothouse_redis_sentinels", 2, {"instance": node}))
            figures.append(("redis_memory_used_bytes", 30, {"instance": node}))
            figures.append(("redis_memory_max_bytes", 100, {"instance": node}))
    return figures


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_several_redis_nodes_are_shown_with_their_roles(
    stack: Stack, rest: None, visit: Callable[..., Visit], viewport: dict[str, int]
) -> None:
    """This scenario has one, so the answers of the others are put in; tests/unit runs three for the figures."""
    one = visit(viewport=viewport)
    config = stack.request("/config.json", stack.login).json() | {"redis_nodes": NODES}
    one.page.route("**/config.json", lambda route: route.fulfill(json=config))

    def answer(route: Route) -> None:
        found = stack.request(route.request.url.removeprefix(one.origin), stack.login).json()
        own = [
            result
            for result in found["data"]["result"]
            if not re.match("redis_|hothouse_redis_|hothouse_sentinels", result["metric"].get("__name__", ""))
        ]
        others = [
            {"metric": {"__name__": name} | labels, "value": [own[0]["value"][0], str(value)]}
            for name, value, labels in of_several_nodes()
        ]
        found["data"]["result"] = own + others
        route.fulfill(json=found)

    one.page.route(lambda url: "hothouse_dead_letters" in url, answer)
    page = one.open()
    dash = "\N{EN DASH}"
    assert {node: list(row.values())[1:] for node, row in table(page, "nodes").items()} == {
        "redis1": ["no answer", dash, dash, dash],
        "redis2": ["primary, refuses writes", "0", "2", "30 %"],
        "redis3": ["replica, does not follow", dash, "2", "30 %"],
    }
    shown = table(page, "upkeep")
    assert {what: [row["State"], row["Now"]] for what, row in shown.items() if " of " in row["Now"]} == {
        "Redis replicas": ["none", "0 of 2"],
        "Sentinels": ["some missing", "2 of 3"],
        "Ways to Redis": ["too few", "1 of 2"],
    }
    assert (shown["Redis failovers"]["State"], shown["Redis failovers"]["Now"]) == ("of late", "1")
    assert (shown["Certificate renewal"]["State"], shown["Certificate renewal"]["Now"]) == ("failing", "1")
    assert shown["Certificate renewal"]["Meaning"].endswith("failed. nginx1")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def names_shown(page: Page) -> set[str]:
    """Names of tasks in the lists, under the plots and among the proposals of the filter."""
    return set(
        page.evaluate(
            """() => [...document.querySelectorAll(
              "#types-table tbody tr, #tasks-table tbody tr, #figures tbody tr, #names option")]
              .map((node) => (node.value ?? node.cells[0].textContent).split(",")[0])"""
        )
    )


def test_tasks_of_the_deployment_are_left_out_unless_asked_for(
    stack: Stack, rest: None, visit: Callable[..., Visit], wait: Callable[..., Any]
) -> None:
    end_some_tasks(stack)
    runs = by_label(
        stack, 'sum by (task) (hothouse:flower_events:increase{type=~"task-(succeeded|failed)"})', "task"
    )
    assert runs["hothouse.ping"] > 5
    page = visit(query="").open()
    page.wait_for_selector("#tile-success")
    assert [name for name in names_shown(page) if name.startswith("hothouse")] == []
    assert page.locator("#tile-success").get_attribute("data-level") != "bad"
    switch = page.get_by_role("checkbox", name="With tasks of the deployment itself")
    switch.check()
    wait(lambda: "hothouse.ping" in table(page, "types"), "the ping among the types", 20)
    wait(lambda: page.locator("#tile-success").get_attribute("data-level") == "bad", "its failures", 20)
    wait(
        lambda: "hothouse.ping" in {row["Name"] for row in table(page, "tasks").values()}, "recent pings", 20
    )
    assert page.url.endswith("?deployment=1")
    again = visit(query="?" + page.url.partition("?")[2]).open()
    assert again.locator("#own").is_checked()
    switch.uncheck()
    wait(lambda: not [name for name in names_shown(page) if name.startswith("hothouse")], "their end", 20)
    assert "deployment" not in page.url
    # The alerts say nothing of them either, for as long as they have to be wrong.
    ratio, limit = (
        'hothouse:task_failure:ratio{task="hothouse.ping"}',
        'hothouse_threshold{name="failure_percent"}',
    )
    failing = f"100 * {ratio} > on () {limit}"
    wait(
        lambda: prometheus(stack, f"min_over_time(({failing})[6s:2s])"),
        "failures for longer than patience",
        60,
    )
    assert prometheus(stack, 'ALERTS{task="hothouse.ping"}') == []


SMALL = {"width": 375, "height": 667}


def test_a_phone_begins_with_a_few_rows_and_has_a_way_to_the_others(
    stack: Stack, rest: None, visit: Callable[..., Visit], wait: Callable[..., Any]
) -> None:
    one = visit(viewport=SMALL)
    # Workers that are not there: what is wrong is never cut.
    config = stack.request("/config.json", stack.login).json()
    config["workers"] |= {f"missing-{number}@nowhere": ["default"] for number in range(8)}
    one.page.route("**/config.json", lambda route: route.fulfill(json=config))
    page = one.open()

    def shown(name: str) -> int:
        return page.locator(f"#{name}-table tbody tr:visible").count()

    every = page.locator("#tasks-table tbody tr").count()
    assert every > 10 and shown("tasks") == 5
    assert shown("workers") >= 8
    assert page.evaluate("document.documentElement.scrollHeight") < 12 * SMALL["height"]
    button = page.get_by_role("button", name=f"Show {every - 5} more of The newest")
    assert (button.get_attribute("aria-controls"), button.get_attribute("aria-expanded")) == (
        "tasks-table",
        "false",
    )
    assert violations(page) == []
    page.evaluate("window.button = document.querySelector('[aria-controls=tasks-table]')")
    button.focus()
    page.keyboard.press("Enter")
    assert shown("tasks") == every
    before = page.locator("#sources").inner_text()
    wait(lambda: page.locator("#sources").inner_text()[:24] != before[:24], "the next numbers", 30)
    page.wait_for_function("() => document.activeElement === button && button.isConnected")
    assert (shown("tasks"), page.evaluate("button.ariaExpanded")) == (every, "true")
    assert "whole=tasks-table" in page.url
    page.reload()
    page.wait_for_selector("#tasks-table[data-whole] tbody tr:nth-child(6)")
    page.get_by_role("button", name="Show fewer of The newest").click()
    assert shown("tasks") == 5 and "whole" not in page.url
    # On a wide screen there is everything, and no button.
    page.set_viewport_size(DESKTOP)
    assert shown("tasks") == every and page.locator(".rest:visible").count() == 0


def test_the_failures_of_a_type_are_one_press_away(
    stack: Stack, rest: None, visit: Callable[..., Visit]
) -> None:
    end_some_tasks(stack)
    page = visit().open()
    page.get_by_role("button", name="failures of hothouse.ping").click()
    page.wait_for_function("() => document.querySelectorAll('#tasks-table tbody tr').length < 50")
    assert page.evaluate("document.activeElement.id") == "filter-state"
    assert {row["State"] for row in table(page, "tasks").values()} == {"FAILURE"}


def test_what_a_task_was_called_with_is_text(rest: None, visit: Callable[..., Visit]) -> None:
    page = visit(query="?name=hothouse.ping&state=FAILURE&deployment=1").open()
    cell = page.locator("#tasks-table tbody td:last-child", has_text="<img").first
    assert MARKUP in cell.inner_text()
    assert page.locator("main table img, main table b").count() == 0
    assert page.title() != "1"


def test_a_link_of_an_alert_that_is_no_address_of_the_web_is_dropped(visit: Callable[..., Visit]) -> None:
    page = visit().open()
    source = page.evaluate("fetch('overview.js').then((answer) => answer.text())")
    function = source[source.index("function safeLink") : source.index("/** Sets text only")]
    links = page.evaluate(
        f"""() => {{ const settings = {{config: {{server_name: location.hostname}}}}; {function}
          return ["javascript:alert(1)", "data:text/html,x", "https://" + location.hostname + ":8443/runbook.html#a",
            "https://elsewhere.example.com/runbook.html#b"].map(safeLink); }}"""
    )
    assert links == [None, None, "runbook.html#a", "https://elsewhere.example.com/runbook.html#b"]


def test_nothing_is_asked_of_anybody_else_and_nothing_is_complained_of(visit: Callable[..., Visit]) -> None:
    one = visit()
    page = one.open()
    page.check("#ranges input[value='604800']", force=True)
    page.wait_for_function("() => document.querySelectorAll('#figures canvas').length >= 4")
    assert one.requests
    assert {url for url in one.requests if not url.startswith(f"{one.origin}/")} == set()
    assert one.complaints == []
    assert page.evaluate("violations") == []
    assert page.locator("[style]:not(#figures *)").count() == 0
    # Did anybody find a way to put markup into the page, it would do nothing.
    page.evaluate(
        """() => { const script = document.createElement("script"); script.textContent = "window.ran = true";
          document.body.append(script); document.body.insertAdjacentHTML("beforeend",
          "<img src='https://elsewhere.example.com/x.png' onerror='window.ran = true'>"); }"""
    )
    page.wait_for_function("() => violations.length >= 2")
    assert page.evaluate("window.ran") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_no_violation(
    stack: Stack, visit: Callable[..., Visit], rest: None, scheme: str, viewport: dict[str, int]
) -> None:
    end_some_tasks(stack)
    page = visit(color_scheme=scheme, viewport=viewport).open()
    assert violations(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation_in_the_runbook(visit: Callable[..., Visit], scheme: str) -> None:
    one = visit(color_scheme=scheme, viewport=PHONE)
    one.page.goto(f"{one.origin}/runbook.html")
    assert violations(one.page) == []
    assert one.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert one.complaints == []


def violations(page: Page) -> list[str]:
    """What axe-core says is wrong, by rule and element."""
    # Its best practices too, and all of the page at once.
    results = Axe().run(page).response
    assert len(results["passes"]) > 20, "axe-core hardly looked"
    return [
        f"{rule['id']}: {node['html']} {node['any'][0]['message'] if node['any'] else ''}"
        for rule in results["violations"]
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize("width", [320, 480, 768, 1024, 1920])
def test_no_width_needs_scrolling_sideways(visit: Callable[..., Visit], rest: None, width: int) -> None:
    page = visit(viewport={"width": width, "height": 800}).open()
    cut = page.evaluate(
        """(width) => [...document.querySelectorAll("body *")].filter((node) => {
          const box = node.getBoundingClientRect();
          return box.width > 1 && box.right > width + 1 && !node.closest(".unseen, thead");
        }).map((node) => node.outerHTML.slice(0, 80))""",
        width,
    )
    assert cut == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_narrow_page_keeps_its_tables_for_a_screen_reader(rest: None, visit: Callable[..., Visit]) -> None:
    wide, narrow = (visit(viewport=viewport).open() for viewport in (DESKTOP, PHONE))
    for page in (wide, narrow):
        for role in ("banner", "main", "contentinfo", "navigation", "search"):
            assert page.get_by_role(role).count() == 1, role
        # That of the Redis nodes is hidden where there is one.
        assert page.get_by_role("table").count() == 9
        assert page.get_by_role("table", name="The newest").get_by_role("columnheader").all_inner_texts() == [
            "Name", "UUID", "State", "Received", "Started", "Runtime", "Arguments",
        ]  # fmt: skip
        assert page.locator("table:not(:has(caption)), th:not([scope])").count() == 0
        # Not every browser keeps a table's meaning when its rows are laid out as cards, unless the roles are said.
        assert page.locator("table:not([role]), tr:not([role]), td:not([role]), th:not([role])").count() == 0
        assert page.locator("[aria-live]").evaluate_all("all => all.map((one) => one.id)") == ["alerts-list"]
        for name in ("Tasks completed", "Runtime", "Backlog", "Failures"):
            assert page.get_by_role("img", name=f"Plot over time: {name}").count() == 1
            assert page.get_by_role("table", name=name).count() == 1
    for button in narrow.locator(".rest:visible").all():
        button.click()
    rows = [len(page.get_by_role("row").all()) for page in (wide, narrow)]
    assert rows[0] == rows[1]


def test_the_keyboard_reaches_every_control(rest: None, visit: Callable[..., Visit]) -> None:
    page = visit().open()
    expected = page.evaluate(
        """() => [...document.querySelectorAll("a[href], button, input, select, main")].filter((node) =>
          node.checkVisibility() && node.tabIndex >= 0 && !(node.type === "radio" && !node.checked))
          .map((node, index) => (node.dataset.probe = String(index)))"""
    )
    assert len(expected) > 60
    reached = []
    for _ in range(len(expected) + 5):
        page.keyboard.press("Tab")
        probe, outlined = page.evaluate(
            """() => { const node = document.activeElement;
              const seen = node.type === "radio" ? node.nextElementSibling : node;
              return [node.dataset.probe ?? null, getComputedStyle(seen).outlineStyle !== "none"]; }"""
        )
        if probe is not None:
            assert outlined, f"no outline on the element {probe}"
            reached.append(probe)
    assert set(expected) <= set(reached)
    page.locator("#ranges :checked").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.querySelector('#ranges :checked').value") == "21600"
    page.wait_for_function("() => document.querySelector('#plot-backlog a').href.includes('6h')")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    button = page.locator("#plot-throughput tbody button").first
    button.focus()
    page.keyboard.press("Space")
    assert button.get_attribute("aria-pressed") == "true"


def test_the_focus_stays_where_it_is_while_numbers_change(rest: None, visit: Callable[..., Visit]) -> None:
    names = ("#workers-table tbody a", "#tasks-table tbody tr:nth-child(2) a", "#plot-backlog tbody button")
    pages = [visit().open() for _ in names]
    before = []
    for page, name in zip(pages, names, strict=True):
        page.locator(name).first.focus()
        page.evaluate("window.focused = document.activeElement")
        before.append(page.locator("#sources").inner_text())
    for page, name, sources in zip(pages, names, before, strict=True):
        page.wait_for_function(
            """(before) => document.getElementById("sources").innerText.match(/[0-9:]{8}/g).every(
              (time, index) => time !== before.match(/[0-9:]{8}/g)[index])""",
            arg=sources,
        )
        assert page.evaluate("document.activeElement === focused && focused.isConnected"), name


def test_the_plots_show_the_chosen_range(
    stack: Stack, visit: Callable[..., Visit], wait: Callable[..., Any]
) -> None:
    page = visit().open()
    for seconds, name in ((21600, "6h"), (86400, "24h"), (604800, "168h"), (3600, "1h")):
        page.check(f"#ranges input[value='{seconds}']", force=True)
        page.wait_for_function(
            f"() => document.querySelector('#plot-runtime a').href.endsWith('range_input={name}')"
        )
    for plot in json.loads(stack.request("/plots.json", stack.login).body):
        figure = page.locator(f"#plot-{plot['id']}")
        assert figure.locator("tbody tr:not(.empty)").count() > 0, plot["id"]
        assert figure.locator("canvas").count() == 1
        # Something is drawn in the colour of at least one line; one may lie over the others.
        drawn = figure.evaluate(
            """(figure) => {
              const colours = [...figure.querySelectorAll(".swatch")]
                .map((swatch) => getComputedStyle(swatch).color.match(/[0-9]+/g).map(Number));
              const canvas = figure.querySelector("canvas");
              const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              let count = 0;
              for (let i = 0; i < data.length; i += 4) {
                const near = ([r, g, b]) =>
                  Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 30;
                if (data[i + 3] > 128 && colours.some(near)) count += 1;
              }
              return count;
            }"""
        )
        assert drawn > 5, plot["id"]


def test_requests_never_pile_up_and_are_given_up(
    stack: Stack, rest: None, visit: Callable[..., Visit], wait: Callable[..., Any]
) -> None:
    """A Flower that takes requests and never answers, as a hung one does."""
    page = visit().open()
    began: list[float] = []
    ended: list[float] = []
    for event, moments in (("request", began), ("requestfailed", ended), ("requestfinished", ended)):
        page.on(
            event,
            lambda request, moments=moments: (
                "flower/workers" in request.url and moments.append(time.monotonic())
            ),
        )
    flower = stack.first("flower")
    flower.check_output("systemctl kill --signal=SIGSTOP celery-flower")
    try:
        page.wait_for_selector("#workers-notice:has-text('no answer within 8 s')", timeout=30000)
        assert page.locator("#workers-panel").get_attribute("data-old") == "true"
        assert page.locator("#types-panel").get_attribute("data-old") == "false"
        began.clear()
        ended.clear()
        page.wait_for_event("requestfailed", lambda request: "flower/workers" in request.url, timeout=30000)
        page.wait_for_event("request", lambda request: "flower/workers" in request.url, timeout=30000)
    finally:
        flower.check_output("systemctl kill --signal=SIGCONT celery-flower")
    # The next one began when the one before was given up, and 10 s later.
    assert len(began) == 2 and began[1] - ended[0] > 9
    page.wait_for_selector("#workers-notice", state="hidden", timeout=30000)


def test_a_hidden_page_asks_for_nothing(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.page.clock.install()
    page = one.open()
    hide = "(hidden) => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true}); " \
        "document.dispatchEvent(new Event('visibilitychange')); }"  # fmt: skip
    page.evaluate(hide, True)
    page.wait_for_load_state("networkidle")
    before = len(one.requests)
    page.clock.run_for(120_000)
    assert len(one.requests) == before
    # Whoever comes back sees at once how old it is, and then new numbers.
    with page.expect_request("**/flower/workers?json=1"), page.expect_request("**/prometheus/**"):
        page.evaluate(hide, False)


def test_without_a_monitor_host_the_page_says_so_and_asks_flower(
    stack: Stack, rest: None, visit: Callable[..., Visit], wait: Callable[..., Any]
) -> None:
    config = stack.request("/config.json", stack.login).json() | {"prometheus": None}
    one = visit()
    one.page.route("**/config.json", lambda route: route.fulfill(json=config))
    page = one.open()
    for section in ("types", "upkeep", "plots"):
        assert "no monitor host" in page.locator(f"#{section}-notice").inner_text()
    assert "no alert is found or sent" in page.locator("#alerts").inner_text()
    wait(
        lambda: [row["State"] for row in table(page, "queues").values()] == ["empty"] * len(config["queues"]),
        "the length of each queue, from Flower",
        40,
    )
    assert not [url for url in one.requests if "/prometheus" in url or "/alertmanager" in url]
    assert page.get_by_role("link", name="Prometheus").count() == 0
    assert violations(page) == []


@pytest.fixture
def stopped(stack: Stack) -> Iterator[Callable[[str, str], None]]:
    """Stop a unit on a noun's first host; it runs again afterwards."""
    units: list[tuple[str, str]] = []

    def stop(noun: str, unit: str) -> None:
        units.append((noun, unit))
        stack.first(noun).check_output(f"systemctl stop {unit}")

    yield stop
    for noun, unit in units:
        stack.first(noun).check_output(f"systemctl start {unit}")


def colour(element: Locator) -> str:
    return element.evaluate("(node) => getComputedStyle(node).color")


def test_a_flower_that_is_down_is_shown_as_such_and_raises_an_alert(
    stack: Stack, rest: None, visit: Callable[..., Visit], stopped: Callable[[str, str], None]
) -> None:
    page = visit().open()
    worker = page.locator("#workers-table tbody td.number").first
    before, ink = table(page, "workers"), colour(worker)
    stopped("flower", "celery-flower")
    notice = page.locator("#workers-notice")
    notice.wait_for(state="visible", timeout=30000)
    assert "Flower cannot be reached" in notice.inner_text()
    assert "HTTP 502" in notice.inner_text()
    assert page.locator("#sources li[data-state=unreachable]").inner_text().startswith("Flower: unreachable")
    # The numbers stay, and look old.
    assert table(page, "workers") == before
    assert colour(worker) != ink
    assert page.locator("#tile-workers").get_attribute("data-old") == "true"
    assert violations(page) == []
    # Prometheus is there and has nothing new of Flower.
    page.wait_for_selector("#types-notice:has-text('Prometheus could not read Flower')", timeout=90000)
    assert page.locator("#types-panel").get_attribute("data-old") == "true"
    assert page.locator("#queues-panel").get_attribute("data-old") == "false"
    # And it tells somebody; the page has the alert and what to do.
    alert = page.locator("#alerts-list li", has_text="FlowerDown")
    alert.wait_for(timeout=300_000)
    assert alert.get_by_role("link").get_attribute("href") == "runbook.html#flowerdown"
    assert page.title().startswith("(")
    stack.first("flower").check_output("systemctl start celery-flower")
    notice.wait_for(state="hidden", timeout=60000)
    page.locator("#types-notice").wait_for(state="hidden", timeout=90000)
    assert colour(worker) == ink


def test_a_prometheus_that_is_down_is_shown_as_such(
    stack: Stack, rest: None, visit: Callable[..., Visit], stopped: Callable[[str, str], None]
) -> None:
    page = visit().open()
    before = table(page, "types")
    stopped("monitor", "prometheus")
    for section in ("types", "plots", "queues", "upkeep"):
        notice = page.locator(f"#{section}-notice")
        notice.wait_for(state="visible", timeout=30000)
        assert "Prometheus cannot be reached" in notice.inner_text()
    assert "Alerts are not known" in page.locator("#alerts-list").inner_text()
    assert table(page, "types") == before
    assert page.locator("#types-panel").get_attribute("data-old") == "true"
    assert page.locator("#workers-panel").get_attribute("data-old") == "false"
    assert violations(page) == []
    stack.first("monitor").check_output("systemctl start prometheus")
    for section in ("types", "plots", "queues", "upkeep"):
        page.locator(f"#{section}-notice").wait_for(state="hidden", timeout=90000)
    page.wait_for_function("() => !document.querySelector('#alerts-list').textContent.includes('not known')")
