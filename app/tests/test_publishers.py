"""What a command of hothouse-run may do and finds, with the ACL of a deployment and Celery's own interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Redis, running_redis, wait_until
from hosts import SHIM, celery, set_up
from roles import rules

WORKER = [
    "worker",
    "--hostname=w@here",
    "--concurrency=2",
    "--loglevel=INFO",
    "--without-gossip",
    "--without-mingle",
]
UNACKED = {
    "unacked_key": "app.unacked",
    "unacked_index_key": "app.unacked_index",
    "unacked_mutex_key": "app.unacked_mutex",
    "deliveries_key": "app.unacked_deliveries",
}
Run = Callable[..., subprocess.CompletedProcess[str]]


def account(redis: Redis, user: str, **values: Any) -> str:
    """Make one of the users that roles/redis makes; its URL."""
    redis.admin.execute_command(
        "ACL", "SETUSER", user, "reset", "on", ">word", *rules(user, **values).split()
    )
    return f"redis://{user}:word@127.0.0.1:{redis.port}/0"


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """A server of their own: other tests know their users with other passwords."""
    with running_redis(tmp_path_factory.mktemp("accounts")) as server:
        yield server


def clear(redis: Redis) -> None:
    redis.admin.flushdb()
    redis.admin.acl_log_reset()


@pytest.fixture(params=["hothouse", "redis"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def deployment(
    redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> Iterator[Redis]:
    """The environment of a worker, and that of hothouse-run in the folder `run`. Fails if Redis refused anything."""
    clear(redis_server)
    settings = {
        "hothouse_transport": transport == "hothouse",
        "result_backend_transport_options": {"global_keyprefix": "r:"},
        "result_expires": 3600,
        "task_track_started": True,
        "broker_connection_retry_on_startup": True,
    }
    options = {"global_keyprefix": "q:", "socket_timeout": 5, "socket_connect_timeout": 3}
    run = tmp_path / "run"
    run.mkdir()
    set_up(monkeypatch, run, "", **settings, broker_transport_options=options | UNACKED)
    set_up(monkeypatch, tmp_path, "", **settings, broker_transport_options=options)
    for folder, user in ((run, "app"), (tmp_path, "worker")):
        url = account(redis_server, user)
        (folder / "broker_url").write_text(url)
        file = folder / "celery.json"
        file.write_text(
            json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "result_backend"})
        )
    monkeypatch.setenv("HOTHOUSE_APP", "canvas:app")
    yield redis_server
    assert redis_server.admin.acl_log() == []
    clear(redis_server)


@pytest.fixture
def run(deployment: Redis, tmp_path: Path) -> Run:
    """Run a command as hothouse-run does; Python that is given code unless other words are."""

    def run(code: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(words) or [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "CREDENTIALS_DIRECTORY": str(tmp_path / "run"),
                "HOTHOUSE_SETTINGS": str(tmp_path / "run/celery.json"),
                "PYTHONPATH": f"{SHIM}/hothouse_run:{os.environ['PYTHONPATH']}:{tmp_path}",
                **environment,
            },
        )

    return run


def done(process: subprocess.CompletedProcess[str]) -> Any:
    """What a command printed, as JSON."""
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


CANVAS = """
    import json
    from celery import chain, chord, group
    from celery.result import GroupResult
    from canvas import add, app, fail, grow, heard, inside, total

    def get(result): return result.get(timeout=60)
    told = {}
    told["group"] = get(group(add.s(i, 1) for i in range(4))())
    told["chain"] = get((add.s(1) | add.s(2) | add.s(3)).delay())
    told["chord"] = get(chord([add.s(i) for i in range(4)])(total.s()))
    told["group | task"] = get((group(add.s(1), add.s(2)) | total.s() | add.s(10)).delay())
    told["chord in chord"] = get(chord([chord([add.s(1), add.s(2)], total.s()), add.s(4)], total.s()).delay())
    told["group in chord"] = get(chord([group(add.s(1), add.s(2)), add.s(4)], total.s()).delay())
    told["chunks"] = get(add.chunks(zip(range(6), range(6)), 3)())
    told["starmap"] = get(add.starmap([(1, 2), (3, 4)]).delay())
    told["map"] = get(total.map([[1, 2], [3]]).delay())
    told["empty chord"] = get(chord([])(total.s()))
    told["replaced"] = get(grow.delay())
    told["error"] = repr(chord([add.s(1), fail.s()], total.s().on_error(heard.s())).delay().get(propagate=False, timeout=60))
    saved = group(add.s(i) for i in range(3))()
    saved.save()
    found = GroupResult.restore(saved.id, app=app)
    told["saved"] = [get(found), found.completed_count(), [result.id for result in found] == [result.id for result in saved]]
    found.delete()
    told["deleted"] = GroupResult.restore(saved.id, app=app)
    last = chain(add.s(1), group(add.s(2), add.s(3))).delay()
    get(last)
    told["parent"], told["children"] = get(last.parent), len(last.parent.children)
    told["iterdeps"] = len(list(last.parent.iterdeps()))
    told["collected"] = sorted(value for _, value in last.parent.collect() if isinstance(value, int))
    told["states"] = [last.children[0].state, last.children[0].date_done is not None]
    gone = last.parent
    gone.forget()
    told["forgotten"] = app.AsyncResult(gone.id).state
    saved_id, answers, *ids = get(inside.delay())
    told["inside"] = [get(GroupResult.restore(saved_id, app=app)), answers, *(get(app.AsyncResult(i)) for i in ids)]
    print(json.dumps(told))
