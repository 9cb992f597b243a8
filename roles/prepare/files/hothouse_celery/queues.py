"""The names of queues that an application uses, and those of them that cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from celery import Celery
from hothouse_transport.names import unusable


def named(app: Celery) -> Iterator[tuple[str, Any]]:
    """Where a queue is named, and its name; what is found out only when a task is sent is not here."""
    conf = app.conf
    yield "task_default_queue", conf.task_default_queue
    for queue in conf.task_queues or ():  # of a mapping its keys
        yield "task_queues", getattr(queue, "name", queue)
    yield from of_routes(conf.task_routes)
    for name, task in sorted(app.tasks.items()):
        yield f"the option queue of the task {name}", getattr(task, "queue", None)
    schedule = conf.beat_schedule
    for name, entry in schedule.items() if isinstance(schedule, Mapping) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("options"), Mapping):
            yield f"the entry {name} of beat_schedule", queue_of(entry["options"])


def of_routes(routes: Any) -> Iterator[tuple[str, Any]]:
    """The queues of task_routes: a mapping, pairs, or a list of either and of functions, which are not asked."""
    if isinstance(routes, Mapping):
        routes = list(routes.items())
    for route in routes if isinstance(routes, list | tuple) else ():
        if isinstance(route, Mapping):
            yield from of_routes(route)
        elif isinstance(route, list | tuple) and len(route) == 2 and isinstance(route[1], Mapping | str):
            where = route[1]
            yield (
                f"the route of {route[0]} in task_routes",
                where if isinstance(where, str) else queue_of(where),
            )
        elif isinstance(route, list | tuple):
            yield from of_routes(route)


def queue_of(options: Mapping[str, Any]) -> Any:
    """The name of the queue in the options of a task, which may also be a Queue."""
    queue = options.get("queue")
    return getattr(queue, "name", queue)


def problems(app: Celery) -> list[str]:
    """What is wrong with the application's queues, a sentence for each."""
    return [
        f"{where}: {name!r} cannot be the name of a queue: {reason}. Give the queue another name."
        for where, name in named(app)
        if name is not None and (reason := unusable(name))
    ]
