"""Lines of the log: one of `key=value` for every record, which the journal and the monitoring read."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from celery import signals
from celery._state import get_current_task
from celery.exceptions import TimeLimitExceeded, WorkerLostError
from celery.utils.log import ColorFormatter, get_multiprocessing_logger
from kombu.utils.encoding import safe_repr

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
            fields.setdefault("exception", said(error))
            fields["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        return fields


def said(error: BaseException) -> str:
    """What an exception says of itself, also if that raises another one, be it one that ends processes."""
    try:
        return safe_repr(error)
    except BaseException:
        return f"{type(error).__name__}, which cannot be shown"


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
