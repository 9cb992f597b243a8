"""What the deployment adds to workers: what kills them is put aside, and one that is deaf is restarted."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import Redis, wait_until
from hosts import celery, python, send, set_up
from proxy import Proxy

RUNS = 4
KEYS = [
    "q:trials",
    "q:dead-letter",
    "q:unacked",
    "q:unacked_index",
    "q:deliveries",
    "q:broken",
    "q:unknown-task",
    "q:unknown-task.names",
]


@pytest.fixture
def shim(redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """The environment of a unit that runs tasks again as a deployment does, with empty queues."""
    options = {
        "global_keyprefix": "q:",
        "visibility_timeout": 6,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        "socket_timeout": 5,
        "socket_connect_timeout": 3,
    }
    set_up(
        monkeypatch,
        tmp_path,
        redis_server.admin_url,
        hothouse_transport=True,
        task_reject_on_worker_lost=True,
        broker_connection_retry_on_startup=True,
        broker_transport_options=options,
    )
    redis_server.admin.delete(*KEYS)
    yield redis_server
    redis_server.admin.delete(*KEYS)


@pytest.fixture
def run(shim: Redis, tmp_path: Path) -> Callable[..., int]:
    """Run a task that kills by a plan, restarting the worker as systemd does, until then; its runs."""

    def run(plan: list[str], until: Callable[[], Any]) -> int:
        runs, log = tmp_path / "runs", tmp_path / "worker.log"
        runs.touch()
        if not shim.admin.llen("q:trials"):
            send(("kill", [str(runs), plan]))
        words = ["worker", "--concurrency=1", "--loglevel=INFO", "--without-gossip", "--without-mingle"]

        def ended() -> bool:
            with celery(log, *words) as process:
                wait_until(lambda: until() or process.poll() is not None, 40)
                return bool(until())

        wait_until(ended, 120)
        return len(runs.read_text().splitlines())

    return run


def set_settings(folder: Path, **settings: Any) -> None:
    """Change the settings of the unit."""
    file = folder / "celery.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("again", "plan"),
    [
        ("reject", ["child"]),
        ("reject", ["worker"]),
        ("reject", ["child", "worker", "child", "worker"]),
        ("reject", ["worker", "worker", "child"]),
        ("retry", ["child"]),
        ("retry", ["child", "worker", "child", "worker"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_kills_runs_four_times_and_is_then_put_aside(
    shim: Redis, run: Callable[..., int], tmp_path: Path, plan: list[str], again: str
) -> None:
    """Also where an application asks Celery for a retry instead, which is a message of its own."""
    set_settings(
        tmp_path, task_reject_on_worker_lost=again == "reject", task_retry_on_worker_lost=again == "retry"
    )
    assert run(plan, lambda: shim.admin.llen("q:dead-letter")) == RUNS
    [letter] = (json.loads(entry) for entry in shim.admin.lrange("q:dead-letter", 0, -1))
    assert (letter["task"], letter["queue"], letter["deliveries"]) == ("trials.kill", "trials", RUNS)
    wait_until(lambda: not shim.admin.exists("q:trials", "q:unacked", "q:unacked_index", "q:deliveries"))


def test_a_task_that_recovers_is_not_put_aside(shim: Redis, run: Callable[..., int], tmp_path: Path) -> None:
    log = tmp_path / "worker.log"

    def settled() -> bool:
        return "event=succeeded" in log.read_text() and not shim.admin.exists("q:deliveries")

    assert run(["child", "child", "child", ""], settled) == RUNS
    assert not shim.admin.exists("q:dead-letter")


def test_a_task_whose_process_was_killed_runs_again_within_seconds(
    shim: Redis, run: Callable[..., int], tmp_path: Path
) -> None:
    """Celery waits up to ten for a result that may be on its way; its own retry would come three minutes later."""
    log = tmp_path / "worker.log"
    assert run(["child", ""], lambda: "event=succeeded" in log.read_text()) == 2
    first, second = map(float, (tmp_path / "runs").read_text().split())
    assert second - first < 20


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_redis_that_is_full_costs_no_task_and_no_result(shim: Redis, tmp_path: Path, pool: str) -> None:
    set_settings(tmp_path, result_backend=shim.admin_url, task_track_started=True)
    log = tmp_path / "worker.log"
    with celery(log, *words(pool)) as process:
        wait_until(lambda: log.exists() and "ready" in log.read_text())
        # It takes them when Redis is full already.
        process.send_signal(signal.SIGSTOP)
        ids = send(*[("nap", [0.5])] * 6)
        shim.admin.config_set("maxmemory", 1)
        try:
            process.send_signal(signal.SIGCONT)
            refused = "(STARTED) is lost, Redis does not take it"
            wait_until(lambda: log.read_text().count(refused) >= (1 if pool == "solo" else 2), 20)
            before = shim.admin.info("errorstats")["errorstat_OOM"]["count"]
            wait_until(lambda: shim.admin.info("errorstats")["errorstat_OOM"]["count"] > before + 2)
        finally:
            shim.admin.config_set("maxmemory", 0)
        wait_until(lambda: log.read_text().count("event=succeeded") == len(ids), 40)
        wait_until(lambda: not shim.admin.exists("q:trials", "q:unacked", "q:unacked_index"))
    results = [json.loads(shim.admin.get(f"celery-task-meta-{name}")) for name in ids]
    assert [result["result"] for result in results] == ["rested"] * len(ids)
    shim.admin.delete(*(f"celery-task-meta-{name}" for name in ids))


def test_a_result_that_a_full_redis_never_takes_is_given_up(shim: Redis, tmp_path: Path) -> None:
    set_settings(tmp_path, result_backend=shim.admin_url)
    code = (
        "import logging; logging.basicConfig()\n"
        "from hothouse_celery import app, results; results.PATIENCE_SECONDS = 1\n"
        "print(app.backend.store_result('some-id', 'value', 'SUCCESS'))"
    )
    shim.admin.config_set("maxmemory", 1)
    try:
        done = python("-c", code)
    finally:
        shim.admin.config_set("maxmemory", 0)
    assert (done.returncode, done.stdout) == (0, "value\n"), done.stderr
    assert "The result of some-id (SUCCESS) is lost, Redis does not take it: " in done.stderr
    shim.admin.execute_command("ACL", "SETUSER", "narrow", "on", ">word", "~q:*", "+@all")
    set_settings(tmp_path, result_backend=f"redis://narrow:word@127.0.0.1:{shim.port}/0")
    try:
        # What does not pass by itself is an error as before.
        assert "NoPermissionError" in python("-c", code).stderr
    finally:
        shim.admin.acl_deluser("narrow")
        shim.admin.acl_log_reset()


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_what_fails_around_a_task_does_not_hold_its_message_for_ever(
    shim: Redis, tmp_path: Path, pool: str
) -> None:
    # Results may not be written, which does not pass by itself.
    shim.admin.execute_command("ACL", "SETUSER", "narrow", "on", ">word", "~q:*", "&*", "+@all")
    set_settings(tmp_path, result_backend=f"redis://narrow:word@127.0.0.1:{shim.port}/0")
    log = tmp_path / "worker.log"
    with celery(log, *words(pool)):
        send(("say", ["something"]))
        wait_until(lambda: "event=received" in log.read_text())
        wait_until(lambda: not shim.admin.exists("q:trials", "q:unacked", "q:unacked_index"))
    assert "NoPermissionError" in log.read_text()
    shim.admin.acl_deluser("narrow")
    shim.admin.acl_log_reset()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_every_event_of_a_task_has_its_name(shim: Redis, tmp_path: Path, pool: str) -> None:
    """Flower counts what has none under no name, when it did not hear of the task's beginning."""
    queue, log = "почта-ü", tmp_path / "worker.log"
    shim.admin.delete(f"q:{queue}", "q:unknown-task", "q:unknown-task.names")
    calls = {"grüßen": ["you"], "fail": [0, "bad"], "again": ["x"]}
    with shim.admin.pubsub() as events:
        events.psubscribe("q:/0.celeryev/*")
        with celery(log, *words(pool), "--task-events", "--queues", queue):
            code = (
                "import hothouse_celery, json, sys\n"
                "for name, args in json.load(sys.stdin).items():\n"
                "    hothouse_celery.app.send_task(f'trials.{name}', args, queue=sys.argv[1])"
            )
            sent = python("-c", code, queue, input=json.dumps({**calls, "of_the_next_release": []}))
            assert not sent.returncode, sent.stderr
            books = (f"q:{queue}", "q:unacked", "q:unacked_index")
            wait_until(
                lambda: not shim.admin.exists(*books) and log.read_text().count("event=succeeded") >= 2, 40
            )
        found: list[dict[str, Any]] = []
        while item := events.get_message(timeout=0.5):
            if item["type"] == "pmessage":
                heard = json.loads(base64.b64decode(json.loads(item["data"])["body"]))
                found += heard if isinstance(heard, list) else [heard]
    # One that no release knows is counted elsewhere, by its name too.
    assert shim.admin.hgetall("q:unknown-task.names") == {"trials.of_the_next_release": "1"}
    tasks = [event for event in found if event["type"].startswith("task-")]
    kinds = {"received", "started", "succeeded", "failed", "retried"}
    assert {f"task-{kind}" for kind in kinds} <= {event["type"] for event in tasks}
    assert {event.get("name") for event in tasks} == {f"trials.{name}" for name in calls}


