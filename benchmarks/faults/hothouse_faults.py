"""Tasks that tell the collector on the machine outside that they ran, and a producer that tells it what it published.

On the hosts, beside hothouse_celery; FAULTS_REPORT_TO is the collector's address. The producer:

    hothouse-run python -m hothouse_faults RATE FIRST
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from celery import shared_task


def tell(connection: socket.socket, line: str) -> str:
    """Send a line and return the answer, which says that it is noted."""
    connection.sendall(f"{line}\n".encode())
    answer = connection.makefile().readline().strip()
    if not answer:
        raise ConnectionError("the collector is gone")
    return answer


def connect() -> socket.socket:
    host, _, port = os.environ["FAULTS_REPORT_TO"].partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


@shared_task(name="faults.note", ignore_result=True)
def note(number: int, seconds: float) -> None:
    """Run for some seconds, which the collector hears at the beginning and at the end."""
    name = socket.gethostname()
    with connect() as connection:
        tell(connection, f"start {number} {name}")
        time.sleep(seconds)
        tell(connection, f"end {number} {name}")


@shared_task(name="faults.poison", ignore_result=True, default_retry_delay=1)
def poison(number: int, victim: str) -> None:
    """Kill the process that runs it (`child`), or the worker with all its children (`worker`)."""
    with connect() as connection:
        tell(connection, f"start {number} {socket.gethostname()}")
    if victim == "worker":
        os.killpg(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def produce(rate: float, first: int) -> None:
    """Publish `rate` tasks a second, numbered from `first` on, until the collector says stop."""
    count, begin, answer = 0, time.monotonic(), "go"
    with connect() as connection:
        while answer != "stop":
            number = first + count
            before = time.monotonic()
            try:
                note.delay(number, 0.05)
                line = f"published {number} {time.monotonic() - before:.3f}"
            except Exception as error:  # whatever reaches the caller is what is counted
                line = f"refused {number} {' '.join(repr(error).split())}"
            answer = tell(connection, line)
            count += 1
            ahead = begin + count / rate - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
            else:
                begin = time.monotonic() - count / rate


if __name__ == "__main__":
    from hothouse_celery import app  # noqa: F401 - the application that the tasks belong to

    produce(float(sys.argv[1]), int(sys.argv[2]))
