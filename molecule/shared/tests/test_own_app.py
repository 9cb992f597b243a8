"""Another Celery project than ours: its own broker setting is replaced, its environment and secret reach its tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import Stack

pytestmark = pytest.mark.scenarios("own-app")


def test_its_tasks_run_on_their_queue_and_flower_counts_them(stack: Stack, wait: Callable[..., Any]) -> None:
    """Names beyond ASCII, both of the task and of its queue."""
    code = "import hothouse_celery as h; print(h.app.send_task('tally.zähle', ['three small words']).get(timeout=30))"
    assert stack.first("app").check_output(f'hothouse-run python -c "{code}"') == "3"
    counted = 'flower_events_total{task="tally.zähle",type="task-succeeded",'
    ask = "curl --fail --silent http://127.0.0.1:5555/flower/metrics"
    wait(lambda: counted in stack.first("flower").check_output(ask), "the task in Flower", 30)


def test_its_environment_and_secret_reach_its_tasks(stack: Stack) -> None:
    code = "import hothouse_celery as h; print(h.app.send_task('tally.tick').get(timeout=30))"
    answer = stack.first("app").check_output(f'hothouse-run python -c "{code}"')
    assert answer == 'it\'s a "$quoted" value, with spaces, ü & more 40'


def test_its_schedule_runs(stack: Stack, wait: Callable[..., Any]) -> None:
    path = "/flower/api/tasks?taskname=tally.tick&state=SUCCESS"
    wait(lambda: len(stack.request(path, stack.login).json()) >= 3, "the schedule", 60)


def test_nothing_of_the_example_application_is_on_the_host(stack: Stack) -> None:
    found = stack.first("app").run(
        "grep -rIl campaigns /etc /opt/hothouse/lib /usr/local; find /opt -iname '*campaigns*'"
    )
    assert found.stdout == ""


def test_without_a_monitoring_host_there_is_nothing_of_it(stack: Stack) -> None:
    """The overview page is there and knows; no exporter is installed."""
    host = stack.first("nginx")
    assert host.run("dpkg-query --show 'prometheus*'").stdout == ""
    assert stack.request("/config.json", stack.login).json()["prometheus"] is None
    assert stack.request("/", stack.login).status == 200
    assert stack.request("/prometheus/", stack.login).status == 404
