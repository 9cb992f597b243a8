"""An application whose tasks do what a log has to cope with."""

import logging
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import redis
from celery import Celery, Task
from celery.exceptions import WorkerShutdown
from celery.signals import task_received
from celery.utils.log import get_task_logger

app = Celery("trials")
task_log, library_log = get_task_logger(__name__), logging.getLogger("library")


@app.task
def say(message: str) -> str:
    task_log.info("%s", message)
    return f"said {message}"


@app.task(name="trials.grüßen")
def greet(name: str) -> str:
    return f"hello {name}"


@app.task
def tick(name: str) -> None:
    """Count in Redis that a task of this name ran."""
    address = Path(os.environ["CREDENTIALS_DIRECTORY"], "broker_url").read_text()
    with redis.Redis.from_url(address) as client:
        client.hincrby("ticks", name, 1)


@app.task
def warn(message: str) -> None:
    warnings.warn(message, stacklevel=1)
    library_log.warning("a library: %s", message)


@app.task
def fail(depth: int, text: str) -> None:
    """Raise from so many calls down, none like the other, so that Python does not fold them."""
    if depth:
        exec(compile(f"fail({depth - 1}, text)", f"{depth:0200}.py", "exec"), {"fail": fail, "text": text})
    raise ValueError(text)


@app.task(bind=True, max_retries=1)
def again(self: Any, text: str) -> float:
    if not self.request.retries:
        task_log.info("first published=%r", self.request.headers["published"])
        raise self.retry(countdown=0.2)
    published: float = self.request.headers["published"]
    return published


@app.task(reject_on_worker_lost=False)
def lose() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(default_retry_delay=0.1, max_retries=None)
def kill(runs: str, plan: list[str]) -> None:
    """Note the run in a file, and kill what the plan says for this one: the child, the worker, or nothing."""
    with Path(runs).open("a+") as file:
        file.write(f"{time.time()}\n")
        file.flush()
        file.seek(0)
        victim = plan[min(len(file.readlines()), len(plan)) - 1]
    if victim == "worker":
        os.kill(os.getppid(), signal.SIGKILL)
    if victim:
        os.kill(os.getpid(), signal.SIGKILL)


@app.task
def nap(seconds: float) -> str:
    time.sleep(seconds)
    return "rested"


@app.task
def leave(runs: str) -> None:
    """End the process that runs it, if that is only for tasks."""
    with Path(runs).open("a") as file:
        file.write("run\n")
    raise SystemExit(1)


@app.task
def answer(runs: str, seconds: float, how: str, size: int) -> str:
    """Note the run in a file, and after a while answer with a text of this size."""
    with Path(runs).open("a") as file:
        file.write(f"{answer.request.id}\n")
    time.sleep(seconds)
    text = "x" * size
    if how == "raise":
        raise ValueError(text)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "print":
        print(text, flush=True)
    return text


@app.task
def stay(runs: str, how: str) -> None:
    """Note the run in a file, and do not end."""
    with Path(runs).open("a") as file:
        file.write(f"{stay.request.id}\n")
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        try:
            if how == "prints":
                print("x" * 200_000, flush=True)
            time.sleep(0.1 if how == "prints" else 3600)
        except BaseException:
            if how == "stubborn":
                continue
            raise


@app.task
def exhaust(runs: str) -> int:
    """Ask for more memory than there is."""
    with Path(runs).open("a") as file:
        file.write("run\n")
    return len(bytearray(1 << 60))


class NeedsArguments(Exception):
    def __init__(self, name: str, *, code: int) -> None:
        super().__init__(name, code)


class NoRepr(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("this has no text")

    __str__ = __repr__


class NoPickle(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("this cannot be sent")


class NoUnpickle(Exception):
    """Can be read where it comes from, and not in the worker's main process."""

    def __reduce__(self) -> Any:
        return check_process, (os.getpid(),)


def check_process(process: int) -> Exception:
    if os.getpid() != process:
        raise RuntimeError("this cannot be read here")
    return NoUnpickle()


class Foreign(BaseException):
    pass


ODD: dict[str, Any] = {
    "needs-arguments": NeedsArguments("name", code=5),
    "no-repr": NoRepr(),
    "no-pickle": NoPickle(),
    "no-unpickle": NoUnpickle(),
    "foreign": Foreign("odd"),
    "attribute": ValueError(lambda: None),
    "local": type("Local", (Exception,), {})("odd"),
    "group": ExceptionGroup("several", [NoPickle(), NeedsArguments("name", code=5)]),
    "result": lambda: None,
    "result-no-repr": NoRepr(),
}


@app.task
def odd(kind: str) -> Any:
    """Raise or return what cannot be told."""
    if kind.startswith("result"):
        return ODD[kind]
    raise ODD[kind]


@app.task
def give_up(kind: str) -> None:
    """Raise what ends a process, with something that cannot be told."""
    raise {"exit": SystemExit, "interrupt": KeyboardInterrupt}[kind](lambda: None)


ENDS = [SystemExit, GeneratorExit, WorkerShutdown]


class Ending(Exception):
    """Does no harm where it is raised. Elsewhere it ends the process that reads it or shows it, or is what does."""

    def __init__(self, how: str, end: int) -> None:
        super().__init__("odd")
        self.how, self.end = how, end

    def __repr__(self) -> str:
        if self.how == "shown":
            raise ENDS[self.end]
        return "an Ending"

    __str__ = __repr__

    def __reduce__(self) -> Any:
        return arrive, (os.getpid(), self.how, self.end)


def arrive(process: int, how: str, end: int) -> BaseException:
    if os.getpid() != process:
        if how == "read":
            raise ENDS[end]
        if how == "becomes":
            return ENDS[end]()
    return Ending(how, end)


@app.task
def end(how: str, number: int) -> None:
    """Raise what ends processes, or an exception that does so later."""
    raise ENDS[number] if how == "raised" else Ending(how, number)


class Unreadable(Exception):
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("this has no attributes")


class NoClass(Exception):
    @property
    def __class__(self) -> Any:
        raise RuntimeError("this is nothing")


@app.task
def deny(kind: str) -> None:
    """Raise what cannot even be looked at."""
    raise {"no attributes": Unreadable, "no class": NoClass}[kind]


@app.task(time_limit=1)
def hang() -> None:
    time.sleep(60)


class Hooked(Task):
    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        raise {"exit": SystemExit, "value": ValueError}[args[0]]


@app.task(base=Hooked, time_limit=1)
def hang_hooked(kind: str) -> None:
    time.sleep(60)


@app.task
def errback(_request: Any, _error: Any, _traceback: Any) -> None:
    raise SystemExit(1)


@app.task
def stop_consumer() -> None:
    """The worker that receives this hangs in its main process, where it takes tasks."""


@task_received.connect
def block(request: Any, **_signal: Any) -> None:
    if request.name == stop_consumer.name:
        time.sleep(60)
