"""Counts words. It names a broker of its own, which the deployment replaces, and reads a setting and a secret."""

import os
import signal
from pathlib import Path

from celery import Celery

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
def reach(files: list[str], pids: list[int]) -> tuple[list[str], dict[int, str]]:
    """Which of the files a task can read, and what keeps it from sending a signal to each of the processes."""
    read, refused = [], {}
    for file in files:
        try:
            Path(file).read_bytes()
            read.append(file)
        except OSError:
            pass
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
            refused[pid] = "nothing"
        except OSError as error:
            refused[pid] = type(error).__name__
    return read, refused