@pytest.mark.parametrize("task", ["leave", "exhaust"])
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_task_that_ends_its_process_does_so_four_times_in_every_pool(
    shim: Redis, tmp_path: Path, pool: str, task: str
) -> None:
    """Also by asking for too much memory. It takes no other task with it."""
    log, runs = tmp_path / "worker.log", tmp_path / "runs"
    other = tmp_path / "other"
    send(("answer", [str(other), 5, "return", 1]), (task, [str(runs)]), ("say", ["after it"]))
    with celery(log, *words(pool)) as process:
        wait_until(lambda: shim.admin.llen("q:dead-letter"), 40)
        wait_until(lambda: not shim.admin.exists("q:trials", "q:unacked", "q:unacked_index"))
        assert process.poll() is None
    assert len(runs.read_text().splitlines()) == RUNS
    assert len(other.read_text().splitlines()) == 1
    assert log.read_text().count("event=succeeded") == 2
    [letter] = map(json.loads, shim.admin.lrange("q:dead-letter", 0, -1))
    assert ("MemoryError" in letter["reason"]) == (task == "exhaust"), letter["reason"]


def test_dead_letters_are_listed_put_back_and_dropped(
    shim: Redis, run: Callable[..., int], tmp_path: Path
) -> None:
    def letters(*words: str) -> str:
        done = python("-m", "hothouse_celery", "dead-letters", *words)
        assert not done.returncode, done.stderr
        return done.stdout

    run(["child"], lambda: shim.admin.llen("q:dead-letter"))
    [letter] = map(json.loads, letters("--json").splitlines())
    assert letters().startswith(f"{letter['id']} ")
    assert "trials.kill queue=trials runs=4" in letters()
    assert letters("--requeue", letter["id"]) == f"{letter['id']}\n"
    assert (shim.admin.llen("q:dead-letter"), shim.admin.llen("q:trials")) == (0, 1)
    assert run(["child"], lambda: shim.admin.llen("q:dead-letter")) == 2 * RUNS
    assert letters("--drop", "--all") == f"{letter['id']}\n"
    assert not shim.admin.exists("q:dead-letter", "q:trials")
    assert python("-m", "hothouse_celery", "dead-letters", "--drop", "nobody").returncode == 1
    assert python("-m", "hothouse_celery", "dead-letters", "--requeue").returncode == 2


