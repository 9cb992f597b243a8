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
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from celery import Celery, signals
from celery._state import get_current_task
from celery.exceptions import TimeLimitExceeded, WorkerLostError
from celery.exceptions import TimeoutError as ResultTimeout
from celery.utils.imports import symbol_by_name
from celery.utils.log import ColorFormatter, get_multiprocessing_logger

PING_TASK = "hothouse.ping"
# Settings that an application may add to and the deployment completes; all others it replaces.
MERGED = ("broker_transport_options", "result_backend_transport_options")

# journald takes the priority of a line from its beginning (sd-daemon(3)) and cuts a line at 48 KiB (LineMax).
PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
LINE_BYTES = 48_000
VALUE_LENGTH = 20_000
# A message that is a word and pairs, such as `sent batch=3 reason="not now"`; a longer one is a text.
PAIR = re.compile(r' ([A-Za-z_][\w.-]*)=("(?:[^"\\]|\\.)*"|[^\s"=]*)', re.ASCII)
PAIRS = re.compile(rf"([A-Za-z][\w.-]*)(?:{PAIR.pattern})+", re.ASCII)
PAIRS_LENGTH = 8_000
# A value that needs no quotes: ASCII that can be printed, without space, quote, `=` and backslash.
BARE = re.compile(r"[!#-<>-\[\]-~]+")
# How the worker names a task in a text, and what it says of one that did not succeed.
NAMED_TASK = re.compile(r"([\w.]+)\[([0-9a-f-]{36})\]")
OUTCOMES = {
    "raised unexpected": "failed",
    "raised expected": "failed",
    "INTERNAL ERROR": "failed",
    "rejected": "rejected",
    "retry": "retry",
}


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
    if "redbeat_key_prefix" in settings:
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


@signals.before_task_publish.connect(weak=False)
def stamp(headers: dict[str, Any], **_signal: Any) -> None:
    """Write the time of publishing (Unix, seconds) into the message, so that the age of a queue can be told from it.

    A retry is a new message. One that a lost worker gives back is the old one, and as old as it was.
    """
    headers["published"] = round(time.time(), 3)


class Logfmt(logging.Formatter):
    """One line of `key=value` for every record: level, event, task and id, then what the message carries."""

    def __init__(self, priorities: bool) -> None:
        """With `priorities` each line begins with the number that journald reads."""
        super().__init__()
        self.priorities = priorities

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{PRIORITIES.get(record.levelname, 6)}>" if self.priorities else ""
        fields = {"level": record.levelname.lower(), **self.fields(record)}
        length = VALUE_LENGTH
        while True:
            line = prefix + " ".join(f"{key}={quoted(shortened(fields[key], length))}" for key in fields)
            if len(line.encode(errors="backslashreplace")) <= LINE_BYTES:
                return line
            length //= 2

    def fields(self, record: logging.LogRecord) -> dict[str, str]:
        """What a record says, beside its level."""
        data, message = getattr(record, "data", None), record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if record.name.startswith("celery.") and isinstance(data, Mapping) and "id" in data:
            fields = task_fields(data)
        else:
            fields = {"event": "log", **task_of(record.name, message, error)}
            fields |= parsed(message) or {"logger": record.name, "message": message}
        if record.exc_info and error:
            fields.setdefault("exception", repr(error))
            fields["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        return fields


def task_fields(data: Mapping[str, Any]) -> dict[str, str]:
    """What the worker says about a task: the data of its records (celery/worker/strategy.py, celery/app/trace.py)."""
    if "eta" in data:
        event = "received"
    elif "runtime" in data:
        event = "succeeded"
    else:
        event = OUTCOMES.get(data.get("description", "retry"), "ignored")
    running = get_current_task()
    request: Any = running.request if running else {}
    found = {
        "event": event,
        "task": data.get("name"),
        "id": data["id"],
        "runtime": f"{data['runtime']:.3f}" if "runtime" in data else None,
        "result": data.get("return_value"),
        "exception": data.get("exc"),
        "eta": data.get("eta"),
        # The record of a retry has none.
        "args": data.get("args") or request.get("argsrepr"),
        "kwargs": data.get("kwargs") or request.get("kwargsrepr"),
    }
    return {key: str(value) for key, value in found.items() if value not in (None, "()", "{}")}


def task_of(logger: str, message: str, error: BaseException | None) -> dict[str, str]:
    """The task that a record is about: the running one, or the one of which the worker's main process speaks."""
    if (running := get_current_task()) and running.request.id:
        return {"task": running.name, "id": running.request.id}
    if logger.startswith("celery."):
        if found := NAMED_TASK.search(message):
            return {"task": found[1], "id": found[2]}
        return getattr(error, "hothouse_failed", {})
    return {}


@signals.task_failure.connect(weak=False)
def name_task(sender: Any, task_id: str, exception: Any, **_signal: Any) -> None:
    """Note which task lost its process: the worker logs the exception alone."""
    if isinstance(exception, (TimeLimitExceeded, WorkerLostError)):
        exception.hothouse_failed = {"event": "failed", "task": sender.name, "id": task_id}


def parsed(message: str) -> dict[str, str]:
    """Take a message apart that is a word and pairs; nothing if it is not, or has a key that is in every line."""
    if len(message) > PAIRS_LENGTH or not (found := PAIRS.fullmatch(message)):
        return {}
    pairs = PAIR.findall(message, found.end(1))
    try:
        fields = {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}
    except ValueError:  # an escape that is none
        return {}
    return {} if fields.keys() & {"level", "event", "task", "id"} else {"event": found[1], **fields}


def shortened(text: str, length: int) -> str:
    """A text without its middle, if it is longer."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]} … {text[len(text) - length // 2 :]}"


def quoted(text: str) -> str:
    """A value of logfmt: as it is, or in quotes with what cannot be printed escaped, line ends above all."""
    if BARE.fullmatch(text):
        return text
    value = json.dumps(text, ensure_ascii=False)
    return value if value.isprintable() else json.dumps(text)


@signals.after_setup_logger.connect(weak=False)
@signals.after_setup_task_logger.connect(weak=False)
def write_logfmt(logger: logging.Logger, **_signal: Any) -> None:
    """Replace Celery's formatters; whatever else the application has set up stays."""
    for handler in (*logger.handlers, *get_multiprocessing_logger().handlers):
        if isinstance(handler, logging.StreamHandler) and isinstance(handler.formatter, ColorFormatter):
            handler.setFormatter(Logfmt(is_journal(handler.stream)))


def is_journal(stream: Any) -> bool:
    """Whether systemd has connected a stream to the journal ($JOURNAL_STREAM, systemd.exec(5))."""
    status = os.fstat(stream.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


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
