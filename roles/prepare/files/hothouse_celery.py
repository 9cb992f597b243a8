"""The Celery application that every process of Hothouse runs: the user's own, with the deployment's settings on top.

Units and `hothouse-run` start `celery --app hothouse_celery …`. The environment names what is loaded:

HOTHOUSE_APP           the user's application, `package.module:app`; without it (Flower) an empty one
HOTHOUSE_SETTINGS      a JSON file of Celery settings, /etc/hothouse/celery.json unless told
CREDENTIALS_DIRECTORY  set by systemd; its file `broker_url` is the connection to Redis

As a command it answers two questions of the deployment: `check` (does the application import?) and
`ping QUEUE…` (does a task cross every queue?).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery.exceptions import TimeoutError as ResultTimeout
from celery.utils.imports import symbol_by_name

PING_TASK = "hothouse.ping"
# Settings that an application may add to and the deployment completes; all others it replaces.
MERGED = ("broker_transport_options", "result_backend_transport_options")


def credential(name: str) -> str:
    """The text of one credential of this unit; KeyError and OSError name what is missing."""
    return (Path(os.environ["CREDENTIALS_DIRECTORY"]) / name).read_text().strip()


def configure(app: Celery) -> Celery:
    """Put the deployment's settings and the connection to Redis on top of the application's own."""
    settings: dict[str, Any] = json.loads(
        Path(os.environ.get("HOTHOUSE_SETTINGS", "/etc/hothouse/celery.json")).read_text()
    )
    for name in MERGED:
        settings[name] = {**(app.conf.get(name) or {}), **settings.get(name, {})}
    url = credential("broker_url")
    settings |= {"broker_url": url, "broker_read_url": url, "broker_write_url": url}
    settings.setdefault("result_backend", url)
    if settings.get("beat_scheduler") or "redbeat_key_prefix" in settings:
        settings["redbeat_redis_url"] = url
    app.conf.update(settings)
    return app


def ping() -> str:
    """Answer with the host that ran it; sent to every queue at the end of a deployment."""
    return socket.gethostname()


def load() -> Celery:
    """The application named by HOTHOUSE_APP, configured, with the ping task added."""
    target = os.environ.get("HOTHOUSE_APP")
    app = configure(symbol_by_name(target) if target else Celery("hothouse"))
    if target:
        app.task(name=PING_TASK, ignore_result=False, acks_late=False)(ping)
    return app


def notify_systemd(state: str, **_signal: Any) -> None:
    """Tell systemd the state of this service (sd_notify(3)); nothing when it was not started by systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


@signals.worker_ready.connect(weak=False)
def worker_ready(**_signal: Any) -> None:
    notify_systemd("READY=1")


# Connected before RedBeat's own receiver, which waits for the lock: a standby is up as well.
@signals.beat_init.connect(weak=False)
def beat_init(**_signal: Any) -> None:
    notify_systemd("READY=1")


app = load()


def main() -> int:
    """The command: `check` prints the tasks, `ping QUEUE…` the host that answered on each queue, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m hothouse_celery", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="import the application and all its tasks")
    pinger = commands.add_parser("ping", help="send a task through each queue and wait for its answer")
    pinger.add_argument("queue", nargs="+")
    pinger.add_argument("--timeout", type=float, default=30, metavar="SECONDS")
    arguments = parser.parse_args()
    if arguments.command == "check":
        app.loader.import_default_modules()
        own = sorted(name for name in app.tasks if not name.startswith(("celery.", "hothouse.")))
        if not own:
            print(f"{os.environ.get('HOTHOUSE_APP')} has no task of its own", file=sys.stderr)
            return 1
        print(json.dumps(own))
        return 0
    return ping_queues(arguments.queue, arguments.timeout)


def ping_queues(queues: list[str], timeout: float) -> int:
    """Send a task through each queue and print what came back, as JSON.

    A queue whose backlog shrinks within `timeout` seconds has workers as well: the task only waits for its turn.
    """
    results = {queue: app.tasks[PING_TASK].apply_async(queue=queue) for queue in queues}
    before = {queue: backlog(queue) for queue in queues}
    answers: dict[str, str] = {}
    deadline = time.monotonic() + timeout
    for queue, result in results.items():
        try:
            answers[queue] = result.get(timeout=max(0.1, deadline - time.monotonic()))
        except ResultTimeout:
            waiting = backlog(queue)
            if waiting >= before[queue]:
                print(
                    f"No worker answered on the queue {queue} in {timeout:g} s; {waiting} tasks wait in it. Look at "
                    "the workers that consume it. If they are busy with long tasks, wait longer: "
                    "verify_timeout_seconds in the inventory.",
                    file=sys.stderr,
                )
                return 1
            answers[queue] = f"busy: {before[queue] - waiting} tasks were taken, {waiting} wait"
    print(json.dumps(answers))
    return 0


def backlog(queue: str) -> int:
    """How many tasks wait in a queue."""
    with app.connection_for_read() as connection:
        # Not queue_declare(passive=True), which asks for a key without the prefix that the ACL allows.
        return int(connection.default_channel._size(queue))


if __name__ == "__main__":
    # Under this name, so that the application and its signals exist once.
    from hothouse_celery import main as run

    sys.exit(run())