# What a command run by hothouse-run may do, from roles/redis/vars, without what is the application's own.
APP_RULES = (
    "-@all +auth +hello +ping +select +client|setname +multi +exec +discard +watch +unwatch ~app:*"
    " (+lpush +llen +sadd +smembers +publish +wait +evalsha +script|load ~q:* &q:/0.celeryev/*)"
    " (+lrange +lrem ~q:dead-letter ~q:unknown-task) (+hgetall +hincrby +hdel ~q:unknown-task.names)"
)
UNREADABLE = ["no JSON", "\udcff\udcfe", "[1]", json.dumps({"headers": 5, "properties": {}}), ""]


@pytest.fixture
def operator(shim: Redis, tmp_path: Path) -> Iterator[Redis]:
    """Commands have the rights of hothouse-run. Fails if the ACL refused any."""
    shim.admin.acl_log_reset()
    shim.admin.execute_command("ACL", "SETUSER", "operator", "on", ">word", *split_rules(APP_RULES))
    (tmp_path / "broker_url").write_text(f"redis://operator:word@127.0.0.1:{shim.port}/0")
    yield shim
    shim.admin.acl_deluser("operator")
    assert shim.admin.acl_log() == []


def split_rules(rules: str) -> list[str]:
    return re.findall(r"\([^)]*\)|\S+", rules)


