"""Results in Redis, of which none costs a task: what Redis refuses for now is tried again, and at last given up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery._state import get_current_task
from celery.backends.redis import RedisBackend
from celery.states import READY_STATES
from celery.utils.log import get_logger
from hothouse_transport.refusals import ELSEWHERE, refusal
from redis.exceptions import ResponseError

logger = get_logger(__name__)

# How long Redis may refuse a result: longer than a failover takes, and not for as long as it is full, since a worker
# that waits takes no tasks, which is what makes room.
PATIENCE_SECONDS = 30.0
PAUSE_SECONDS = 0.5


def patience() -> float:
    """How long to wait for Redis: not where a worker takes its tasks, which is where no task runs."""
    return PATIENCE_SECONDS if get_current_task() else 0


class Backend(RedisBackend):
    """Celery fails a task whose result is refused, and never acknowledges it in a pool of threads.

    It does so even before the task has run, for the note that it has started.
    """

    def store_result(
        self, task_id: Any, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        def store() -> Any:
            return super(Backend, self).store_result(
                task_id, result, state, traceback=traceback, request=request, **kwargs
            )

        try:
            return self.persist(store, patience() if state in READY_STATES else 0)
        except ResponseError as error:
            if not refusal(error):
                raise
            logger.error("The result of %s (%s) is lost, Redis does not take it: %s", task_id, state, error)
            return result

    def on_chord_part_return(self, request: Any, state: str, result: Any, *args: Any, **kwargs: Any) -> Any:
        def count() -> Any:
            return super(Backend, self).on_chord_part_return(request, state, result, *args, **kwargs)

        return self.persist(count, patience())

    def persist(self, ask: Callable[[], Any], seconds: float) -> Any:
        """Ask for as long as Redis refuses for reasons that pass, at most for some seconds."""
        end = time.monotonic() + seconds
        while True:
            try:
                return ask()
            except ResponseError as error:
                code = refusal(error)
                if not code or time.monotonic() + PAUSE_SECONDS > end:
                    raise
                if code in ELSEWHERE:
                    # The next connection may lead to another server.
                    self.client.connection_pool.disconnect(inuse_connections=False)
            time.sleep(PAUSE_SECONDS)
