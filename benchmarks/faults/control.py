"""The control: a worker with the settings and the transport that Celery comes with, on the same hosts and Redis."""

from __future__ import annotations

import json
import time

from collector import Tasks
from hosts import Hosts, wait

UNIT = "fault-control.service"
QUEUE = "fault-control"
FIRST, COUNT = 30_000_000, 400
# An application as a tutorial has it: nothing is set but where the broker is.
APPLICATION = f"""
import os
from pathlib import Path
from celery import Celery
app = Celery("control", broker=Path(os.environ["CREDENTIALS_DIRECTORY"], "broker_url").read_text().strip())
app.conf.update(
    broker_transport_options={{"global_keyprefix": "q:"}}, task_default_queue="{QUEUE}", imports=["hothouse_faults"]
)
"""
# Publishes tasks: a JSON list of arguments on standard input, the task's name and the queue as arguments.
PUBLISH = """
import json, sys
from hothouse_celery import app
for arguments in json.load(sys.stdin):
    app.send_task(sys.argv[1], arguments, **({"queue": sys.argv[2]} if sys.argv[2:] else {}))
"""


def publish(hosts: Hosts, task: str, arguments: list[list[object]], queue: str = "") -> None:
    """Publish a task once for each list of arguments, from the host in front."""
    front = next(name for name in hosts.groups["app"] if name not in hosts.groups["redis"])
    words = f"hothouse-run python -c '{PUBLISH}' {task} {queue}"
    hosts.run(front, f"printf '%s' '{json.dumps(arguments)}' | {words}")


def run(hosts: Hosts, tasks: Tasks, kills: int, visibility: float) -> int:
    """Kill a stock worker `kills` times while it works; the number of tasks that are gone for good.

    visibility: seconds after which what a dead worker had taken is given to another.
    """
    host = hosts.groups["worker"][0]
    hosts.run(host, f"mkdir -p /run/fault && cat >/run/fault/control.py <<'END'{APPLICATION}END")
    hosts.run(
        host,
        f"systemd-run --quiet --unit {UNIT} --property=User=hothouse-worker --property=Restart=always "
        "--property=RestartSec=0 --property=StartLimitIntervalSec=0 --property=EnvironmentFile=/etc/hothouse/app.env "
        "--property=LoadCredential=broker_url:/etc/hothouse/credentials/worker_broker_url "
        "--setenv=PYTHONPATH=/run/fault:/opt/hothouse/lib /opt/hothouse/app/current/bin/celery --app control "
        "worker --concurrency 4 --without-gossip --without-mingle --hostname control@fault",
    )
    numbers = range(FIRST, FIRST + COUNT)
    try:
        publish(hosts, "faults.note", [[number, 0.1] for number in numbers], QUEUE)
        for _kill in range(kills):
            done = len([n for n in numbers if n in tasks.ends])
            wait(
                lambda done=done: len([n for n in numbers if n in tasks.ends]) > done + 5,
                "the worker to work",
                60,
            )
            hosts.run(host, f"systemctl kill --kill-whom=all --signal=KILL {UNIT}")
        # What the dead worker had taken comes back after the visibility timeout, and is not lost.
        last = (0.0, 0)

        def settled() -> bool:
            nonlocal last
            done = len([n for n in numbers if n in tasks.ends])
            if done != last[1]:
                last = time.monotonic(), done
            return not backlog(hosts) and time.monotonic() - last[0] > visibility + 10

        wait(settled, "the end of what can still come", 240)
    finally:
        hosts.run(host, f"systemctl stop {UNIT}; rm -f /run/fault/control.py", check=False)
    return COUNT - len([n for n in numbers if n in tasks.ends])


def backlog(hosts: Hosts) -> int:
    return int(hosts.run(hosts.primary(), f"hothouse-redis-cli LLEN q:{QUEUE}"))
