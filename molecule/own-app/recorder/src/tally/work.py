"""The names of the project tally, so that its place can be taken."""

import tally_recorder
from celery import Celery

tally_recorder.record("import")
queue = Celery("tally")


@queue.task(name="tally.recorded")
def recorded() -> None:
    """Writes down who runs tasks."""
    tally_recorder.record("task")