def bury(redis: Redis, *messages: Any) -> list[str]:
    """Put letters of these messages aside, as hothouse_transport does; their entries."""
    entries = []
    for number, content in enumerate(messages):
        headers = content.get("headers") if isinstance(content, dict) else None
        named = headers if isinstance(headers, dict) else {}
        letter = {"message": content, "queue": "trials", "routing_key": "trials", "exchange": ""}
        letter |= {"task": named.get("task"), "id": named.get("id"), "reason": "a trial"}
        entries.append(json.dumps({**letter, "deliveries": RUNS, "time": 1.8e9 + number}))
        redis.admin.lpush("q:dead-letter", entries[-1])
    return entries


def message(name: str) -> dict[str, Any]:
    headers = {"task": "trials.say", "id": name, "losses": 3}
    return {"body": "", "headers": headers, "properties": {"delivery_info": {"routing_key": "trials"}}}


def dead_letters(*words: str) -> tuple[int, list[str], str]:
    done = python("-m", "hothouse_celery", "dead-letters", *words)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_letters_without_an_id_or_a_message_are_listed_and_dropped_alone(operator: Redis) -> None:
    without_id = message("")
    del without_id["headers"]["id"]
    bury(operator, *UNREADABLE, without_id, message("sound"), message("5\n5"))
    raw = redis.Redis.from_url(operator.admin_url)
    raw.lpush("q:dead-letter", b"no entry \xff\n", b"[]", b'{"id": 5, "time": "then", "queue": ["a"]}')
    before = operator.admin.llen("q:dead-letter")
    code, lines, _ = dead_letters()
    names = [line.split()[0] for line in lines]
    assert (code, len(lines), len(set(names))) == (0, before, before)
    assert [json.loads(line)["id"] for line in dead_letters("--json")[1]] == names
    names.remove("sound")
    assert all(re.fullmatch("[0-9a-f]{12}", name) for name in names)
    assert dead_letters("--drop", "sound") == (0, ["sound"], "")
    for count, name in enumerate(names, 1):
        assert dead_letters("--drop", name) == (0, [name], "")
        assert raw.llen("q:dead-letter") == before - 1 - count


