"""docker-compose.prod.yml with docker-compose 1.29: Flower behind nginx, the application as a release."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from common import *  # noqa: F403
from conftest import Stack
from test_flower import (  # noqa: F401
    test_a_login_with_only_half_of_it_right_is_refused,
    test_a_task_crosses_every_queue_and_shows_in_flower,
    test_a_wrong_login_is_refused_everywhere,
    test_an_action_from_a_browser_works_through_the_proxy,
    test_failed_logins_are_limited_and_good_ones_are_not,
    test_security_headers_are_on_every_answer,
    test_the_bare_prefix_leads_on_and_the_prefix_is_kept,
    test_the_generated_login_opens_every_page,
    test_what_flower_answers_without_a_login_is_fenced,
)

COMMAND = "docker-compose -f docker-compose.prod.yml up -d flower"

pytestmark = pytest.mark.usefixtures("up")


def test_flower_is_at_the_address_of_the_guide_with_a_certificate_of_the_own_authority(stack: Stack) -> None:
    ca = ".hothouse/compose/ca.crt"
    for login, status in ((f"-u '{stack.login}'", "200"), ("", "401 429"), ("-u admin:admin", "401 429")):
        done = stack.shell(
            f"curl -sL -o /dev/null -w '%{{http_code}}' --cacert {ca} {login} https://localhost/flower"
        )
        assert done.stdout in status.split(), login
    assert stack.shell("curl -s https://localhost/flower").rc == 60, (
        "the certificate is one that everybody trusts"
    )


def test_only_nginx_is_reachable(stack: Stack) -> None:
    published = {
        name
        for name, entry in stack.inspect().items()
        if any((entry["NetworkSettings"]["Ports"] or {}).values())
    }
    assert published == {"nginx"}
    assert stack.shell("curl -s http://localhost:5555/").rc == 7


def test_flower_is_found_again_after_a_restart_of_either(stack: Stack, wait: Callable[..., Any]) -> None:
    """nginx asks for addresses only when it starts."""
    for services in (["flower"], ["nginx"], ["redis", "flower"]):
        stack.compose("restart", *services)
        wait(lambda: stack.answers(stack.login) == 200, f"Flower after a restart of {services}")


def test_the_application_is_the_release(stack: Stack) -> None:
    package = stack.variables["compose"]["app_celery"].partition(".")[0]
    worker = f"worker-{stack.workers[0].partition('@')[0]}"
    found = stack.inside(worker, "python", "-c", f"import {package}; print({package}.__file__)")
    assert found.stdout.startswith("/opt/hothouse/app/current/")
