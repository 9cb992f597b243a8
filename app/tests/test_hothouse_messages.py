"""Whatever a queue holds: real workers are given odd messages of every kind, and everything has one end."""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import oddities
import pytest
from conftest import Redis, wait_until
from hosts import python, set_up, worker

KEYS = ["q:trials", "q:dead-letter", "q:unknown-task", "q:unknown-task.names", "q:unacked", "q:unacked_index"]
KEYS += ["q:deliveries", "q:other", "ticks"]


@pytest.fixture
def shim(redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """The environment of a unit, with empty queues, and results as a deployment has them."""
    set_up(
        monkeypatch,
        tmp_path,
        redis_server.admin_url,
        hothouse_transport=True,
        result_backend=redis_server.admin_url,
        result_backend_transport_options={"global_keyprefix": "r:"},
        task_reject_on_worker_lost=True,
        task_track_started=True,
        broker_connection_retry_on_startup=True,
        worker_send_task_events=True,
    )
    clean(redis_server)
    yield redis_server
    clean(redis_server)


def clean(redis: Redis) -> None:
    redis.admin.delete(*KEYS, *redis.admin.keys("r:*"))


def use(folder: Path, **settings: Any) -> None:
    """Change the settings of the unit."""
    file = folder / "celery.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def good(name: str) -> bytes:
    made = oddities.protocol_2()
    made["body"] = base64.b64encode(
        json.dumps(made["body"]).replace(f"odd-{oddities.MARK}", name).encode()
    ).decode()
    return json.dumps(made).replace(oddities.MARK, name).encode()


def readable(entry: str) -> str:
    """All that is in a letter: a message's body is in base64."""
    content = json.loads(entry)["message"]
    text = content if isinstance(content, str) else json.dumps(content)
    for body in re.findall(r'"body": *"([A-Za-z0-9+/]+=*)"', text):
        with suppress(ValueError):
            text += base64.b64decode(body + "==").decode(errors="replace")
    return text


def settled(redis: Redis) -> bool:
    return not redis.admin.exists("q:trials", "q:unacked", "q:unacked_index")


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_two_thousand_odd_messages_end_no_worker_and_each_ends_in_one_place(
    pool: str, shim: Redis, tmp_path: Path
) -> None:
    log = tmp_path / "worker.log"
    began = time.monotonic()
    recipes = list(oddities.generate(2000).values())
    print(f"generated in {time.monotonic() - began:.1f} s")
    with worker(log, f"--pool={pool}", "--concurrency=2") as process:
        wait_until(lambda: "ready." in log.read_text(), 90)
        steps = shim.admin.pipeline(transaction=False)
        for number, recipe in enumerate(recipes):
            steps.lpush("q:trials", recipe.build(f"{number:06}"))
            if not number % 10:
                steps.lpush("q:trials", good(f"good-{number}"))
        steps.lpush("q:trials", good("good-last"))
        steps.execute()
        wait_until(lambda: process.poll() is not None or settled(shim), 120)
        assert process.poll() is None, log.read_text()[-3000:]
    text = log.read_text()
    assert text.count("ready.") == 1 and "WorkerLostError" not in text and "could not be" not in text

    ticks = {name: int(times) for name, times in shim.admin.hgetall("ticks").items()}
    fine = {name: times for name, times in ticks.items() if name.startswith("good-")}
    assert set(fine.values()) == {1} and len(fine) == len(range(0, len(recipes), 10)) + 1

    letters = shim.admin.lrange("q:dead-letter", 0, -1)
    unknown = shim.admin.lrange("q:unknown-task", 0, -1)
    ended = "succeeded|failed|retry|rejected|ignored"
    outcomes = re.findall(rf'event=({ended}) task=(?:"[^"]*"|\S+) id=(\S+) ', text)
    print(
        f"{pool}: {len(recipes)} odd messages: {len(letters)} dead letters, {len(unknown)} unknown tasks, "
        f"{Counter(outcome for outcome, _ in outcomes)} with those that they called and the good ones"
    )
    # Which message each end is of; "none" if nothing in it tells. What a message called has an id of its own.
    aside = Counter(mark_of(readable(entry)) for entry in letters + unknown)
    ran = Counter(mark_of(name) for _, name in outcomes if "good-" not in name and not UUID.fullmatch(name))
    nameless = aside.pop("none") + ran.pop("none")
    aside.pop("called", 0)
    # Of a task whose callback cannot be called the log has no such line.
    results = {mark_of(key) for key in shim.admin.keys("r:celery-task-meta-odd-[0-9]*")}
    assert {*aside.values(), *ran.values()} == {1}
    assert not aside.keys() & (ran.keys() | results)
    assert len(aside.keys() | ran.keys() | results) + nameless == len(recipes)
    assert not [name for name, times in ticks.items() if name.startswith(("odd-", "called-")) and times > 1]
    assert all(json.loads(entry)["reason"] for entry in letters)
    names = Counter(json.loads(entry)["task"] for entry in unknown)
    assert names == {name: int(times) for name, times in shim.admin.hgetall("q:unknown-task.names").items()}


UUID = re.compile("[0-9a-f-]{36}")


def mark_of(text: str) -> str:
    if re.search(r'"parent_id": "odd-', text):
        return "called"
    found = re.search(r"odd-(\d{6})|tag-(\d{6})", text)
    return (found[1] or found[2]) if found else "none"


# What apply_async(headers=…) or a client of another language can make, and the words of the reason.
NAMED = {
    "timelimit-number": ("headers", "timelimit", 30, "timelimit is 30, and has to be two numbers"),
    "timelimit-one": ("headers", "timelimit", [1], "timelimit is [1]"),
    "timelimit-endless": ("headers", "timelimit", [1e400, None], "timelimit is [inf, None]"),
    "task-object": ("headers", "task", {}, "no usable name, but {}"),
    "task-two-lines": ("headers", "task", "a\nb", "no usable name"),
    "id-object": ("headers", "id", {}, "its id is no text, but {}"),
    "id-number": ("headers", "id", 5, "its id is no text, but 5"),
    "id-uuid": (
        "headers",
        "id",
        oddities.typed("uuid", {"hex": "1" * 32, "version": 4}),
        "no text, but UUID(",
    ),
    "eta-date": ("headers", "eta", oddities.typed("date", "2026-01-01"), "invalid ETA value datetime.date"),
    "eta": ("headers", "eta", "soon", "invalid ETA value 'soon'"),
    "eta-zero": ("headers", "eta", 0, "eta is 0, and has to be a time"),
    "eta-out-of-range": ("headers", "eta", "0001-01-01T00:00:00+14:00", "out of range"),
    "expires": ("headers", "expires", {"a": 1}, "invalid expires value"),
    "retries": ("headers", "retries", "many", "retries is 'many', and has to be a whole number"),
    "group": ("headers", "group", {}, "group is {}"),
    "shadow": ("headers", "shadow", ["a"], "shadow is ['a']"),
    "a-method": ("headers", "update", 1, "has a header 'update'"),
    "compression": ("headers", "compression", "zzz", "cannot be read"),
    "stamps": ("headers", "stamped_headers", 5, "stamped_headers is 5"),
    "no-type": ("content-type", None, None, "its body is not a list"),
    "pickle": ("content-type", None, "application/x-python-serialize", "cannot be read: "),
    "encoding": ("content-encoding", None, "zzz", "content encoding is not known: 'zzz'"),
    "encoding-number": ("content-encoding", None, 5, "content encoding is not known: 5"),
    "body-number": ("body", None, 5, "its body is not a list"),
    "args": ("body", 0, "text", "its arguments are no list, but 'text'"),
    "kwargs": ("body", 1, [], "its keyword arguments are no object"),
    "callbacks": ("body", 2, {"callbacks": ["a"]}, "callbacks has 'a', which is no signature"),
    "chord": ("body", 2, {"chord": {"task": 5}}, "chord has {'task': 5}"),
    "deep": ("body", 0, [oddities.Deep(300)], "nested in more than 200 levels"),
    "deeper": ("body", 0, [oddities.Deep(100_000)], "RecursionError"),
}


def odd(name: str) -> bytes:
    part, inner, value, _ = NAMED[name]
    return oddities.Recipe(0, (part,) if inner is None else (part, inner), value).build(name)


@pytest.mark.parametrize("transport", ["hothouse", "redis"])
def test_each_odd_message_is_a_dead_letter_that_says_why(transport: str, shim: Redis, tmp_path: Path) -> None:
    use(tmp_path, hothouse_transport=transport == "hothouse")
    for name in NAMED:
        shim.admin.lpush("q:trials", odd(name), good(f"good-{name}"))
    log = tmp_path / "worker.log"
    with worker(log, "--concurrency=1") as process:
        wait_until(lambda: process.poll() is not None or shim.admin.hlen("ticks") == len(NAMED), 40)
        wait_until(lambda: settled(shim))
    assert {int(times) for times in shim.admin.hvals("ticks")} == {1}
    entries = shim.admin.lrange("q:dead-letter", 0, -1)
    assert len(entries) == len(NAMED)
    reasons = {
        json.loads(entry)["message"]["properties"]["correlation_id"]: json.loads(entry)["reason"]
        for entry in entries
    }
    for name, (*_, words) in NAMED.items():
        assert words in reasons[f"odd-{name}-id"], name


def foreign() -> dict[str, str]:
    """Messages as clients in other languages write them, each for a task that notes its name."""

    def one(name: str, number: int = 1, **parts: Any) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(
            oddities.Recipe(number, ("headers",), bases[number]["headers"]).build(name)
        )
        made.update(parts)
        return made

    bases = oddities.bases()
    found: dict[str, Any] = {
        "protocol-1": one("protocol-1"),
        "headers-null": one("headers-null", headers=None),
        "headers-list": one("headers-list", headers=[]),
        "info-null": one("info-null"),
        "info-missing": one("info-missing", 0),
        "tag-number": one("tag-number", 0),
        "plain-body": one("plain-body", 0),
        "no-properties": one("no-properties"),
        "pretty": one("pretty", 0),
        "slashes": one("slashes", 0),
        "kwargs-null": one("kwargs-null"),
        "kwargs-null-2": one("kwargs-null-2", 0),
        "empty-texts": one("empty-texts", 0),
        "retries-null": one("retries-null", 0),
    }
    del found["no-properties"]["headers"]
    for name in ("plain-body", "no-properties", "kwargs-null", "kwargs-null-2"):
        found[name]["body"] = base64.b64decode(found[name]["body"]).decode()
        found[name]["properties"].pop("body_encoding")
    found["info-null"]["properties"]["delivery_info"] = None
    del found["info-missing"]["properties"]["delivery_info"]
    found["tag-number"]["properties"]["delivery_tag"] = 17
    found["no-properties"].pop("properties")
    for name in ("kwargs-null", "kwargs-null-2"):
        found[name]["body"] = found[name]["body"].replace("{}", "null", 1)
    found["empty-texts"]["headers"].update(eta="", expires="", shadow="")
    found["retries-null"]["headers"].update(retries=None, timelimit=None)
    texts = {name: json.dumps(made) for name, made in found.items()}
    texts["pretty"] = texts["pretty"].replace('": ', '" : ')
    texts["slashes"] = texts["slashes"].replace("/", "\\/")
    return texts


@pytest.mark.parametrize("transport", ["hothouse", "redis"])
def test_what_clients_of_other_languages_write_runs_and_comes_back_to_run(
    transport: str, shim: Redis, tmp_path: Path
) -> None:
    use(tmp_path, hothouse_transport=transport == "hothouse")
    messages = foreign()
    for name, text in messages.items():
        shim.admin.lpush("q:trials", text)
    log = tmp_path / "worker.log"
    # Taken, and given back at the end: the only child is busy for as long, and the prefetch has room for all.
    napping = oddities.protocol_2()
    napping["headers"]["task"], napping["body"] = "trials.nap", base64.b64encode(b"[[60], {}, {}]").decode()
    shim.admin.rpush("q:trials", json.dumps(napping))
    with worker(log, "--concurrency=1", "--prefetch-multiplier=20", REMAP_SIGTERM="SIGQUIT"):
        wait_until(lambda: shim.admin.hlen("q:unacked") == len(messages) + 1)
    assert not shim.admin.exists("q:unacked")
    for entry in shim.admin.lrange("q:trials", 0, -1):
        if "trials.nap" in entry:
            shim.admin.lrem("q:trials", 1, entry)
    assert shim.admin.llen("q:trials") == len(messages)
    with worker(log, "--concurrency=1"):
        wait_until(lambda: shim.admin.hlen("ticks") == len(messages))
        wait_until(lambda: settled(shim))
    assert shim.admin.hgetall("ticks") == {f"odd-{name}": "1" for name in messages}
    assert not shim.admin.exists("q:dead-letter", "q:unknown-task")


def command(*words: str) -> tuple[int, list[str], str]:
    done = python("-m", "hothouse_celery", *words)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("transport", ["hothouse", "redis"])
def test_tasks_that_no_release_knew_run_once_one_does(transport: str, shim: Redis, tmp_path: Path) -> None:
    use(tmp_path, hothouse_transport=transport == "hothouse")
    for number, name in enumerate(["trials.coming", "trials.later", "trials.never"] * 3):
        base = number % 2
        path = ("body" if base else "headers", "task")
        shim.admin.lpush("q:trials", oddities.Recipe(base, path, name).build(f"{number:06}"))
    log = tmp_path / "worker.log"
    with worker(log, "--concurrency=1"):
        wait_until(lambda: settled(shim))
    assert shim.admin.hgetall("q:unknown-task.names") == {
        "trials.coming": "3",
        "trials.later": "3",
        "trials.never": "3",
    }
    assert not shim.admin.exists("q:dead-letter")
    code, lines, told = command("dead-letters")
    assert (code, len(lines), told) == (0, 9, "")
    assert all(
        re.search(r" trials\.(coming|later|never) queue=trials runs=0 kind=unknown$", line) for line in lines
    )
    assert command("dead-letters", "--requeue", "--all") == (0, ["there is none"], "")
    # One by its id, though it is not known yet.
    first = json.loads(command("dead-letters", "--json", "--unknown")[1][0])
    assert first["kind"] == "unknown" and "no release on this host knows" in first["reason"]
    assert command("dead-letters", "--drop", first["id"])[0] == 0
    counts = shim.admin.hgetall("q:unknown-task.names")
    assert counts[first["task"]] == "2"
    # A release that has the task.
    (tmp_path / "release.py").write_text(
        "from trials import app, tick\napp.task(name='trials.coming')(tick.run)\napp.task(name='trials.later')(tick.run)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOTHOUSE_APP", "release:app")
        patch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
        with worker(log, "--concurrency=1"):
            code, _, told = command("ping", "trials")
            assert code == 0
            waiting = int(counts["trials.coming"])
            assert (
                f"{waiting} messages of the task trials.coming were set aside because no release knew it"
                in told
            )
            assert "trials.later" in told and "trials.never" not in told
            code, lines, told = command("dead-letters", "--requeue", "--unknown")
            known = sum(int(count) for name, count in counts.items() if name != "trials.never")
            assert (code, len(lines)) == (0, known)
            stay = int(counts["trials.never"])
            assert told == f"{stay} messages of the task trials.never stay: this release does not know it\n"
            wait_until(lambda: shim.admin.hlen("ticks") == known)
            wait_until(lambda: settled(shim))
            assert "set aside" not in command("ping", "trials")[2]
    assert shim.admin.hgetall("q:unknown-task.names") == {"trials.never": str(stay)}
    assert len(command("dead-letters", "--drop", "--unknown")[1]) == stay
    assert not shim.admin.exists("q:unknown-task", "q:unknown-task.names", "q:dead-letter")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ("app.conf.task_default_queue = 'a b'", "task_default_queue: 'a b' cannot be the name of a queue: it contains a space"),
        ("app.conf.task_queues = [kombu.Queue('unacked')]", "task_queues: 'unacked' cannot"),
        ("app.conf.task_queues = {'a,b': {}}", "task_queues: 'a,b' cannot"),
        ("app.conf.task_routes = {'trials.*': {'queue': 'x\\n'}}", "the route of trials.* in task_routes: 'x\\n' cannot"),
        ("app.conf.task_routes = ([('trials.say', 'dead-letter')],)", "the route of trials.say in task_routes: "),
        ("app.conf.task_routes = [{'trials.say': 'deliveries'}]", "the route of trials.say in task_routes: "),
        ("app.tasks['trials.say'].queue = ' '", "the option queue of the task trials.say: ' ' cannot"),
        (
            "app.conf.beat_schedule = {'x': {'task': 'trials.tick', 'schedule': 1, 'args': ['x'], 'options': {'queue': 'unknown-task'}}}",
            "the entry x of beat_schedule: 'unknown-task' cannot be the name of a queue: it is reserved",
        ),
        (
            "app.conf.task_default_queue = 'a b'; app.conf.beat_schedule = {'x': {'task': 'missing', 'schedule': 1}}",
            "Give the queue another name.\nbeat cannot send these entries of the schedule (beat_schedule):\n  'x': ",
        ),
        ("app.conf.beat_schedule = [{'task': 'trials.tick'}]", "it has to be a mapping of names to entries"),
        ("app.conf.task_routes = {'trials.*': {'queue': 'grüße'}}", ""),
        ("app.conf.task_routes = [lambda *args, **options: None, 'trials.route']", ""),
    ],
)  # fmt: skip
def test_the_release_check_refuses_names_that_no_queue_can_have(
    change: str, where: str, shim: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "release.py").write_text(f"import kombu\nfrom trials import app\n{change}\n")
    monkeypatch.setenv("HOTHOUSE_APP", "release:app")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    file = tmp_path / "celery.json"
    settings = json.loads(file.read_text())
    del settings["task_default_queue"]
    file.write_text(json.dumps(settings))
    code, lines, told = command("check")
    assert where in told
    assert (code, bool(lines)) == ((1, False) if where else (0, True))


def test_what_the_pool_cannot_take_is_put_aside_also_when_a_place_becomes_free(
    shim: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if something in a message could be read, and not be written for a child."""
    (tmp_path / "sitecustomize.py").write_text(
        "from hothouse_celery import messages\nright = messages.check\n"
        "def check(app, message):\n"
        "    right(app, message)\n"
        "    if 'heavy' in message.headers['id']:\n"
        "        message.headers['own'] = lambda: None\n"
        "messages.check = check\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    for number in range(6):
        shim.admin.lpush("q:trials", good(f"good-{number}"), good(f"heavy-{number}"))
    log = tmp_path / "worker.log"
    with worker(log, "--concurrency=1", "--prefetch-multiplier=20"):
        wait_until(lambda: settled(shim), 60)
    assert shim.admin.hgetall("ticks") == {f"good-{number}": "1" for number in range(6)}
    reasons = [json.loads(entry)["reason"] for entry in shim.admin.lrange("q:dead-letter", 0, -1)]
    assert len(reasons) == 6 and all("cannot be handed to the pool: " in reason for reason in reasons)
