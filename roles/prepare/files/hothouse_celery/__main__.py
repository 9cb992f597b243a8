"""The commands of the deployment.

check                does the application import, and can its queues have their names? Prints its tasks.
ping QUEUE…          does a task cross every queue? Prints who answered, and which unknown tasks can now be put back.
dead-letters         the messages that were put aside: those that no worker can run, or whose taker died each time
                     (dead), and those whose task no release knew (unknown)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from celery.exceptions import TimeoutError as ResultTimeout
from redis import ResponseError

from hothouse_celery import PING_TASK, app, dead, queues


def main() -> int:
    """Run the command; 0 if all is well."""
    parser = argparse.ArgumentParser(
        prog="python -m hothouse_celery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="import the application and all its tasks")
    checker.add_argument(
        "--settings", metavar="SUM", help="not read: with other settings it is another command"
    )
    pinger = commands.add_parser("ping", help="send a task through each queue and wait for its answer")
    pinger.add_argument("queue", nargs="+")
    pinger.add_argument("--timeout", type=float, default=30, metavar="SECONDS")
    letters = commands.add_parser("dead-letters", help="list dead letters, put them back or throw them away")
    letters.add_argument("--json", action="store_true", help="print all of it, one JSON object per line")
    action = letters.add_mutually_exclusive_group()
    action.add_argument("--requeue", nargs="*", metavar="ID", help="put the tasks back into their queues")
    action.add_argument("--drop", nargs="*", metavar="ID", help="forget the tasks")
    which = letters.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="with --requeue or --drop: all dead letters")
    which.add_argument(
        "--unknown",
        action="store_true",
        help="the unknown tasks only: list them, drop all, or requeue those that this release knows",
    )
    arguments = parser.parse_args()
    if arguments.command == "check":
        return check()
    if arguments.command == "ping":
        return ping_queues(arguments.queue, arguments.timeout)
    ids = arguments.requeue if arguments.drop is None else arguments.drop
    if ids is None:
        if arguments.all:
            letters.error("--all goes with --requeue or --drop")
        return list_letters(arguments.json, arguments.unknown)
    if bool(ids) == (arguments.all or arguments.unknown):
        letters.error("name the tasks by their ids, or all of them by --all or --unknown")
    requeue = arguments.drop is None
    if arguments.unknown:
        return settle_unknown(requeue)
    return settle_letters(ids, requeue)


def check() -> int:
    """Import the application, look at its queues, and print its tasks, as JSON."""
    app.loader.import_default_modules()
    own = sorted(name for name in app.tasks if not name.startswith(("celery.", "hothouse.")))
    if not own:
        print(f"{os.environ.get('HOTHOUSE_APP')} has no task of its own", file=sys.stderr)
        return 1
    problems = queues.problems(app)
    if app.conf.beat_schedule:
        from hothouse_celery.schedule import refusals

        if refused := refusals(app):
            problems += ["beat cannot send these entries of the schedule (beat_schedule):"]
            problems += [f"  {name!r}: {reason}" for name, reason in refused.items()]
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 1
    print(json.dumps(own))
    return 0


def ping_queues(names: list[str], timeout: float) -> int:
    """Send a task through each queue and print what came back, as JSON; then what can be put back, for those who read.

    A queue whose backlog shrinks within `timeout` seconds has workers as well: the task only waits for its turn.
    """
    results = {queue: app.tasks[PING_TASK].apply_async(queue=queue) for queue in names}
    before = {queue: backlog(queue) for queue in names}
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
    offer()
    return 0


def offer() -> None:
    """Say which tasks were set aside that this release knows."""
    try:
        counts = dead.unknown_tasks(app)
    except ResponseError as error:  # the rights of an earlier version
        print(f"Redis does not tell which tasks were set aside: {error}. Run site.yml.", file=sys.stderr)
        return
    for name in counts.keys() & (dead.known(app) if counts else set()):
        print(
            f"{counts[name]} messages of the task {name} were set aside because no release knew it; this one does. Run "
            "them, on a host of the group app: hothouse-run python -m hothouse_celery dead-letters --requeue --unknown",
            file=sys.stderr,
        )


def backlog(queue: str) -> int:
    """How many tasks wait in a queue."""
    with app.connection_for_read() as connection:
        # Not queue_declare(passive=True), which asks for a key without the prefix that the ACL allows.
        return int(connection.default_channel._size(queue))


def list_letters(as_json: bool, unknown: bool) -> int:
    """Print what was put aside, the oldest first."""
    for letter in dead.letters(app, ("unknown",) if unknown else dead.KINDS):
        print(json.dumps(letter) if as_json else describe(letter))
    return 0


def describe(letter: dict[str, Any]) -> str:
    """A dead letter in one line; why, and what it was called with, are for --json."""
    try:
        buried = datetime.fromtimestamp(letter["time"], UTC).isoformat(sep=" ", timespec="seconds")
    except (TypeError, ValueError, OverflowError, OSError):
        buried = "-"
    task, queue, runs = (word(letter[name]) for name in ("task", "queue", "deliveries"))
    return f"{letter['id']} {buried} {task} queue={queue} runs={runs} kind={letter['kind']}"


def word(value: Any) -> str:
    """A value of a letter, which may be anything, within a line."""
    text = "-" if value is None else str(value)
    return text if text.isprintable() else json.dumps(text)


def settle_letters(ids: list[str], requeue: bool) -> int:
    """Put letters back, or drop them: those with these ids, without any all dead ones. Print the ids of those it was.

    1 if one of them stays a letter, or is none.
    """
    kinds = dead.KINDS if ids else ("dead",)
    seen, failed = report(dead.settle(app, lambda letter: not ids or letter["id"] in ids, requeue, kinds))
    for missing in sorted(set(ids) - seen):
        print(f"no dead letter has the id {missing}", file=sys.stderr)
    return 1 if failed or set(ids) - seen else 0


def settle_unknown(requeue: bool) -> int:
    """Put the unknown tasks back that this release knows, or drop all of them; 1 if one could not be."""
    tasks = dead.known(app) if requeue else set()
    _, failed = report(
        dead.settle(app, lambda letter: not requeue or letter["task"] in tasks, requeue, ("unknown",))
    )
    for name, count in dead.unknown_tasks(app).items() if requeue else ():
        if name not in tasks:
            print(f"{count} messages of the task {name} stay: this release does not know it", file=sys.stderr)
    return 1 if failed else 0


def report(settled: Iterator[tuple[str, str]]) -> tuple[set[str], bool]:
    """Print what became of each; the ids, and whether one failed."""
    seen, failed = set(), False
    for name, trouble in settled:
        seen.add(name)
        if trouble:
            failed = True
            print(f"{name}: {trouble}", file=sys.stderr, flush=True)
        else:
            print(name, flush=True)
    if not seen:
        print("there is none")
    return seen, failed


if __name__ == "__main__":
    sys.exit(main())
