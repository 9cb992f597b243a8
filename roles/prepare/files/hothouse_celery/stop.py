"""A worker's stop: running tasks get the soft shutdown time, the rest goes back to its queue, and the process ends.

Celery sleeps through that time in the handler of the signal. Its loop stands still, no one reads what tasks answer,
and afterwards Celery waits without end for an answer that was cut off in the middle. Here the loop goes on, so tasks
that finish are acknowledged, and what then still runs is ended and not waited for. A thread keeps the time. It needs
neither the loop nor the log, which may hang.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from billiard.common import REMAP_SIGTERM
from celery import signals
from celery.concurrency import prefork, solo
from celery.concurrency import thread as threads
from celery.exceptions import WorkerTerminate
from celery.platforms import EX_FAILURE, EX_OK
from celery.utils.log import get_logger
from celery.worker import state
from kombu.common import ignore_errors

from hothouse_celery import notify_systemd

logger = get_logger(__name__)

# After the soft shutdown time, in seconds: for children to end by themselves; for the whole worker to do so; and for
# handing back what it holds in spite of that. The last two together are less than 15.
CHILDREN_SECONDS, WORKER_SECONDS, LAST_SECONDS = 3, 10, 3
# How often to look whether tasks still run, in seconds.
LOOK_SECONDS = 0.1

# Set once the worker of this process stops.
begun = threading.Event()


class Stop(threading.Thread):
    """Waits until this worker is to stop, and sees to it that it does."""

    def __init__(self, worker: Any) -> None:
        super().__init__(name="stop", daemon=True)
        self.worker = worker
        self.seconds = worker.app.conf.get("worker_soft_shutdown_timeout") or 0
        # Unlike an Event this may be used in the handler of a signal.
        self._asked: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._in_task = self._overdue = self._handed_back = False
        self._channels: list[Any] = []
        self._children: list[Any] = []

    def install(self) -> None:
        """Take the signals over from Celery, in the main thread; and stop in bounded time for whatever reason."""
        for name in {"SIGQUIT", "SIGTERM"} if REMAP_SIGTERM == "SIGQUIT" else {"SIGQUIT"}:
            signal.signal(getattr(signal, name), self.ask)
        stop, terminate = self.worker.stop, self.worker.terminate

        def warm(*args: Any, **kwargs: Any) -> Any:
            self._asked.put(None)
            return stop(*args, **kwargs)

        def cold(*args: Any, **kwargs: Any) -> Any:
            self._asked.put(None)
            self.end_pool()
            return terminate(*args, **kwargs)

        self.worker.stop, self.worker.terminate = warm, cold
        self.start()

    def ask(self, *_signal: Any) -> None:
        """The handler of the signals. A second one ends the soft shutdown time."""
        self._asked.put(None)
        if self._overdue and self._in_task:
            self._in_task = False
            raise WorkerTerminate(EX_OK)

    @contextlib.contextmanager
    def in_task(self) -> Iterator[None]:
        """A task runs in the main thread, where only a signal reaches it."""
        self._in_task = isinstance(self.worker.pool, solo.TaskPool)
        try:
            yield
        finally:
            self._in_task = False

    def run(self) -> None:
        self._asked.get()
        begun.set()
        notify_systemd("STOPPING=1")
        self._tell_loop(self._take_no_more)
        end = time.monotonic() + self.seconds
        while self.running() and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._asked.get(timeout=min(LOOK_SECONDS, left))
                break
        end = time.monotonic() + WORKER_SECONDS
        self._remember()
        self._overdue = True
        state.should_terminate = EX_OK
        self._tell_loop(lambda: None)
        main = threading.main_thread().ident
        if self._in_task and main:
            signal.pthread_kill(main, signal.SIGQUIT)
        if self.worker.blueprint.shutdown_complete.wait(WORKER_SECONDS):
            if isinstance(self.worker.pool, threads.TaskPool) and self.running():
                os._exit(self.worker.exitcode or EX_OK)  # Python would wait for the threads
            time.sleep(max(0, end - time.monotonic()))  # for what the application does at its exit
        last = threading.Thread(target=self._hand_back, daemon=True)
        last.start()
        last.join(LAST_SECONDS)
        os._exit(self.worker.exitcode or (EX_OK if self._handed_back else EX_FAILURE))

    def running(self) -> bool:
        """Whether a task runs. The pool `prefork` has some of which it does not know yet that they have begun."""
        if isinstance(self.worker.pool, prefork.TaskPool):
            return bool(getattr(self.worker.pool._pool, "_cache", None))
        return bool(state.active_requests)

    def _tell_loop(self, callback: Callable[[], Any]) -> None:
        if self.worker.hub:
            self.worker.hub.call_soon(callback)

    def _take_no_more(self) -> None:
        logger.info("Stopping; tasks that run may go on for %g s", self.seconds)
        how = {"sig": "SIGTERM", "how": "Cold", "exitcode": EX_OK}
        signals.worker_shutting_down.send(sender=self.worker.hostname, **how)
        consumer = self.worker.consumer
        if consumer.task_consumer:
            ignore_errors(consumer, consumer.task_consumer.cancel)

    def _remember(self) -> None:
        """What Celery forgets before it is done with it."""
        transport = getattr(self.worker.consumer.connection, "transport", None)
        self._channels = list(getattr(transport, "channels", None) or [])
        self._children = list(getattr(getattr(self.worker.pool, "_pool", None), "_pool", None) or [])

    def end_pool(self) -> None:
        """End what runs in the pool, before Celery would wait for it."""
        pool = self.worker.pool
        if isinstance(pool, threads.TaskPool):
            pool.executor.shutdown(wait=False, cancel_futures=True)
        if not isinstance(pool, prefork.TaskPool) or not pool._pool:
            return
        try:
            pool._pool._join_exited_workers()  # a process that died by itself a moment ago counts
        except Exception:
            logger.exception("Could not look for processes that died by themselves")
        self.worker.consumer.cancel_active_requests()
        children = list(pool._pool._pool)
        pool._pool._terminate.cancel()
        pool._pool = pool.flush = None
        end = time.monotonic() + CHILDREN_SECONDS
        for child in children:
            # A second signal would not let it clean up.
            if not getattr(child, "_controlled_termination", False):
                child.terminate()
        for child in children:
            child.join(max(0, end - time.monotonic()))
        kill(children)

    def _hand_back(self) -> None:
        """This worker does not end. Give back what it holds, at once and not only after the visibility timeout."""
        kill(self._children)
        for channel in self._channels:
            for tag in list(channel.qos._delivered):
                channel.qos.restore_by_tag(tag)
            if hasattr(channel, "hand_back_unseen"):
                channel.hand_back_unseen()
        self._handed_back = True
        logger.critical("The worker did not end by itself; what it held was handed back")


def kill(children: list[Any]) -> None:
    """End processes that may take no notice of anything else."""
    for child in children:
        if child.exitcode is None:
            with contextlib.suppress(OSError):
                os.kill(child.pid, signal.SIGKILL)
