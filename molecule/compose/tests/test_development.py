"""docker-compose.yml with docker-compose 1.29: Flower at http://localhost:5555, the code from its folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from common import *  # noqa: F403
from conftest import Stack
from test_flower import (  # noqa: F401
    test_a_login_with_only_half_of_it_right_is_refused,
    test_a_task_crosses_every_queue_and_shows_in_flower,
    test_a_wrong_login_is_refused_everywhere,
    test_the_generated_login_opens_every_page,
)

COMMAND = "docker-compose up -d flower"

pytestmark = pytest.mark.usefixtures("up")


def test_flower_is_at_the_address_of_the_guide(stack: Stack) -> None:
    """Typed on the machine itself, with its name for itself."""
    for login, status in ((f"-u '{stack.login}'", "200"), ("", "401 429"), ("-u admin:admin", "401 429")):
        done = stack.shell(f"curl -s -o /dev/null -w '%{{http_code}}' {login} http://localhost:5555/workers")
        assert done.stdout in status.split(), login


def test_it_starts_what_flower_needs_and_no_more(stack: Stack) -> None:
    workers = {f"worker-{name.partition('@')[0]}" for name in stack.workers}
    assert set(stack.inspect()) == {"flower", "mail", "redis"} | workers


def test_the_code_comes_from_its_folder(stack: Stack) -> None:
    package = stack.variables["compose"]["app_celery"].partition(".")[0]
    for name in [entry for entry in stack.inspect() if entry.startswith("worker-")]:
        found = stack.inside(name, "python", "-c", f"import {package}; print({package}.__file__)")
        assert found.stdout.startswith("/src/"), name


def test_everything_runs_and_a_campaign_arrives_at_the_mail_server(
    stack: Stack, wait: Callable[..., Any]
) -> None:
    stack.compose("up", "-d")
    assert "beat" in stack.inspect()
    worker = f"worker-{stack.workers[0].partition('@')[0]}"
    rows = "".join(f"reader{number}@example.com,Reader\\n" for number in range(20))
    line = (
        f"printf 'email,name\\n{rows}' | campaigns create --name first --template welcome "
        "--sender 'News <news@example.com>' --recipients -"
    )
    done = stack.inside(worker, "sh", "-c", line)
    assert done.rc == 0, done.stderr

    def delivered() -> int:
        return len(stack.inside("mail", "ls", "/var/lib/hothouse-mail/Maildir/new").stdout.split())

    wait(lambda: delivered() == 20, "twenty mails", 60)
    wait(lambda: stack.health()["beat"] == "healthy", "the health of beat", 60)


def test_the_playbook_keeps_a_login_that_was_written_into_env(
    stack: Stack, own_login: Callable[[str, str], None]
) -> None:
    own_login("developer", "a-login-of-the-developer")
    done = stack.playbook("playbooks/compose.yml")
    assert re.search(r"\bchanged=0\b", done.stdout), done.stdout[-1000:]
    assert stack.login == "developer:a-login-of-the-developer"


def test_flower_refuses_a_login_that_is_weak_or_that_it_would_misread(
    stack: Stack,
    restart: Callable[[], None],
    own_login: Callable[[str, str], None],
    wait: Callable[..., Any],
) -> None:
    """It says why, and tries again by itself until the login will do."""

    def log() -> str:
        return stack.compose("logs", "--tail", "5", "flower")

    own_login("admin", "admin")
    restart()
    wait(lambda: "FLOWER_PASSWORD has to have at least 12 characters" in log(), "the first reason", 30)
    assert stack.answers("admin:admin") == 0
    own_login("developer", "with-a,comma-in-it")
    restart()
    wait(
        lambda: "FLOWER_PASSWORD has to be printable ASCII without blanks and `,`" in log(),
        "the second reason",
        30,
    )
    assert stack.answers("developer:with-a,comma-in-it") == stack.answers("developer:with-a") == 0
    assert "comma-in-it" not in log()


def test_a_health_check_fails_when_the_service_cannot_do_its_work(stack: Stack) -> None:
    """Without Redis nothing works, though every process lives."""
    worker = stack.workers[0]
    service = f"worker-{worker.partition('@')[0]}"
    checks = {"flower": ["flower", ""], service: ["worker", worker]}
    for name, words in checks.items():
        assert stack.inside(name, "python", "-m", "hothouse_compose", "check", *words).rc == 0, name
    stack.compose("stop", "redis")
    try:
        for name, words in checks.items():
            assert stack.inside(name, "python", "-m", "hothouse_compose", "check", *words).rc != 0, name
    finally:
        stack.compose("start", "redis")
