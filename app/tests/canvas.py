"""An application whose tasks are put together in all ways that Celery's canvas knows, as its project would have it."""

from typing import Any

from celery import Celery, chain, chord, group

app = Celery("canvas", broker="redis://nowhere.invalid/0")


@app.task
def add(x: int, y: int = 0) -> int:
    return x + y


@app.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task
def fail(*_args: Any) -> None:
    raise ValueError("as it should")


@app.task
def heard(_request: Any, _error: Any, _traceback: Any) -> str:
    return "heard"


@app.task(bind=True)
def inside(self: Any) -> list[str]:
    """Publish from within a task, and tell the ids of the results."""
    saved = group(add.s(i) for i in range(3))()
    saved.save()
    workflows = [
        chord([add.s(1, 1), add.s(2, 2)])(total.s()),
        (group(add.s(3), add.s(4)) | total.s()).delay(),
        chain(add.s(1), add.s(2), add.s(3)).delay(),
    ]
    self.update_state(state="PROGRESS", meta={"done": 1})
    answers = app.control.ping(timeout=2, limit=1)
    return [saved.id, str(len(answers)), *(result.id for result in workflows)]


@app.task(bind=True)
def grow(self: Any) -> Any:
    """A task that is replaced by a chord."""
    raise self.replace(chord([add.s(5), add.s(6)], total.s()))
