"""The Grafana dashboard and the plots of the overview page: what they ask, the running Prometheus can answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest
from conftest import REPOSITORY, Stack

pytestmark = pytest.mark.scenarios("local", "prod")

DASHBOARD = json.loads((REPOSITORY / "docs/grafana/hothouse.json").read_text())
PLOTS = json.loads((REPOSITORY / "roles/nginx/files/overview/plots.json").read_text())
EXPRESSIONS = {
    f"{panel['title']} ({panel['type']}), {query['refId']}": query["expr"]
    for panel in DASHBOARD["panels"]
    for query in panel["targets"]
} | {
    f"plot {plot['id']}, {number}": one["expr"]
    for plot in PLOTS
    for number, one in enumerate(plot["series"] + plot["thresholds"])
}
# Prometheus has them only while an alert waits or fires, or a service hung of late.
SOMETIMES = {"ALERTS", "hothouse_hung_service"}
WORDS = {
    "and",
    "bool",
    "by",
    "group_left",
    "group_right",
    "ignoring",
    "offset",
    "on",
    "or",
    "unless",
    "without",
}


def ask(stack: Stack, path: str, **parameters: str) -> Any:
    answer = stack.request(f"/prometheus/api/v1/{path}?{urlencode(parameters)}", stack.login)
    assert answer.status == 200, answer.body
    return answer.json()["data"]


def concrete(expression: str) -> str:
    """What Grafana puts in for its own variables."""
    return expression.replace("$__rate_interval", "1m").replace("$__interval", "15s")


def metrics(expression: str) -> set[str]:
    """The names of metrics in an expression."""
    bare = re.sub(r'"(\\.|[^"\\])*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on|without|ignoring)\s*\([^)]*\)", " ", bare)
    return set(re.findall(r"\b[A-Za-z_][\w:]*\b(?!\s*\()", bare)) - WORDS


def test_names_of_metrics_are_told_from_the_rest_of_an_expression() -> None:
    assert metrics('sum by (task) (rate(a_total{type=~"b|c"}[5m])) > bool on (x) d:e:f or 0 * time()') == {
        "a_total",
        "d:e:f",
    }


def test_every_metric_of_the_dashboard_and_the_plots_exists(stack: Stack) -> None:
    asked = set().union(*(metrics(concrete(expression)) for expression in EXPRESSIONS.values()))
    assert len(asked) > 10
    assert asked - SOMETIMES <= set(ask(stack, "label/__name__/values"))


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_what_the_dashboard_and_the_plots_ask_has_an_answer(
    stack: Stack, wait: Callable[..., Any], name: str
) -> None:
    """The scheduled task runs all the time, so there are figures of workers, queues and tasks."""
    expression = concrete(EXPRESSIONS[name])
    if expression.startswith("ALERTS"):
        assert ask(stack, "query", query=expression)["resultType"] == "vector"
    else:
        wait(lambda: ask(stack, "query", query=expression)["result"], f"an answer to {expression}", 60)
