"""What a unit gives to the application's processes on a host, for tests that run real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
SHIM = TESTS.parents[1] / "roles/prepare/files"
SETTINGS = {
    "broker_transport_options": {"global_keyprefix": "q:"},
    "result_backend": "disabled://",
    "task_default_queue": "trials",
    "task_acks_late": True,
    "worker_prefetch_multiplier": 1,
    "worker_redirect_stdouts": False,
}


def set_up(patch: pytest.MonkeyPatch, folder: Path, broker_url: str, **settings: Any) -> None:
    """Make this process, and those that it starts, what a unit is with these Celery settings."""
    (folder / "broker_url").write_text(broker_url)
    (folder / "celery.json").write_text(json.dumps(SETTINGS | settings))
    for name, value in {
        "CREDENTIALS_DIRECTORY": folder,
        "HOTHOUSE_SETTINGS": folder / "celery.json",
        "HOTHOUSE_APP": "trials:app",
        "PYTHONPATH": f"{SHIM}:{TESTS}",
        "PYTHONDONTWRITEBYTECODE": 1,
        "PYTHONUNBUFFERED": 1,
    }.items():
        patch.setenv(name, str(value))


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python, as hothouse-run would."""
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, **options)


def send(*calls: tuple[str, list[Any]]) -> list[str]:
    """Send tasks as any process of the deployment does; their ids."""
    code = (
        "import hothouse_celery, json, sys\n"
        "for name, args in json.load(sys.stdin):\n"
        "    print(hothouse_celery.app.tasks[f'trials.{name}'].delay(*args).id)"
    )
    sent = python("-c", code, input=json.dumps(calls))
    assert not sent.returncode, sent.stderr
    return sent.stdout.split()


@contextmanager
def celery(log: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of Celery, and kill it at the end if it still runs."""
    # Who runs the tests as root is warned before there is a log.
    command = [sys.executable, "-W", "ignore:You're running the worker", "-m", "celery"]
    command += ["--quiet", "--app", "hothouse_celery", *words]
    with log.open("ab") as output, subprocess.Popen(
        command, stdout=output, stderr=output, env={**os.environ, **environment}
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def worker(log: Path, *options: str, journal: bool = True, **environment: str) -> Iterator[Any]:
    """Run a worker that takes its log, a file, for the journal or not; at the end it has to stop well."""
    log.touch()
    status = log.stat()
    environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino + (not journal)}"
    words = ["worker", "--loglevel", "INFO", "--without-gossip", "--without-mingle", *options]
    with celery(log, *words, **environment) as process:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
