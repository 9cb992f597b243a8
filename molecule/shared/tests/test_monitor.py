"""The monitoring: it reads every part, bounds what it keeps, and nobody gets in without the login."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from conftest import Stack

pytestmark = pytest.mark.scenarios("local", "staging", "prod")


def query(stack: Stack, expression: str) -> dict[str, float]:
    """The answer of Prometheus to an expression: labels, in a line, to value."""
    answer = stack.request(f"/prometheus/api/v1/query?query={quote(expression)}", stack.login)
    assert answer.status == 200, answer.body
    return {
        " ".join(f"{name}={value}" for name, value in sorted(result["metric"].items())): float(
            result["value"][1]
        )
        for result in answer.json()["data"]["result"]
    }


def test_prometheus_reads_every_part_of_every_host(stack: Stack, wait: Callable[..., Any]) -> None:
    def targets() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = stack.request("/prometheus/api/v1/targets", stack.login).json()["data"][
            "activeTargets"
        ]
        return found

    expected = {("flower", stack.group("flower")[0]), ("prometheus", stack.group("monitor")[0])}
    expected |= {("alertmanager", stack.group("monitor")[0]), ("blackbox", stack.group("monitor")[0])}
    expected |= {("node", name) for name in stack.variables}
    expected |= {(noun, name) for noun in ("redis", "nginx") for name in stack.group(noun)}
    expected |= {
        ("haproxy", name) for name in stack.variables if stack.variables[name]["haproxy_redis_nodes"]
    }
    assert {(target["labels"]["job"], target["labels"]["instance"]) for target in targets()} == expected
    wait(lambda: all(target["health"] == "up" for target in targets()), "every target", 60)


def test_the_probes_reach_flower_with_the_login_and_are_refused_without_one(
    stack: Stack, wait: Callable[..., Any]
) -> None:
    pages = 'probe_success{probe=~"public|door"}'
    wait(lambda: list(query(stack, pages).values()) == [1, 1], "both probes", 90)


def test_every_worker_of_the_inventory_is_seen(stack: Stack, wait: Callable[..., Any]) -> None:
    expected = {f"worker={worker}" for worker in stack.workers}
    assert set(query(stack, "max by (worker) (hothouse_expected_worker)")) == expected
    up = "max by (worker) (hothouse_worker_up)"
    wait(lambda: query(stack, up) == dict.fromkeys(expected, 1), "every worker", 60)


def test_queues_are_counted_where_they_are(stack: Stack, wait: Callable[..., Any]) -> None:
    queues = {f"queue={queue}" for queue in stack.variables[stack.group("app")[0]]["app_queues"]}
    for metric in ("hothouse_queue_messages", "hothouse_queue_oldest_seconds", "hothouse_queue_consumers"):
        wait(lambda name=metric: set(query(stack, f"max by (queue) ({name})")) == queues, metric, 60)
    for metric in (
        "unacked_messages",
        "reply_queues",
        "beat_late_seconds",
        "dead_letters",
        "unknown_tasks",
        "schedulers",
        "app",
    ):
        assert len(query(stack, f"hothouse_{metric}")) == 1, metric


def test_every_redis_is_seen_and_one_is_the_primary(stack: Stack, wait: Callable[..., Any]) -> None:
    nodes = stack.group("redis")
    assert query(stack, "hothouse_expected_redis") == {
        f"__name__=hothouse_expected_redis instance={node}": 1 for node in nodes
    }
    wait(lambda: query(stack, "count(hothouse_redis_acl_denials)") == {"": len(nodes)}, "every node", 60)
    wait(lambda: query(stack, "count(hothouse_redis_primary)") == {"": 1}, "one primary", 60)
    replicas = "hothouse_redis_replicas and on (instance) hothouse_redis_primary"
    wait(lambda: list(query(stack, replicas).values()) == [len(nodes) - 1], "every replica", 60)
    watching = len(nodes) if len(nodes) > 1 else 0
    wait(lambda: query(stack, "max(hothouse_sentinels)") == {"": watching}, "every Sentinel", 60)


def test_the_end_of_every_host_s_certificate_is_known(stack: Stack, wait: Callable[..., Any]) -> None:
    hosts = set(stack.variables) if len(stack.variables) > 1 else set()
    days = "(hothouse_certificate_expiry_timestamp_seconds - time()) / 86400 > 29"
    found = {f"instance={name} job=node" for name in hosts}
    wait(lambda: set(query(stack, days)) == found, "it", 60)


@pytest.mark.parametrize("path", ["/", "/config.json", "/prometheus/", "/prometheus/api/v1/query?query=1",
                                  "/alertmanager/", "/alertmanager/api/v2/alerts", "/nothing"])  # fmt: skip
def test_nothing_is_shown_without_the_login(stack: Stack, path: str) -> None:
    user = stack.login.partition(":")[0]
    for login in (None, "admin:admin", f"{user}:", f"{user}:wrong", f"monitor:{stack.secrets['monitor']}"):
        answer = stack.request(path, login)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Basic realm="Hothouse"'), path
    # The start page of Prometheus leads on to its graph.
    assert stack.request(path, stack.login).status in ((404,) if path == "/nothing" else (200, 302))


def test_the_monitoring_refuses_whoever_goes_around_nginx(stack: Stack) -> None:
    host = stack.first("monitor")
    for where in (
        "127.0.0.1:9090/prometheus/api/v1/query?query=1",
        "127.0.0.1:9093/alertmanager/api/v2/alerts",
        "127.0.0.1:9115/probe?module=public&target=http://127.0.0.1:9",
    ):
        ask = f"python3 -c \"import urllib.request as r; r.urlopen('http://{where}')\""
        assert "HTTP Error 401" in host.run(ask).stderr


@pytest.mark.parametrize(
    "path",
    ["/prometheus/-/quit", "/prometheus/-/reload", "/prometheus/debug/pprof/heap", "/alertmanager/-/reload",
     "/alertmanager/debug/pprof/heap", "/alertmanager/api/v2/status", "/alertmanager/api/v2/status/",
     "/prometheus//-/reload", "/prometheus/%2d/reload", "/prometheus/x/../-/reload"],
)  # fmt: skip
def test_what_is_for_the_processes_themselves_is_fenced(stack: Stack, path: str) -> None:
    for method in ("GET", "POST"):
        assert stack.request(path, stack.login, method).status in (403, 404, 405), path


def test_figures_cannot_be_deleted_through_the_api(stack: Stack) -> None:
    path = "/prometheus/api/v1/admin/tsdb/delete_series?match[]=up"
    name = stack.variables[stack.group("nginx")[0]]["nginx_server_name"]
    answer = stack.request(path, stack.login, "POST", {"Origin": f"https://{name}"})
    assert answer.status == 404


def test_a_page_of_another_site_cannot_silence_an_alert(stack: Stack) -> None:
    path = "/alertmanager/api/v2/silences"
    name = stack.variables[stack.group("nginx")[0]]["nginx_server_name"]
    headers = {"Content-Type": "application/json"}
    for origin in ("https://elsewhere.example.com", f"http://{name}", f"https://{name}.example.com", "null"):
        assert (
            stack.request(path, stack.login, "POST", headers | {"Origin": origin}, body="{}").status == 403
        ), origin
    # From the page itself it gets as far as Alertmanager, which misses what makes a silence.
    own = stack.request(path, stack.login, "POST", headers | {"Origin": f"https://{name}"}, body="{}")
    assert own.status in (400, 422), own.body


@pytest.mark.parametrize("page", ["alerts", "graph", "targets", "rules", "status", "flags"])
def test_the_pages_of_prometheus_are_where_links_to_them_lead(stack: Stack, page: str) -> None:
    answer = stack.request(f"/prometheus/{page}?search=a", stack.login)
    assert answer.headers["location"] == f"/prometheus/classic/{page}?search=a"
    answer = stack.request(answer.headers["location"], stack.login)
    assert answer.status == 200 and "Prometheus" in answer.body


def test_what_is_kept_is_bounded(stack: Stack) -> None:
    flags = stack.request("/prometheus/api/v1/status/flags", stack.login).json()["data"]
    assert flags["storage.tsdb.retention.time"] in ("30d", "4w2d")
    assert flags["storage.tsdb.retention.size"] in ("2GB", "2GiB")
    for name in stack.variables:
        settings = stack.host(name).check_output("systemd-analyze cat-config systemd/journald.conf")
        assert "\nSystemMaxUse=1G\nMaxRetentionSec=30day" in settings, name


def test_root_lists_and_silences_alerts(stack: Stack) -> None:
    host = stack.first("monitor")
    silence = host.check_output("hothouse-amtool silence add alertname=Nothing --duration=1m --comment=test")
    assert silence in host.check_output("hothouse-amtool silence query --quiet")
    host.check_output(f"hothouse-amtool silence expire {silence}")
    assert silence not in host.check_output("hothouse-amtool silence query --quiet")


def test_no_alert_fires_or_is_pending_while_nothing_is_wrong(stack: Stack, wait: Callable[..., Any]) -> None:
    """Of late there is a time, longer than something has to be wrong, with no alert of either state.

    Prometheus remembers it, so this waits only where there was none yet. It had to read itself all that time. Of one
    alert a reboot of the primary is the cause, and it tells of it for longer.
    """
    groups = stack.request("/prometheus/api/v1/rules?type=alert", stack.login).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 40 and {rule["health"] for rule in rules} == {"ok"}
    patience, interval = max(rule["duration"] for rule in rules), max(group["interval"] for group in groups)
    span = int(patience + 2 * interval)
    awake = f'count_over_time(up{{job="prometheus"}}[{span}s]) >= {span // interval - 1}'
    window = f"{min(2700, 20 * span)}s:{interval}s"
    wrong = 'ALERTS{alertname!="RedisFailedOver"}'
    calm = f"max_over_time((absent_over_time({wrong}[{span}s]) and on () ({awake}))[{window}])"
    try:
        wait(lambda: query(stack, calm), f"{span} s without an alert", 3 * span + 60)
    except AssertionError as error:
        raise AssertionError(f"{error}: {query(stack, 'ALERTS')}") from None
