"""What a worker does beyond Celery's: it tells systemd that it is not deaf, puts aside what kills its processes, and
ends in bounded time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import hothouse_transport
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.app.trace import TraceInfo
from celery.bootsteps import RUN
from celery.concurrency import prefork, solo
from celery.exceptions import TaskRevokedError, WorkerLostError, WorkerTerminate
from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.state import task_ready
from hothouse_transport.messages import losses_of
from kombu.exceptions import OperationalError
from redis import Redis, RedisError

from hothouse_celery import credential, dead, messages, notify_systemd, pool, stop
from hothouse_celery.logs import said

logger = get_logger(__name__)


class PoisonTask(Exception):
    """A task whose processes died each time it was run; it is not run again."""


def answering(target: Callable[..., Any]) -> Callable[..., Any]:
    """What a pool without processes runs: it always answers, or the message would be held for ever.

    Celery's own raises what goes wrong around a task, such as a result that cannot be stored, where nobody hears it.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return target(*args, **kwargs)
        except BaseException as error:
            kind = type(error)  # what it says of itself may raise as well
            if issubclass(kind, WorkerTerminate) and stop.begun.is_set():
                raise  # the stop ends the task
            if issubclass(kind, SystemExit | KeyboardInterrupt | MemoryError):
                # What would end the process of a pool that has some.
                return 1, lost_process(error), 0.0
            logger.error("What surrounds a task failed: %s", said(error))
            return 1, raised(error), 0.0

    return run


def handle_error_state(self: TraceInfo, task: Any, request: Any, eager: bool = False, **kwargs: Any) -> Any:
    """End the process for a task that ran out of memory, as if the kernel had done it: another run may have more.

    Celery takes it for the task's failure, and then ends the whole worker for it.
    """
    if isinstance(self.retval, MemoryError) and not eager:
        logger.error("Out of memory: %r", self.retval, exc_info=True)
        raise SystemExit(repr(self.retval))
    return handle(self, task, request, eager=eager, **kwargs)


prefork.TaskPool.Pool = pool.Pool
handle, TraceInfo.handle_error_state = TraceInfo.handle_error_state, handle_error_state


def raised(error: BaseException) -> ExceptionInfo:
    """The exception that is handled now, or its text if it cannot be told."""
    try:
        return ExceptionInfo()
    except BaseException:
        return told(RuntimeError(said(error)))


def told(error: BaseException) -> ExceptionInfo:
    """An exception instead of the one that is handled now."""
    try:
        raise error from None
    except BaseException:
        return ExceptionInfo()


def lost_process(error: BaseException) -> ExceptionInfo:
    """What a task's process has died of."""
    return told(WorkerLostError(said(error)))


