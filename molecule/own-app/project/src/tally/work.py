"""Counts words. It names a broker of its own, which the deployment replaces, and reads a setting and a secret."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery

from tally import libraries

queue = Celery("tally", broker="redis://localhost:1/7", backend="redis://localhost:1/7")
queue.conf.beat_schedule = {"tick": {"task": "tally.tick", "schedule": 1.0}}


@queue.task(name="tally.zähle")
def count(text: str) -> int:
    """The number of words in a text."""
    return len(text.split())


@queue.task(name="tally.tick")
def tick() -> str:
    """What the deployment handed over: the setting, and how long the secret is."""
    secret = Path(os.environ["CREDENTIALS_DIRECTORY"], "tally_key").read_text().strip()
    return f"{os.environ['TALLY_GREETING']} {len(secret)}"


@queue.task(name="tally.reach")
def reach(files: list[str], pids: list[int]) -> tuple[list[str], list[str]]:
    """Which of the files a task can read, and what keeps it from sending a signal to each of the processes."""
    return (
        [file for file in files if not obstacle(Path(file).read_bytes)],
        [obstacle(os.kill, pid, signal.SIGCONT) for pid in pids],
    )


def obstacle(action: Callable[..., Any], *arguments: Any) -> str:
    """The name of the error that an action ends with; nothing if it succeeds."""
    try:
        action(*arguments)
    except OSError as error:
        return type(error).__name__
    return ""


@queue.task(name="tally.use")
def use() -> dict[str, str]:
    """Uses libraries that a sandbox could harm: the name of each, and what it raised."""
    return libraries.use_all()
