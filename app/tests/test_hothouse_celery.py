"""What the deployment adds to any application, hothouse_celery: lines of the log, and the age of messages.

A real worker runs it. Its log is a file that it takes for the journal or not, by $JOURNAL_STREAM.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Redis, wait_until
from hosts import python, send, set_up, worker

LINE_MAX = 48 * 1024  # journald.conf(5)

PAIR = r'([A-Za-z_][\w.-]*)=("(?:[^"\\]|\\.)*"|[^\s"=\\]+)'
LINE = re.compile(rf"(?:<(?P<priority>[0-7])>)?(?P<pairs>{PAIR}(?: {PAIR})*)")

Line = dict[str, str]


def parse(text: str) -> Line:
    """The values of a line, its priority among them."""
    found = LINE.fullmatch(text)
    assert found, f"not logfmt: {text[:300]!r}"
    pairs = re.findall(PAIR, found["pairs"])
    line = {key: json.loads(value) if value[0] == '"' else value for key, value in pairs}
    assert len(line) == len(pairs), f"a key twice: {text}"
    return line | {"priority": found["priority"]}


@pytest.fixture
def shim(redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """The environment of a unit, with an empty queue."""
    set_up(monkeypatch, tmp_path, redis_server.admin_url)
    redis_server.admin.delete("q:trials")
    yield redis_server
    redis_server.admin.delete("q:trials")


def records(log: Path) -> list[str]:
    """The lines of a log; what Celery prints when it gets a signal is no record and not among them."""
    return [line for line in log.read_text().split("\n") if line and not line.startswith("worker: ")]


def ended(log: Path, ids: list[str]) -> bool:
    text = log.read_text()
    return all(re.search(f"event=(succeeded|failed) .*id={task} ", text) for task in ids)


@pytest.fixture
def run(shim: Redis, tmp_path: Path) -> Callable[..., list[list[Line]]]:
    """Run tasks in a prefork worker: all lines that have its id, for each."""

    def run(*calls: tuple[str, list[Any]]) -> list[list[Line]]:
        log, ids = tmp_path / "worker.log", send(*calls)
        with worker(log, "--concurrency=2"):
            wait_until(lambda: ended(log, ids), 40)
        written = records(log)
        assert max(len(text.encode()) for text in written) < LINE_MAX
        assert all(text.isprintable() for text in written), "journalctl would show `blob data`"
        lines = [parse(text) for text in written]
        return [[line for line in lines if line.get("id") == task] for task in ids]

    return run


def test_a_task_that_succeeds_is_received_and_succeeds_with_its_arguments_and_runtime(run: Any) -> None:
    [lines] = run(("say", ['sent campaign=spring-4f1c batch=3 reason="not\\n \\"now\\"" seconds=4.2']))
    received, said, succeeded = lines
    assert list(received) == ["level", "event", "task", "id", "args", "priority"]
    assert (received["event"], received["task"], received["level"]) == ("received", "trials.say", "info")
    assert "spring-4f1c" in received["args"]
    assert said == {
        "level": "info", "event": "sent", "task": "trials.say", "id": said["id"], "campaign": "spring-4f1c",
        "batch": "3", "reason": 'not\n "now"', "seconds": "4.2", "priority": "6",
    }  # fmt: skip
    assert succeeded["event"] == "succeeded"
    assert 0 <= float(succeeded["runtime"]) < 5
    assert succeeded["result"].startswith("'said sent campaign=spring-4f1c")
    assert "spring-4f1c" in succeeded["args"]


def test_any_other_message_is_one_value(run: Any) -> None:
    messages = [
        "two\nlines\r\nand <3>a\tthird \x1b[31m\x7f\x85\u2028\u00a0ü",
        "sent id=5",
        'sent reason="no \\d escape"',
        'sent reason="open',
        "sent a=1  b=2",
        "",
        "x " * 100_000,
        "sent" + " k=v" * 20_000,
        "\x1b" * 20_000 + "😀" * 20_000,
    ]
    for message, (_, said, _) in zip(messages, run(*(("say", [text]) for text in messages)), strict=True):
        assert (said["event"], said["logger"], said["task"]) == ("log", "trials", "trials.say"), message[:50]
        begin, cut, end = said["message"].partition(" … ")
        assert message.startswith(begin) and message.endswith(end)
        assert bool(cut) == (len(message) > 20_000)


def test_a_failure_is_one_line_with_its_whole_traceback_and_the_priority_of_an_error(run: Any) -> None:
    [lines] = run(("fail", [2, 'of "many"\nlines']))
    received, failed = lines
    assert (received["priority"], failed["priority"], failed["level"]) == ("6", "3", "error")
    assert failed["event"] == "failed"
    assert failed["exception"] == repr(ValueError('of "many"\nlines'))
    assert "of" in failed["args"]
    traceback = failed["traceback"].splitlines()
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-2:] == ['ValueError: of "many"', "lines"]
    assert sum("raise ValueError(text)" in line for line in traceback) == 1


def test_a_traceback_without_end_keeps_its_beginning_and_its_end_in_one_line(run: Any) -> None:
    [[_, failed]] = run(("fail", [100, "deep"]))
    assert failed["traceback"].startswith("Traceback (most recent call last):")
    assert " … " in failed["traceback"]
    assert failed["traceback"].endswith("ValueError: deep")


def test_what_libraries_say_while_a_task_runs_has_its_id(run: Any) -> None:
    [lines] = run(("warn", ["look\nout"]))
    _, warned, library, _ = lines
    assert (warned["logger"], library["logger"]) == ("py.warnings", "library")
    assert (warned["priority"], library["priority"]) == ("4", "4")
    assert library["message"] == "a library: look\nout"


def test_a_retry_is_a_line_with_its_arguments_and_a_message_of_its_own_age(run: Any) -> None:
    before = time.time()
    [lines] = run(("again", ["spring-4f1c"]))
    found = {line["event"]: line for line in lines}
    assert sorted(line["event"] for line in lines) == ["first", "received", "received", "retry", "succeeded"]
    assert found["retry"]["exception"].startswith("Retry in 0.2s")
    assert "spring-4f1c" in found["retry"]["args"]
    first, second = float(found["first"]["published"]), float(found["succeeded"]["result"])
    assert before - 0.001 <= first < second <= time.time()


def test_what_the_worker_says_of_lost_and_hanging_processes_names_their_task(run: Any) -> None:
    lost, hung = run(("lose", []), ("hang", []))
    assert [line["event"] for line in lost] == ["received", "failed"]
    assert "SIGKILL" in lost[1]["exception"]
    assert (lost[1]["task"], lost[1]["priority"]) == ("trials.lose", "3")
    found = {line["event"]: line for line in hung}
    assert len(hung) == 3 and {line["task"] for line in hung} == {"trials.hang"}
    assert found["failed"]["exception"] == "TimeLimitExceeded(1)"
    assert found["log"]["message"].startswith("Hard time limit (1")


def test_lines_have_no_priority_where_nobody_reads_it(shim: Redis, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with worker(log, "--pool=solo", journal=False):
        wait_until(lambda: "ready." in log.read_text())
    assert {parse(text)["priority"] for text in records(log)} == {None}


def test_handlers_and_formatters_of_the_application_stay(shim: Redis) -> None:
    code = (
        "import logging, hothouse_celery as h\n"
        "own = logging.StreamHandler(); own.setFormatter(logging.Formatter('%(message)s'))\n"
        "root = logging.getLogger(); root.addHandler(own); h.app.conf.worker_hijack_root_logger = False\n"
        "h.app.log.setup('INFO')\n"
        "for logger in (root, logging.getLogger('celery.task')):\n"
        "    print([type(handler.formatter).__name__ for handler in logger.handlers if handler.formatter])"
    )
    done = python("-c", code)
    assert done.stdout.splitlines() == ["['Formatter']", "['Logfmt']"]


def test_a_message_tells_when_it_was_published_even_after_it_came_back(shim: Redis, celery: Any) -> None:
    before = time.time()
    send(("say", ["hello"]))

    def head() -> dict[str, Any]:
        """The oldest message of the queue, where the monitoring looks for it."""
        message: dict[str, Any] = json.loads(shim.admin.lindex("q:trials", -1))
        return message

    published = head()["headers"]["published"]
    assert isinstance(published, float)
    assert before - 0.001 <= published <= time.time()
    with celery.connection_for_read() as connection:
        queue = connection.SimpleQueue("trials")
        message = queue.get(timeout=5)
        assert shim.admin.llen("q:trials") == 0
        message.requeue()
        queue.close()
    assert head()["headers"]["published"] == published
    assert head()["headers"]["redelivered"]


def test_a_queue_is_pinged_without_a_warning(shim: Redis, tmp_path: Path) -> None:
    set_up(pytest.MonkeyPatch(), tmp_path, shim.admin_url, result_backend=shim.admin_url)
    with worker(tmp_path / "worker.log", "--pool=solo"):
        asked = python("-W", "always", "-m", "hothouse_celery", "ping", "trials")
    assert list(json.loads(asked.stdout)) == ["trials"]
    assert "DuplicateTaskName" not in asked.stderr