def test_what_cannot_be_put_back_is_named_and_does_not_stop_the_others(operator: Redis) -> None:
    first, *_, last = bury(operator, message("first"), *UNREADABLE, message("last"))
    nowhere = json.loads(first) | {"id": "nowhere", "queue": "\udcff"}
    no_list = json.loads(first) | {"id": "no-list", "queue": "broken"}
    operator.admin.hset("q:broken", "tag", "message")
    operator.admin.rpush("q:dead-letter", json.dumps(nowhere), json.dumps(no_list))
    kept = set(operator.admin.lrange("q:dead-letter", 0, -1)) - {first, last}
    code, settled, told = dead_letters("--requeue", "--all")
    assert (code, settled) == (1, ["first", "last"])
    assert len(told.splitlines()) == len(kept) == len(UNREADABLE) + 2
    assert "nowhere: it names no queue" in told and "no-list: " in told and "cannot be read" in told
    assert set(operator.admin.lrange("q:dead-letter", 0, -1)) == kept
    queued = [json.loads(entry) for entry in reversed(operator.admin.lrange("q:trials", 0, -1))]
    assert [(entry["headers"]["id"], "losses" in entry["headers"]) for entry in queued] == [
        ("first", False),
        ("last", False),
    ]
    assert dead_letters("--requeue", "nowhere", "nobody")[0] == 1


def test_what_several_put_back_at_once_is_in_its_queue_once(operator: Redis) -> None:
    names = [f"task-{number}" for number in range(400)]
    bury(operator, *map(message, names))
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: dead_letters("--requeue", "--all"), range(4)))
    queued = [json.loads(entry)["headers"]["id"] for entry in operator.admin.lrange("q:trials", 0, -1)]
    assert (
        sorted(queued)
        == sorted(names)
        == sorted(name for _, settled, _ in done for name in settled if name != "there is none")
    )
    assert not operator.admin.exists("q:dead-letter")
    print("settled by each:", [len(settled) for _, settled, _ in done])


