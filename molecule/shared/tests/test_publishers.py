"""What commands of the application may do, how they end, and what they revoke, on a host."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Stack

pytestmark = pytest.mark.scenarios("staging")
PING = "from campaigns.celery import app; ping = app.signature('hothouse.ping', immutable=True); "


def run(stack: Stack, code: str, *options: str) -> str:
    """What a command of hothouse-run prints that knows nothing of the deployment."""
    return stack.first("app").check_output(
        " ".join(["hothouse-run", *options, "python", "-c", shlex.quote(code)])
    )


def test_a_command_publishes_a_chord_and_saves_a_group(stack: Stack) -> None:
    stack.refusals()
    code = (
        "from celery import chord, group; saved = group([ping, ping])(); saved.save(); saved.delete(); "
        "print(chord([ping, group([ping, ping])])(ping).get(timeout=30), len(saved.get(timeout=30)))"
    )
    assert run(stack, PING + code) == f"{stack.first('app').check_output('hostname')} 2"
    assert stack.refusals() == []


def test_a_command_may_not_control_workers_unless_the_inventory_says_so(stack: Stack) -> None:
    done = stack.first("app").run(
        'hothouse-run python -c "from campaigns.celery import app; app.control.ping()"'
    )
    assert done.rc == 1
    assert "set app_may_control: true in the inventory" in done.stderr
    assert stack.refusals()


def test_a_revoked_task_stays_revoked_after_its_workers_were_restarted(
    stack: Stack, wait: Callable[..., Any]
) -> None:
    """By Flower, as its page does."""
    task = run(stack, PING + "print(ping.apply_async(countdown=600).id)")
    state = PING + f"print(app.AsyncResult('{task}').state)"
    wait(lambda: task in stack.request("/flower/api/tasks", stack.login).json(), "the task in Flower", 30)
    assert stack.request(f"/flower/api/task/revoke/{task}", stack.login, "POST").status == 200
    wait(lambda: stack.redis("ZSCORE", "q:revoked", json.dumps(task)), "the note of the revoke", 10)
    # That it is revoked shall not come from those that heard of it.
    stack.redis("DEL", f"r:celery-task-meta-{task}")
    stack.first("worker").check_output("systemctl restart 'celery-worker@*'")
    wait(lambda: run(stack, state) == "REVOKED", "its workers to know of it", 30)


# Runs a command of hothouse-run, sends it a signal once it has said that it is ready, and prints its exit code.
SIGNAL = """
command=$1 signal=$2
coproc hothouse-run python -u -c "$command"
read -r ready <&"${COPROC[0]}"
exec 3<&"${COPROC[0]}"
systemctl daemon-reload # systemd reads units anew, which must not change how this one ends
kill -"$signal" "$COPROC_PID"
wait "$COPROC_PID"
echo "$? $(cat <&3)"
"""
WAIT = "import time; print('ready'); time.sleep(60)"
TOLD = (
    "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit('told')); sys.stderr = sys.stdout; "
    "print('ready'); signal.pause()"
)


@pytest.mark.parametrize(
    ("code", "signal", "end"),
    [(WAIT, "TERM", ["143"]), (WAIT, "HUP", ["129"]), (TOLD, "TERM", ["1", "told"])],
)
def test_a_signal_to_hothouse_run_reaches_the_command(
    stack: Stack, code: str, signal: str, end: list[str]
) -> None:
    words = " ".join(map(shlex.quote, ("bash", "-c", SIGNAL, "signal", code, signal)))
    assert stack.first("app").check_output(words).split() == end
    assert stack.first("app").check_output("systemctl list-units --no-legend 'hothouse-run-*'") == ""


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("python -c 'exit(7)'", 7),
        ("no-such-command", 127),
        ("python -c 'import os; os.kill(os.getpid(), 9)'", 137),
        ("python -c 'import os; os.kill(os.getpid(), 15)'", 143),
    ],
)
def test_the_exit_code_of_a_command_comes_back(stack: Stack, command: str, code: int) -> None:
    assert stack.first("app").run(f"hothouse-run {command}").rc == code


def test_a_command_has_the_terminal_that_hothouse_run_has(stack: Stack) -> None:
    asked = "hothouse-run python -c 'import sys; print(sys.stdin.isatty(), sys.stdout.isatty())'"
    assert "True True" in stack.first("app").check_output(f"script -qec {shlex.quote(asked)} /dev/null")
    assert stack.first("app").check_output(f"echo | {asked}") == "False False"