"""


def test_all_of_the_canvas_is_there_for_commands_and_tasks(
    run: Run, deployment: Redis, tmp_path: Path
) -> None:
    with celery(tmp_path / "worker.log", *WORKER):
        told = done(run(CANVAS))
    assert told == {
        "group": [1, 2, 3, 4],
        "chain": 6,
        "chord": 6,
        "group | task": 13,
        "chord in chord": 7,
        "group in chord": 7,
        "chunks": [[0, 2, 4], [6, 8, 10]],
        "starmap": [3, 7],
        "map": [3, 3],
        "empty chord": 0,
        "replaced": 11,
        "error": told["error"],
        "saved": [[0, 1, 2], 3, True],
        "deleted": None,
        "parent": 1,
        "children": 1,
        "iterdeps": 4,
        "collected": [1, 3, 4],
        "states": ["SUCCESS", True],
        "forgotten": "PENDING",
        "inside": [[0, 1, 2], "1", 6, 7, 6],
    }
    assert "as it should" in told["error"]


CONTROL = """
    import json
    from canvas import add, app
    waiting = add.apply_async((1,), countdown=600)
    asked = app.control.inspect(timeout=20, limit=1)
    print(json.dumps([
        len(app.control.ping(timeout=20, limit=1)), len(asked.stats()), len(asked.active()), len(asked.registered()),
        list(app.control.rate_limit("canvas.add", "100/s", reply=True, timeout=20, limit=1)[0].values()),
        list(app.control.revoke(waiting.id, reply=True, timeout=20, limit=1)[0].values())[0].keys() >= {"ok"},
        app.control.add_consumer("trials", reply=True, timeout=20, limit=1) is not None,
    ]))
"""


def test_a_command_controls_workers_if_it_may(run: Run, deployment: Redis, tmp_path: Path) -> None:
    account(deployment, "app", redis_app_may_control=True)
    log = tmp_path / "worker.log"
    with celery(log, *WORKER):
        wait_until(lambda: log.exists() and "ready" in log.read_text(), 60)
        told = done(run(CONTROL))
        words = ["inspect", "--timeout=20", "--destination=w@here", "ping"]
        asked = run("", sys.executable, "-m", "celery", "-A", "canvas", *words)
    assert told == [1, 1, 1, 1, [{"ok": "new rate limit set successfully"}], True, True]
    assert asked.returncode == 0 and "pong" in asked.stdout, asked.stderr


REFUSED = """
    import json
    from canvas import app
    told = []
    for ask in (
        lambda: app.control.ping(timeout=1),
        lambda: app.control.revoke("an-id"),
        lambda: app.control.inspect(timeout=1).active(),
        lambda: app.AsyncResult("an-id").revoke(terminate=True),
        lambda: app.control.shutdown(),
    ):
        try:
            ask()
        except Exception as error:
            told.append([type(error).__name__, "set app_may_control: true in the inventory" in str(error)])
    print(json.dumps(told))