class Manager:
    """What systemd hears from a unit of Type=notify."""

    def __init__(self, folder: Path, watchdog_seconds: float) -> None:
        self.seconds = watchdog_seconds
        self.address = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.setblocking(False)
        self.heard: list[tuple[float, str]] = []

    @property
    def environment(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": str(int(self.seconds * 1e6))}

    def said(self, state: str, since: float = 0) -> float | None:
        """When the unit first said so, after a moment."""
        try:
            while True:
                self.heard.append((time.monotonic(), self._socket.recv(4096).decode()))
        except BlockingIOError:
            pass
        return next((at for at, text in self.heard if text == state and at >= since), None)

    def silent(self, seconds: float) -> bool:
        """Whether the watchdog's time has passed, so that systemd would restart the unit."""
        self.said("")
        last = [at for at, text in self.heard if text in ("READY=1", "WATCHDOG=1")][-1]
        return time.monotonic() - last > seconds


@pytest.fixture
def manager(tmp_path: Path) -> Manager:
    return Manager(tmp_path, 12)


@pytest.fixture
def proxy(shim: Redis, tmp_path: Path) -> Iterator[Proxy]:
    """Between the worker and Redis."""
    proxy = Proxy(shim.admin.connection_pool.connection_kwargs["port"])
    credential = tmp_path / "broker_url"
    credential.write_text(credential.read_text().replace(f":{proxy.target}/", f":{proxy.port}/"))
    yield proxy
    proxy.close()


def words(pool: str = "prefork") -> list[str]:
    return [
        "worker",
        f"--pool={pool}",
        "--concurrency=2",
        "--loglevel=INFO",
        "--without-gossip",
        "--without-mingle",
    ]


@pytest.mark.parametrize(
    ("pool", "own_transport"),
    [("prefork", True), ("threads", True), ("solo", True), ("prefork", False)],
    ids=str,
)
def test_a_worker_whose_consumer_hangs_has_itself_restarted(
    shim: Redis, manager: Manager, tmp_path: Path, pool: str, own_transport: bool
) -> None:
    set_settings(tmp_path, hothouse_transport=own_transport)
    with celery(tmp_path / "worker.log", *words(pool), **manager.environment):
        wait_until(lambda: manager.said("WATCHDOG=1"))
        began = time.monotonic()
        send(("stop_consumer", []))
        told = wait_until(lambda: manager.said("WATCHDOG=trigger"), 2 * manager.seconds)
    assert manager.seconds / 2 < told - began < manager.seconds * 1.5
    assert "takes no tasks and has to be restarted" in (tmp_path / "worker.log").read_text()


@pytest.mark.parametrize("own_transport", [True, False], ids=str)
def test_a_task_that_is_long_and_runs_in_the_consumer_does_not_have_it_restarted(
    shim: Redis, tmp_path: Path, own_transport: bool
) -> None:
    set_settings(tmp_path, hothouse_transport=own_transport)
    manager = Manager(tmp_path, 4)
    with celery(tmp_path / "worker.log", *words("solo"), **manager.environment):
        wait_until(lambda: manager.said("WATCHDOG=1"))
        send(("hang", []))  # this pool knows no time limits
        wait_until(lambda: "event=received" in (tmp_path / "worker.log").read_text())
        began = time.monotonic()
        while time.monotonic() < began + 3 * manager.seconds:
            wait_until(lambda: manager.said("WATCHDOG=1", time.monotonic() - 1), manager.seconds * 0.7)
    assert not manager.said("WATCHDOG=trigger")
    assert "event=succeeded" not in (tmp_path / "worker.log").read_text()
    assert "takes no tasks" not in (tmp_path / "worker.log").read_text()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_whose_connection_is_dead_takes_tasks_again_without_a_restart(
    proxy: Proxy, tmp_path: Path, pool: str
) -> None:
    manager, log = Manager(tmp_path, 30), tmp_path / "worker.log"  # as in the unit
    with celery(log, *words(pool), **manager.environment):
        wait_until(lambda: manager.said("WATCHDOG=1"))
        assert proxy.freeze()
        began = time.monotonic()
        send(("say", ["after it"]))
        wait_until(lambda: "event=succeeded" in log.read_text(), 60)
        print(f"deaf for {time.monotonic() - began:.1f} s ({pool})")
        assert not manager.said("WATCHDOG=trigger") and not manager.silent(manager.seconds)


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "silent"])
def test_a_worker_is_not_restarted_while_redis_is_away(
    proxy: Proxy, manager: Manager, tmp_path: Path, silent: bool
) -> None:
    log = tmp_path / "worker.log"
    with celery(log, *words(), **manager.environment):
        wait_until(lambda: manager.said("WATCHDOG=1"))
        if silent:
            proxy.freeze(new=True)
        else:
            proxy.cut()
        away = time.monotonic()
        while time.monotonic() < away + 2 * manager.seconds:
            wait_until(lambda: manager.said("WATCHDOG=1", time.monotonic() - 1), manager.seconds * 0.7)
        proxy.mend()
        back = time.monotonic()
        send(("say", ["after it"]))
        wait_until(lambda: "event=succeeded" in log.read_text(), 30)
        print(f"consumed again after {time.monotonic() - back:.1f} s")
        assert not manager.said("WATCHDOG=trigger") and not manager.silent(manager.seconds)


def test_a_worker_that_stops_by_itself_is_not_hurried_by_the_watchdog(
    shim: Redis, manager: Manager, tmp_path: Path
) -> None:
    with celery(tmp_path / "worker.log", *words(), **manager.environment) as process:
        wait_until(lambda: manager.said("WATCHDOG=1"))
        os.kill(process.pid, 15)
        assert process.wait(20) == 0
    assert manager.said("STOPPING=1")


