"""Revokes that last: what was revoked does not run on workers that start later, whoever revoked it, and how."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from conftest import Redis, wait_until
from hosts import celery
from test_publishers import Run, account, deployment, done, redis_server, run, transport

__all__ = ("deployment", "redis_server", "run", "transport")

pytestmark = pytest.mark.parametrize("transport", ["hothouse"], indirect=True)
WORDS = ["worker", "--loglevel=INFO", "--without-gossip", "--without-mingle", "--concurrency=1"]


def words(name: str, queue: str, pool: str = "threads") -> list[str]:
    return [*WORDS, f"--hostname={name}", "--queues", queue, f"--pool={pool}"]


def publish(run: Run, tasks: dict[str, str]) -> dict[str, str]:
    """Publish tasks, name to what is done with its signature; ids by name."""
    lines = "\n".join(f"ids[{name!r}] = {code}" for name, code in tasks.items())
    return dict(
        done(
            run(
                f"import json, uuid\nfrom celery import group\nfrom canvas import add, app\nids = {{}}\n{lines}\nprint(json.dumps(ids))"
            )
        )
    )


def state(redis: Redis, task: str) -> str | None:
    text = redis.admin.get(f"r:celery-task-meta-{task}")
    return json.loads(text)["status"] if text else None


def settled(redis: Redis) -> bool:
    return not redis.admin.exists("q:trials", "q:unacked", "q:unacked_index")


# How each task is revoked by the application: code that finds its id in `ids`.
WAYS = {
    "id": "app.control.revoke(ids['id'])",
    "list": "app.control.revoke([ids['list']])",
    "terminate": "app.control.terminate(ids['terminate'])",
    "kill": "app.control.revoke(ids['kill'], terminate=True, signal='SIGKILL')",
    "result": "app.AsyncResult(ids['result']).revoke()",
    "group": "GroupResult('a-group', [app.AsyncResult(ids['group'])], app=app).revoke()",
    "with others": "app.control.revoke([uuid.UUID(int=1), ids['with others']])",
    "typed stamp": "app.control.revoke_by_stamped_headers({'order': [uuid.UUID(int=2), 'x']})",
    "stamp": "app.control.revoke_by_stamped_headers({'customer': ['x', 'y']})",
    "broadcast": "app.control.broadcast('revoke', arguments={'task_id': ids['broadcast']})",
}
FOREIGN = """
import sys
from celery import Celery
app = Celery(broker=sys.argv[1])
app.conf.broker_transport_options = {"global_keyprefix": "q:"}
app.control.revoke(sys.argv[2])
"""


@pytest.mark.parametrize("workers", ["one is there", "none is there"])
def test_what_was_revoked_does_not_run_on_a_worker_that_starts_later(
    run: Run, deployment: Redis, tmp_path: Path, workers: str
) -> None:
    account(deployment, "app", redis_app_may_control=True)
    tasks = {name: "add.delay(1).id" for name in (*WAYS, "good", "cli", "flower", "foreign")}
    tasks["stamp"] = "add.s(1).set(stamped_headers=['customer'], customer=['z', 'x']).delay().id"
    tasks["typed stamp"] = "add.s(1).set(stamped_headers=['order'], order=[uuid.UUID(int=2)]).delay().id"
    tasks["delayed"] = "add.apply_async((1,), countdown=3 * 24 * 3600).id"
    ids = publish(run, tasks)
    log = tmp_path / "early.log"

    def revoke() -> None:
        code = "; ".join(
            [
                "import json, uuid; from celery.result import GroupResult; from canvas import app",
                f"ids = {ids!r}",
                *WAYS.values(),
            ]
        )
        assert run(code + "; app.control.revoke(ids['delayed'])").stderr == ""
        whom = ["--timeout=20", "--destination=early@here"] if workers == "one is there" else ["--timeout=1"]
        cli = run("", sys.executable, "-m", "celery", "-A", "canvas", "control", *whom, "revoke", ids["cli"])
        assert cli.returncode == (0 if workers == "one is there" else 69), cli.stderr
        # As Flower does, which has the shim, but neither the application nor the right to more.
        (tmp_path / "flower").mkdir()
        (tmp_path / "flower/broker_url").write_text(account(deployment, "flower"))
        code = f"import hothouse_celery; hothouse_celery.app.control.revoke({ids['flower']!r})"
        options = json.loads((tmp_path / "run/celery.json").read_text())["broker_transport_options"]
        keys = {
            name: key.replace("app.", "flower.") for name, key in options.items() if "unacked" in str(key)
        }
        (tmp_path / "flower/celery.json").write_text(json.dumps({"broker_transport_options": options | keys}))
        flower = {
            "HOTHOUSE_APP": "",
            "CREDENTIALS_DIRECTORY": str(tmp_path / "flower"),
            "HOTHOUSE_SETTINGS": str(tmp_path / "flower/celery.json"),
        }
        assert run(code, **flower).returncode == 0
        if workers == "one is there":
            # A process of elsewhere, without the shim: the workers that hear of it note it.
            foreign = run(
                "", sys.executable, "-c", FOREIGN, deployment.admin_url, ids["foreign"], PYTHONPATH=""
            )
            assert foreign.returncode == 0, foreign.stderr

    if workers == "one is there":
        with celery(log, *words("early@here", "other")):
            wait_until(lambda: log.exists() and "ready" in log.read_text(), 60)
            revoke()
            wait_until(lambda: deployment.admin.zscore("q:revoked", json.dumps(ids["foreign"])), 60)
    else:
        revoke()
    good = {"good"} if workers == "one is there" else {"good", "foreign"}
    with celery(tmp_path / "late.log", *words("late@elsewhere", "trials")):
        wait_until(lambda: settled(deployment), 60)
    assert {name: state(deployment, task) for name, task in ids.items()} == {
        name: "SUCCESS" if name in good else "REVOKED" for name in ids
    }


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_did_not_hear_of_a_revoke_learns_of_it_when_it_connects_again(
    run: Run, deployment: Redis, tmp_path: Path, pool: str
) -> None:
    """And what Redis forgot in a failover is told to it again."""
    account(deployment, "app", redis_app_may_control=True)
    log = tmp_path / "worker.log"
    with celery(log, *words("here@here", "trials", pool)):
        wait_until(lambda: log.exists() and "ready" in log.read_text(), 60)
        assert run("from canvas import app; app.control.revoke('heard')").stderr == ""
        wait_until(lambda: "flagged as revoked" in log.read_text(), 60)
        deployment.admin.delete("q:revoked")
        deployment.admin.zadd("q:revoked", {'"missed"': time.time()})
        for client in deployment.admin.client_list():
            if client["user"] == "worker":
                deployment.admin.client_kill_filter(_id=client["id"])
        wait_until(lambda: deployment.admin.zcard("q:revoked") == 2, 60)
        ids = ["heard", "missed", "good"]
        publish(run, {name: f"add.apply_async((1,), task_id={name!r}).id" for name in ids})
        wait_until(lambda: settled(deployment), 60)
    assert [state(deployment, name) for name in ids] == ["REVOKED", "REVOKED", "SUCCESS"]


def test_notes_are_bounded_and_odd_ones_do_no_harm(run: Run, deployment: Redis, tmp_path: Path) -> None:
    account(deployment, "app", redis_app_may_control=True)
    ids = publish(run, {"good": "add.delay(1).id", "first": "add.delay(1).id", "last": "add.delay(1).id"})
    code = (
        f"from canvas import app; from hothouse_celery import revokes; revokes.MOST = 2\n"
        f"for name in ({ids['first']!r}, 'second', {ids['last']!r}): app.control.revoke(name)\n"
        "for odd in ({}, None, 5, [None, ''], {'a': 1}): print(revokes.revoked_by('revoke', {'task_id': odd}))\n"
        "print(revokes.revoked_by('revoke_by_stamped_headers', {'headers': ['a=b', 'c']}))"
    )
    assert run(code).stderr == ""
    assert deployment.admin.zrange("q:revoked", 0, -1) == ['"second"', json.dumps(ids["last"])]
    odd = [
        "",
        "{",
        "null",
        "[]",
        "[[]]",
        '["a"]',
        "[1, 2]",
        '["header", []]',
        "[" * 100_000,
        '"' + "x" * 100_000,
        "\udcff",
    ]
    deployment.admin.zadd("q:revoked", {member.encode(errors="surrogateescape"): 1 for member in odd})
    log = tmp_path / "worker.log"
    with celery(log, *words("late@elsewhere", "trials")):
        wait_until(lambda: settled(deployment), 60)
    assert [state(deployment, ids[name]) for name in ("good", "first", "last")] == [
        "SUCCESS",
        "SUCCESS",
        "REVOKED",
    ]
    # Something else of this name is told, and stops no worker.
    deployment.admin.delete("q:revoked")
    deployment.admin.lpush("q:revoked", "a message")
    ids = publish(run, {"good": "add.delay(1).id"})
    with celery(log, *words("later@elsewhere", "trials")):
        wait_until(lambda: settled(deployment), 60)
    assert state(deployment, ids["good"]) == "SUCCESS"
    assert "Revokes from before this worker started are not known to it: WRONGTYPE" in log.read_text()


READ = """
    import json, time
    from types import SimpleNamespace
    from celery.worker import state
    from kombu.asynchronous.timer import Timer
    from canvas import app
    from hothouse_celery import revokes

    revokes.SOON_SECONDS, revokes.READ_SECONDS = 0.1, 0.2
    consumer = SimpleNamespace(app=app, timer=Timer())
    step = revokes.Remember(consumer)
    step.start(consumer)
    told = [len(state.revoked)]
    for count in (1, 2, 3):
        app.control.revoke(f"task {count}")
        end = time.monotonic() + 20
        while len(state.revoked) < count and time.monotonic() < end:
            delay, entry = next(iter(consumer.timer))
            if entry:
                consumer.timer.apply_entry(entry)
        told.append(len(state.revoked))
    step.stop(consumer)
    print(json.dumps(told))
"""


def test_a_worker_that_stays_connected_reads_what_it_was_not_told(run: Run, deployment: Redis) -> None:
    account(deployment, "app", redis_app_may_control=True)
    assert done(run(READ)) == [0, 1, 2, 3]
