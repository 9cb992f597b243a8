"""The Celery application that every process of Hothouse runs: the user's own, with the deployment's settings on top.

Units and `hothouse-run` start `celery --app hothouse_celery …`. The environment names what is loaded:

HOTHOUSE_APP           the user's application, `package.module:app`; without it (Flower) an empty one
HOTHOUSE_SETTINGS      a JSON file of Celery settings, /etc/hothouse/celery.json unless told
CREDENTIALS_DIRECTORY  set by systemd; its file `broker_url` is the connection to Redis

roles/prepare puts this package into /opt/hothouse/lib. `python -m hothouse_celery` are the commands of the deployment.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import hothouse_transport
from celery import Celery, Task, signals
from celery._state import get_current_task
from celery.utils.imports import symbol_by_name

from hothouse_celery import logs

__all__ = ("adopt", "app", "configure", "credential", "load", "logs", "notify_systemd")

#: Loaded when it is first asked for, so that its own module may import this package.
app: Celery

PING_TASK = "hothouse.ping"
# Settings that an application may add to and the deployment completes; all others it replaces.
MERGED = ("broker_transport_options", "result_backend_transport_options")
# The setting of the deployment that asks for its own transport instead of kombu's.
TRANSPORT = "hothouse_transport"


def credential(name: str) -> str:
    """The text of one credential of this unit; KeyError and OSError name what is missing."""
    return (Path(os.environ["CREDENTIALS_DIRECTORY"]) / name).read_text().strip()


def configure(app: Celery) -> Celery:
    """Put the deployment's settings and the connection to Redis on top of the application's own."""
    settings: dict[str, Any] = json.loads(
        Path(os.environ.get("HOTHOUSE_SETTINGS", "/etc/hothouse/celery.json")).read_text()
    )
    for name in MERGED:
        settings[name] = {**(app.conf.get(name) or {}), **settings.get(name, {})}
    url = broker = credential("broker_url")
    wanted = settings.pop(TRANSPORT, False)
    settings.setdefault("result_backend", url)
    if "redbeat_key_prefix" in settings:
        settings["redbeat_redis_url"] = url
    app.conf.update(settings)
    if wanted:
        if reason := missing_transport(app, settings["broker_transport_options"]):
            signals.after_setup_logger.connect(warn_of(reason), weak=False)
        else:
            broker = hothouse_transport.url(url)
    app.conf.update(broker_url=broker, broker_read_url=broker, broker_write_url=broker)
    return app


def missing_transport(app: Celery, options: dict[str, Any]) -> str | None:
    """Make the transport known to kombu; the reason if it cannot be had here."""
    for name in ("task_queue_max_priority", "task_default_priority"):
        if app.conf.get(name) is not None:
            return f"the application uses priorities ({name})"
    return hothouse_transport.install(options)


def warn_of(reason: str) -> Any:
    """A receiver that writes into the log, once it is set up, why kombu's own transport is used."""

    def warn(**_signal: Any) -> None:
        logging.getLogger(__name__).warning(
            "Tasks are taken from Redis by kombu's own transport, which can lose the one that a killed worker was just "
            "taking: %s",
            reason,
        )

    return warn


def ping() -> str:
    """Answer with the host that ran it; sent to every queue at the end of a deployment."""
    return socket.gethostname()


def adopt(app: Celery) -> Celery:
    """Make an application the deployment's: its settings, and what this package does otherwise than Celery."""
    from hothouse_celery import revokes

    configure(app)
    app.conf.worker_consumer = "hothouse_celery.worker:Consumer"
    Task.Request = "hothouse_celery.worker:Request"
    app.loader.override_backends = {
        **app.loader.override_backends,
        "redis": "hothouse_celery.results:Backend",
    }
    revokes.make_lasting(app)
    return app


def load() -> Celery:
    """The application named by HOTHOUSE_APP, configured, with the ping task added."""
    target = os.environ.get("HOTHOUSE_APP")
    app = adopt(symbol_by_name(target) if target else Celery("hothouse"))
    if target:
        app.task(name=PING_TASK, ignore_result=False, acks_late=False)(ping)
    return app


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return globals().setdefault(name, load())
    except AttributeError as error:
        # Celery would take it for a module without an application, and look for one elsewhere.
        raise ImportError(f"cannot load {os.environ.get('HOTHOUSE_APP')}: {error}") from error


def notify_systemd(state: str, **_signal: Any) -> None:
    """Tell systemd the state of this service (sd_notify(3)); nothing when it was not started by systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


@signals.worker_ready.connect(weak=False)
def worker_ready(sender: Any, **_signal: Any) -> None:
    from hothouse_celery.worker import watch

    notify_systemd("READY=1")
    watch(sender.controller)


@signals.beat_init.connect(weak=False)
def beat_init(**_signal: Any) -> None:
    notify_systemd("READY=1")


@signals.before_task_publish.connect(weak=False)
def stamp(headers: dict[str, Any], **_signal: Any) -> None:
    """Write the time of publishing (Unix, seconds) into the message, so that the age of a queue can be told from it.

    A retry is a new message. One that a lost worker gives back is the old one, and as old as it was.
    """
    headers["published"] = round(time.time(), 3)
    # A task that comes so far as to ask for a retry does not kill its process each time.
    if get_current_task():
        headers.pop("losses", None)
