"""What a worker's main process reads of its children, also if it makes no sense there."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from celery import signals
from celery.concurrency import asynpool
from celery.utils.log import get_logger

from hothouse_celery.logs import said

logger = get_logger(__name__)

# Of 1,000: how much sooner the kernel ends a child than the main process, which counts what a child lost.
CHILDS_OOM_SCORE = 200


@signals.worker_process_init.connect(weak=False)
def offer_this_process(**_signal: Any) -> None:
    """When memory is short, let the kernel end this child before the main process."""
    own = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError):
        own.write_text(str(min(1000, int(own.read_text()) + CHILDS_OOM_SCORE)))


class ResultHandler(asynpool.ResultHandler):
    def _recv_message(self, add_reader: Callable[..., Any], fd: int, callback: Callable[..., Any]) -> Any:
        """Count what cannot be read as the loss of the process that sent it. Celery would end the worker for it."""

        def load(stream: IO[bytes]) -> Any:
            try:
                return pickle.load(stream)
            except BaseException as error:  # also what would end this process
                logger.error(
                    "What a task raised cannot be read outside of its process, which is ended: %s",
                    said(error),
                )
                with contextlib.suppress(LookupError, OSError):
                    os.kill(self.fileno_to_outq[fd].pid, signal.SIGKILL)
                return None

        return super()._recv_message(add_reader, fd, callback, load=load)


class Pool(asynpool.AsynPool):
    ResultHandler = ResultHandler