class Consumer(messages.Consumer):
    """Tries to reach Redis again at least every two seconds, where Celery's would wait for up to 30."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stopping = stop.Stop(self.controller)
        apply = self.pool.apply_async

        def apply_async(target: Callable[..., Any], *rest: Any, **options: Any) -> Any:
            if stop.begun.is_set():  # it goes back with what else this worker holds
                raise TaskRevokedError()
            if not isinstance(self.pool, prefork.TaskPool):
                target = answering(self.stopping.in_task()(target))
            request = getattr(options.get("callback"), "__self__", None)
            if isinstance(request, Request):  # and not of a class of the application's own
                options["callback"] = request.on_answer
            return apply(target, *rest, **options)

        self.pool.apply_async = apply_async

    def start(self) -> None:
        if not self.stopping.is_alive():
            self.stopping.install()
        super().start()

    def ensure_connected(self, conn: Any) -> Any:
        ensure = conn.ensure_connection

        def persist(errback: Any, *arguments: Any, **options: Any) -> Any:
            def tell(error: Exception, interval: float) -> None:
                hothouse_transport.health.touch()
                errback(error, interval)

            hothouse_transport.health.touch()
            options = {"interval_start": 0.5, "interval_step": 0.5, "interval_max": 1, **options}
            return ensure(tell, *arguments, **options)

        conn.ensure_connection = persist
        return super().ensure_connected(conn)

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        if self.conninfo.transport_cls.startswith("redis"):
            # Nobody else watches kombu's own transport: this tells a loop that hangs, not a connection that is dead.
            hub.on_tick.add(hothouse_transport.health.touch)


class Request(messages.Request):
    """Counts how often a task lost its process. After the last time its message becomes a dead letter.

    Losses of a whole worker count as well: hothouse_transport notes them. Those of a pool's child are written into the
    header `losses` of the message that Celery sends for the next try.
    """

    def send_event(self, type: str, **fields: Any) -> None:
        """With the task's name each time, for who did not hear of its beginning."""
        super().send_event(type, **{"name": self.name, **fields})

    def on_answer(self, answer: tuple[Any, Any, float], **kwargs: Any) -> None:
        """Celery's on_success(), which would raise here what ends a process."""
        failed, value, _ = answer
        if failed:
            self.on_failure(value, return_ok=True)
        else:
            with self.answered():
                self.on_success(answer, **kwargs)

    def on_timeout(self, soft: bool, timeout: float) -> Any:
        with self.answered():
            return super().on_timeout(soft, timeout)

    @contextlib.contextmanager
    def answered(self, lost: bool = False) -> Iterator[None]:
        """Whatever goes wrong after a task, as in a hook or an errback, ends no worker, and its message is settled.

        The message of a task that lost its process comes back instead, after the visibility timeout.
        """
        try:
            yield
        except BaseException as error:
            logger.error("What follows %s[%s] failed: %s", self.name, self.id, said(error), exc_info=True)
            if not self.task.acks_late or self.acknowledged:
                pass
            elif lost:
                self.let_go()
            else:
                self.acknowledge()

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        if isinstance(plain(exc_info.exception), MemoryError):  # Celery would raise it again here
            exc_info = lost_process(plain(exc_info.exception))
        lost = self.again() and self.lost(exc_info.exception)
        if lost:
            try:
                exc_info = self.count(exc_info)
            except (RedisError, OperationalError) as error:
                # Redis is away. The message stays with it, and hothouse_transport counts this run as it gives it back,
                # which it does only when nobody says any more that this worker holds it.
                logger.error("Could not note that %s[%s] lost its process: %r", self.name, self.id, error)
                task_ready(self)
                self.let_go()
                return None
        with self.answered(lost):
            return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def let_go(self) -> None:
        """Renew the hold on the message no longer. kombu's own transport never does."""
        qos = self._message.channel.qos
        if hasattr(qos, "let_go"):
            with qos.let_go(self._message.delivery_tag):
                pass

    def again(self) -> bool:
        """Whether Celery would run the task again."""
        return self.task.retry_on_worker_lost or (self.task.acks_late and self.task.reject_on_worker_lost)

    def lost(self, error: Any) -> bool:
        """Whether the task lost its process, and not because the worker ended it, or after it had succeeded."""
        error = plain(error)
        if isinstance(error, SystemExit | KeyboardInterrupt):
            return not (self._already_cancelled or self._already_revoked)
        return isinstance(error, WorkerLostError) and not self._success_was_stored()

    def count(self, exc_info: Any) -> Any:
        """Note one more loss; after the last one put the message aside and return what became of the task."""
        # The default and the meaning of 0 are those of hothouse_transport.
        most = self.app.conf.broker_transport_options.get("max_deliveries", 4) or float("inf")
        limit, retries = self.task.max_retries, self._context.retries
        earlier = self._context.headers or {}
        with dead.client(self.app) as redis:
            key, tag = dead.key(self.app, "deliveries"), self._message.delivery_tag
            runs = 1 + losses_of(earlier) + int(redis.hget(key, tag) or 0)
            if not self.task.retry_on_worker_lost:
                redis.hincrby(key, tag, 1)  # the same message comes again
            elif limit is not None and retries >= limit:
                most = runs
        if runs < most:
            self._context.headers = {**earlier, "losses": runs}
            return exc_info
        reason = f"its process died in each of {runs} runs: {said(plain(exc_info.exception))}"
        dead.bury(self.app, self._message, reason, runs)
        return told(PoisonTask(reason))


def plain(error: Any) -> Any:
    """An exception as it was raised, not as a pool sends it."""
    return error.exc if isinstance(error, ExceptionWithTraceback) else error


def watch(worker: Any) -> None:
    """Let systemd's watchdog see whether this worker takes tasks, if its unit asks for that (WatchdogSec=)."""
    if "WATCHDOG_USEC" in os.environ:
        seconds = int(os.environ["WATCHDOG_USEC"]) / 1e6
        threading.Thread(target=keep_watch, args=(worker, seconds), name="watchdog", daemon=True).start()


def keep_watch(worker: Any, seconds: float) -> None:
    """Tell systemd every few seconds that the worker is alive: that it is not deaf, or that Redis is away.

    Only a worker that takes nothing although Redis answers to others would gain by a restart. Deaf is who has been so
    for half of the watchdog's time, `seconds`; after another third of it systemd is told to restart the worker at once.
    A process that hangs as a whole tells nothing. One that is busy with a task instead of its loop is not deaf.
    """
    deaf_since = None
    while worker.blueprint.state == RUN and not stop.begun.is_set():
        reason = None if runs_inline(worker) else hothouse_transport.health.stale(seconds / 2)
        if not reason or not redis_answers():
            deaf_since = None
            notify_systemd("WATCHDOG=1")
        elif deaf_since is None:
            deaf_since = time.monotonic()
            logger.warning("This worker takes no tasks: %s", reason)
        elif time.monotonic() - deaf_since > seconds / 3:
            logger.critical("This worker takes no tasks and has to be restarted: %s", reason)
            notify_systemd("WATCHDOG=trigger")
        stop.begun.wait(seconds / 10)
    # From here on the unit's TimeoutStopSec= counts, and no longer the watchdog.
    notify_systemd("STOPPING=1")


def runs_inline(worker: Any) -> bool:
    """Whether a task runs now in the thread that consumes, which the loop waits for: only the pool `solo` does that."""
    return isinstance(worker.pool, solo.TaskPool) and bool(state.active_requests)


def redis_answers() -> bool:
    """Whether a new connection to Redis works."""
    try:
        with Redis.from_url(credential("broker_url"), socket_timeout=3, socket_connect_timeout=3) as redis:
            return bool(redis.ping())
    except RedisError:
        return False