def test_a_soft_shutdown_may_take_longer_than_the_watchdog(shim: Redis, tmp_path: Path) -> None:
    set_settings(tmp_path, worker_soft_shutdown_timeout=12)
    manager, log = Manager(tmp_path, 4), tmp_path / "worker.log"
    with celery(log, *words(), REMAP_SIGTERM="SIGQUIT", **manager.environment) as process:
        wait_until(lambda: manager.said("WATCHDOG=1"))
        send(("nap", [60]))
        wait_until(lambda: "event=received" in log.read_text())
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(40) == 0
    assert manager.said("STOPPING=1") and not manager.said("WATCHDOG=trigger")
    # It handed back what it could not finish.
    assert shim.admin.llen("q:trials") == 1


def test_a_loss_that_could_not_be_noted_leaves_the_message_to_the_others(
    shim: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held by a worker that lives, it would never come back."""
    (tmp_path / "sitecustomize.py").write_text(
        "import redis\nfrom hothouse_celery import dead\nright = dead.client\n"
        "def client(app, **options):\n"
        "    if options:  # not what notes a loss\n"
        "        return right(app, **options)\n"
        "    dead.client = right\n"
        "    raise redis.ConnectionError('away for a moment')\n"
        "dead.client = client\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    runs, log = tmp_path / "runs", tmp_path / "worker.log"
    send(("kill", [str(runs), ["child", ""]]))
    with celery(log, *words()):
        wait_until(lambda: "event=succeeded" in log.read_text(), 30)
    assert "Could not note that" in log.read_text()
    assert len(runs.read_text().splitlines()) == 2


def control(method: str = "ping", **parts: Any) -> dict[str, Any]:
    """A command of remote control, with some parts of the message replaced."""
    call = {"method": method, "arguments": {}, "destination": None, "pattern": None, "matcher": None}
    properties = {"delivery_mode": 2, "delivery_info": {"exchange": "celery.pidbox"}, "delivery_tag": "tag"}
    whole = {"body": json.dumps(call), "content-type": "application/json", "content-encoding": "utf-8"}
    return {**whole, "headers": {"clock": 1}, "properties": properties, **parts}


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_commands_that_make_no_sense_end_no_worker(shim: Redis, tmp_path: Path, pool: str) -> None:
    """Neither what is no message at all, nor names that no queue can have."""
    log = tmp_path / "worker.log"
    odd = ["5", "null", "true", "[1]", '"x"', "{}", "{", b"\xff", 5000 * "9", 100_000 * "[", 5000 * '{"a":']
    for name in control():
        for value in (None, 5, "text", [1], {}, {"clock": "x"}, {"body_encoding": "x"}):
            odd.append(json.dumps(control(**{name: value})))
    queues = ["a b", "unacked", "", 5, {"a": 1}, "\ud800"]
    code = (
        "from hothouse_celery import app; import sys, json\n"
        "for name in json.load(sys.stdin):\n"
        "    for command in ('cancel_consumer', 'add_consumer'):\n"
        "        app.control.broadcast(command, arguments={'queue': name})\n"
        "app.control.add_consumer('other', exchange=5, exchange_type='none')"
    )
    with celery(log, *words(pool)) as process:
        wait_until(lambda: log.exists() and "ready." in log.read_text() and shim.admin.pubsub_numpat(), 60)
        for text in odd:
            wait_until(
                lambda text=text: process.poll() is not None or shim.admin.publish("q:/0.celery.pidbox", text)
            )
        assert not python("-c", code, input=json.dumps(queues)).returncode
        wait_until(
            lambda: process.poll() is not None or "The queue 'other' is not consumed" in log.read_text()
        )
        assert "Connection to broker lost" not in log.read_text()
        for client in shim.admin.client_list():
            if client["name"] == "" and client["cmd"] != "client|list":
                shim.admin.client_kill_filter(_id=client["id"], skipme=True)
        send(("say", ["after it"]))
        wait_until(lambda: process.poll() is not None or "said after it" in log.read_text())
        assert process.poll() is None