"""


def test_a_command_that_may_not_control_is_told_which_variable_allows_it(run: Run, deployment: Redis) -> None:
    assert done(run(REFUSED)) == [["NotAllowed", True]] * 5
    assert not deployment.admin.exists("q:revoked")
    deployment.admin.acl_log_reset()


# What asks for a broker, and prints its user and whether the deployment's other settings are there.
TELL = "; import json; print(json.dumps([app.connection_for_write().userid, app.conf.task_acks_late]))"
OURS, NOT_OURS = ["app", True], [None, False]


@pytest.mark.parametrize("transport", ["hothouse"], indirect=True)
@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("from canvas import app", OURS),
        ("import canvas; app = canvas.app; app.conf.task_acks_late = False", OURS),
        ("from hothouse_celery import app", OURS),
        ("import canvas; from hothouse_celery import app", OURS),
        ("from celery import current_app as app", OURS),
        ("from celery import Celery; app = Celery()", OURS),
        ("from celery import Celery; app = Celery('x', broker='redis://elsewhere')", NOT_OURS),
        ("from celery import Celery; import canvas; app = Celery(broker='redis://elsewhere')", NOT_OURS),
        ("import canvas; from celery import Celery; Celery(broker='redis://elsewhere'); app = canvas.app", OURS),
        ("from factory import create; app = create()", OURS),
        ("from factory import create; app = create(early=True)", OURS),
        ("from lazy import app", OURS),
        ("from proj import celery_app as app", OURS),
        ("import proj.celery; from proj.celery import app", OURS),
        ("import importlib, canvas; app = importlib.reload(canvas).app", OURS),
    ],
)  # fmt: skip
def test_whatever_imports_celery_has_the_settings_of_the_deployment(
    run: Run, tmp_path: Path, code: str, told: list[Any]
) -> None:
    (tmp_path / "factory.py").write_text(
        "from celery import Celery\n"
        "def create(early=False):\n"
        "    app = Celery('f')\n"
        "    app.config_from_object({'broker_url': 'redis://elsewhere'})\n"
        "    if early: app.conf.broker_url\n"
        "    app.set_default()\n"
        "    return app\n"
    )
    # One whose settings are read while its own module is, and changed afterwards.
    (tmp_path / "lazy.py").write_text(
        "from hothouse_celery import credential\n"
        "from celery import Celery\n"
        "app = Celery('lazy', broker='redis://elsewhere')\n"
        "app.conf.timezone\n"
        "app.conf.broker_url = 'redis://elsewhere'\n"
    )
    project = tmp_path / "proj"
    project.mkdir()
    (project / "__init__.py").write_text("from .celery import app as celery_app\n")
    (project / "settings.py").write_text(
        "CELERY_BROKER_URL = 'redis://elsewhere'\nCELERY_TASK_ACKS_LATE = False\n"
    )
    (project / "celery.py").write_text(
        "from celery import Celery\napp = Celery('proj')\n"
        "app.config_from_object('proj.settings', namespace='CELERY')\napp.autodiscover_tasks(['proj'])\n"
    )
    target = next((name for name in ("lazy", "proj.celery") if name.split(".")[0] in code), "canvas")
    assert done(run(code + TELL, HOTHOUSE_APP=f"{target}:app")) == told


@pytest.mark.parametrize("transport", ["hothouse"], indirect=True)
def test_a_command_that_knows_nothing_of_celery_loads_nothing_of_it(run: Run, tmp_path: Path) -> None:
    told = done(
        run("import json, sys; print(json.dumps([n for n in sys.modules if 'celery' in n or 'kombu' in n]))")
    )
    assert told == []
    # Nor is what Python would have loaded at its start missing, and errors are the module's own.
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("import sys; sys.seen = __file__")
    path = f"{SHIM}/hothouse_run:{other}"
    code = "import json, sys, sitecustomize; print(json.dumps([sys.seen, sitecustomize.__file__]))"
    assert done(run(code, PYTHONPATH=path)) == [str(other / "sitecustomize.py")] * 2
    for text, error in (
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("1/0", "ZeroDivisionError: division by zero"),
    ):
        (tmp_path / "broken.py").write_text(text)
        failed = run("import broken", HOTHOUSE_APP="broken:app")
        assert failed.stderr.splitlines()[-1] == error
        assert failed.stderr.count("Traceback") == 1
    (tmp_path / "broken.py").write_text("")
    assert run("import broken", HOTHOUSE_APP="broken:app").returncode == 0
