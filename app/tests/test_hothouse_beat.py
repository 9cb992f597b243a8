"""The scheduler of the deployment, hothouse_celery.beat: one schedules, and no due time is served twice."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from conftest import Redis, wait_until
from hosts import TESTS, celery, python, set_up
from proxy import Proxy

LOCK_SECONDS = 6
Beat = Callable[..., AbstractContextManager[Any]]


def clear(redis: Redis) -> None:
    for key in [*redis.admin.keys("redbeat*"), "q:trials"]:
        redis.admin.delete(key)


@pytest.fixture
def shim(redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """The environment of a beat, with an empty schedule and queue."""
    clear(redis_server)
    connection = {"socket_timeout": 5, "socket_connect_timeout": 3}
    set_up(
        monkeypatch,
        tmp_path,
        redis_server.admin_url,
        hothouse_transport=True,
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0, "interval_max": 0.2},
        beat_scheduler="hothouse_celery.beat:Scheduler",
        beat_max_loop_interval=1,
        redbeat_key_prefix="redbeat:",
        redbeat_lock_timeout=LOCK_SECONDS,
        redbeat_redis_options=connection,
        broker_transport_options={"global_keyprefix": "q:", **connection},
        beat_schedule={
            "often": {"task": "trials.say", "schedule": 1.0, "args": ["often"]},
            "seldom": {"task": "trials.say", "schedule": 3.0, "args": ["seldom"]},
        },
    )
    yield redis_server
    clear(redis_server)


@pytest.fixture
def beat(shim: Redis, tmp_path: Path) -> Beat:
    """Start a beat. Its log is a file of this name; settings of its own replace those of the environment."""

    def start(name: str, **settings: Any) -> AbstractContextManager[Any]:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(json.loads((tmp_path / "celery.json").read_text()) | settings))
        words = ["beat", "--loglevel=INFO", "--pidfile="]
        return celery(tmp_path / f"{name}.log", *words, HOTHOUSE_SETTINGS=str(path))

    return start


def sent(redis: Redis, name: str = "often") -> list[tuple[float, str]]:
    """When the tasks of an entry were published and their ids, the first one first."""
    messages = [json.loads(message) for message in reversed(redis.admin.lrange("q:trials", 0, -1))]
    return [
        (message["headers"]["published"], message["headers"]["id"])
        for message in messages
        if name in message["headers"]["argsrepr"]
    ]


def check_served_once(tasks: list[tuple[float, str]], seconds: float) -> None:
    """No two ids alike, and never two tasks for one due time."""
    assert len({task for _, task in tasks}) == len(tasks)
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(tasks)]
    assert all(gap > seconds * 0.9 for gap in gaps), gaps


def test_two_schedulers_that_both_have_a_lock_send_each_due_task_once(shim: Redis, beat: Beat) -> None:
    with beat("one", redbeat_lock_key="one"), beat("two", redbeat_lock_key="two"):
        wait_until(lambda: shim.admin.exists("redbeat:one", "redbeat:two") == 2)
        shim.admin.delete("q:trials")
        wait_until(lambda: len(sent(shim)) > 14, 60)
        often, seldom = sent(shim), sent(shim, "seldom")
        assert len(shim.admin.keys("redbeat:slot:*")) >= len(often)
    check_served_once(often, 1)
    check_served_once(seldom, 3)
    assert often[-1][0] - often[0][0] < len(often) * 1.6, "due times were left out"


def test_a_scheduler_that_is_killed_is_followed_within_the_time_of_its_lock(
    shim: Redis, beat: Beat, tmp_path: Path
) -> None:
    with beat("one") as one:
        wait_until(lambda: len(sent(shim)) > 1)
        with beat("two"):
            wait_until(lambda: "stands by" in (tmp_path / "two.log").read_text() or sent(shim, "seldom"))
            wait_until(lambda: len(sent(shim)) > 4)
            assert "Sending due task" not in (tmp_path / "two.log").read_text()
            one.kill()
            killed, before = time.time(), len(sent(shim))
            wait_until(lambda: len(sent(shim)) > before + 1, 3 * LOCK_SECONDS)
            print(f"the next task came {sent(shim)[before][0] - killed:.1f} s after the kill")
            assert sent(shim)[before][0] - killed < LOCK_SECONDS + 2.5
    check_served_once(sent(shim), 1)


def test_a_lock_that_is_lost_is_taken_again_by_one_of_them(shim: Redis, beat: Beat, tmp_path: Path) -> None:
    """As after a failover to a replica that had not heard of it."""
    with beat("one") as one, beat("two") as two:
        wait_until(lambda: len(sent(shim)) > 1)
        for _ in range(5):
            shim.admin.delete("redbeat::lock")
            before = len(sent(shim))
            wait_until(lambda before=before: len(sent(shim)) > before + 1, 10)
        assert one.poll() is None and two.poll() is None
        assert shim.admin.exists("redbeat::lock")
    check_served_once(sent(shim), 1)


def test_a_task_that_could_not_be_sent_is_sent_as_soon_as_it_can_be(
    shim: Redis, beat: Beat, tmp_path: Path
) -> None:
    with beat("one"):
        wait_until(lambda: sent(shim, "seldom"))
        shim.admin.delete("q:trials")
        shim.admin.set("q:trials", "no list")
        wait_until(lambda: (tmp_path / "one.log").read_text().count("Could not send") > 1)
        shim.admin.delete("q:trials")
        mended = time.time()
        wait_until(lambda: sent(shim) and sent(shim, "seldom"), 10)
        assert sent(shim)[0][0] - mended < 2
    check_served_once(sent(shim), 1)


# As beat meets it when a failover begins between the publishing and the note of it, and lasts for a while.
READ_ONLY = """
import hothouse_celery.beat
from redis.exceptions import ReadOnlyError

class Redis:
    def __init__(self, redis): self.redis = redis
    def __getattr__(self, name): return getattr(self.redis, name)
    def set(self, key, value, ex):
        failed.append(key)
        if failed.count(key) <= 3:
            if LOST: self.redis.delete(key)
            raise ReadOnlyError("a trial")
        return self.redis.set(key, value, ex=ex)

failed, get_redis = [], hothouse_celery.beat.get_redis
hothouse_celery.beat.get_redis = lambda app: Redis(get_redis(app))
Scheduler = hothouse_celery.beat.Scheduler
"""


@pytest.mark.parametrize("lost", [False, True], ids=["claim stays", "claim is lost"])
def test_what_was_sent_but_could_not_be_noted_is_not_sent_again(
    shim: Redis, beat: Beat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    (tmp_path / "read_only.py").write_text(READ_ONLY.replace("LOST", str(lost)))
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{tmp_path}")
    schedule = {"often": {"task": "trials.say", "schedule": 1.0, "args": ["often"]}}
    with beat("one", beat_scheduler="read_only:Scheduler", beat_schedule=schedule) as one:
        wait_until(lambda: len(sent(shim)) > 2, 30)
        assert one.poll() is None
    assert "ReadOnlyError" in (tmp_path / "one.log").read_text()
    assert "served" in [shim.admin.get(key) for key in shim.admin.keys("redbeat:slot:*")]
    check_served_once(sent(shim), 1)


def test_a_scheduler_outlives_an_outage_of_redis(shim: Redis, beat: Beat, tmp_path: Path) -> None:
    proxy = Proxy(shim.admin.connection_pool.connection_kwargs["port"])
    credential = tmp_path / "broker_url"
    credential.write_text(credential.read_text().replace(f":{proxy.target}/", f":{proxy.port}/"))
    with beat("one") as one:
        wait_until(lambda: len(sent(shim)) > 1)
        proxy.cut()
        wait_until(lambda: "does not answer" in (tmp_path / "one.log").read_text())
        wait_until(lambda: not shim.admin.exists("redbeat::lock"), 3 * LOCK_SECONDS)
        proxy.mend()
        mended, before = time.time(), len(sent(shim))
        wait_until(lambda: len(sent(shim)) > before + 1, 10)
        print(f"the next task came {sent(shim)[before][0] - mended:.1f} s after Redis")
        assert one.poll() is None
    proxy.close()
    check_served_once(sent(shim), 1)


def test_who_schedules_is_noted_and_no_longer_when_it_stops(shim: Redis, beat: Beat) -> None:
    with beat("one") as one:
        wait_until(lambda: shim.admin.zcard("redbeat:schedulers") == 1)
        one.terminate()
        assert one.wait(10) == 0
    assert not shim.admin.exists("redbeat:schedulers", "redbeat::lock")


CHANGES = {
    "Berlin, to summer time": ("Europe/Berlin", "2026-03-28T20:00"),
    "Berlin, to winter time": ("Europe/Berlin", "2026-10-24T20:00"),
    "Lord Howe, half an hour": ("Australia/Lord_Howe", "2026-04-04T10:00"),
    "none, which is UTC": ("none", "2026-10-24T20:00"),
}


@pytest.mark.parametrize(("zone", "begin"), CHANGES.values(), ids=list(CHANGES))
def test_the_time_zone_of_the_application_counts_also_when_summer_time_begins_and_ends(
    shim: Redis, zone: str, begin: str
) -> None:
    found = python(str(TESTS / "clock.py"), begin, "40", zone)
    assert not found.returncode, found.stderr
    first, last = datetime.fromisoformat(begin).replace(tzinfo=UTC), timedelta(hours=40)
    minutes = [first + timedelta(minutes=number) for number in range(1, int(last.total_seconds()) // 60 + 1)]
    local = {minute: minute.astimezone(ZoneInfo("UTC" if zone == "none" else zone)) for minute in minutes}
    wanted = {
        "noon": [minute for minute in minutes if (local[minute].hour, local[minute].minute) == (12, 0)],
        # Celery's crontab() passes over the second one of two hours that are called the same.
        "tens": [minute for minute in minutes if local[minute].minute % 10 == 0 and not local[minute].fold],
        "interval": minutes[9::10],
        "nowfun": [minute for minute in minutes if (local[minute].hour, local[minute].minute) == (10, 0)],
    }
    sent: dict[str, list[datetime]] = {name: [] for name in (*wanted, "night")}
    for name, moment in json.loads(found.stdout):
        sent[name].append(datetime.fromisoformat(moment))
    for name in wanted:
        assert sent[name] == wanted[name], name
    # Half past two may not exist, or come twice: once a day all the same, at that time or as soon as it is later.
    nights = [local[minute] for minute in sent["night"]]
    assert [night.date() for night in nights] == sorted({moment.date() for moment in local.values()})[1:]
    assert all((2, 30) <= (night.hour, night.minute) <= (3, 30) for night in nights), nights


@pytest.fixture
def schedules(shim: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Redis:
    """The environment of a beat of the application `schedules`, which has a schedule of its own."""
    settings = json.loads((tmp_path / "celery.json").read_text())
    del settings["beat_schedule"]
    (tmp_path / "celery.json").write_text(json.dumps(settings))
    monkeypatch.setenv("HOTHOUSE_APP", "schedules:app")
    monkeypatch.setenv("BAD", "")
    return shim


def messages(redis: Redis) -> list[tuple[str, dict[str, Any]]]:
    """Of each task that beat sent the body, as a worker reads it, and the headers."""
    found = [json.loads(message) for message in redis.admin.lrange("q:trials", 0, -1)]
    return [(base64.b64decode(message["body"]).decode(), message["headers"]) for message in found]


def sent_once(redis: Redis, name: str) -> bool:
    """Whether beat has noted in an entry that it sent its task."""
    return "total_run_count" in (redis.admin.hget(f"redbeat:{name}", "meta") or "")


@pytest.mark.parametrize("bad", ["", "yes"], ids=["good entries", "with bad ones"])
def test_beat_sends_what_a_message_can_hold_and_bad_entries_keep_none_from_being_sent(
    schedules: Redis, beat: Beat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    monkeypatch.setenv("BAD", bad)
    good = python(
        "-c",
        "import json, schedules; from kombu.utils.json import dumps\n"
        "print(json.dumps({n: dumps([e['args'], e.get('kwargs', {})])[:-1] for n, e in schedules.GOOD.items()}))",
    )
    wanted: dict[str, str] = json.loads(good.stdout)

    minutely = wanted.pop("hours as a set")

    def waiting() -> list[str]:
        return [name for name in wanted if not sent_once(schedules, name)]

    with beat("one") as one:
        wait_until(lambda: not waiting(), 60)
        assert one.poll() is None and minutely
        assert schedules.admin.zscore("redbeat::schedule", "redbeat:hours as a set") % 60 == 0
    sent = messages(schedules)
    for name, text in wanted.items():
        assert any(body.startswith(text) for body, _ in sent), name
    assert any(headers["expires"] for _, headers in sent)
    assert "The schedule of 'fails later' fails" in (tmp_path / "one.log").read_text()
    assert ("is not sent" in (tmp_path / "one.log").read_text()) is bool(bad)


def test_one_that_is_stopped_while_it_looks_at_a_schedule_ends(
    schedules: Redis, beat: Beat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a schedule raises ends no beat, but the signal that ends it, which is raised there as well, does."""
    (tmp_path / "slow.py").write_text(
        "import time; from pathlib import Path; from celery.schedules import schedule; from trials import app\n"
        "class Slow(schedule):\n"
        "    looks = 0\n"
        "    def is_due(self, last_run_at):\n"
        "        Slow.looks += 1\n"
        "        if Slow.looks > 1:  # not when it is checked\n"
        f"            Path('{tmp_path}/looks').touch(); time.sleep(30)\n"
        "        return super().is_due(last_run_at)\n"
        "app.conf.beat_schedule = {'slow': {'task': 'trials.tick', 'schedule': Slow(1.0), 'args': ['x']}}\n"
    )
    monkeypatch.setenv("HOTHOUSE_APP", "slow:app")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    with beat("one") as one:
        wait_until((tmp_path / "looks").exists)
        one.terminate()
        assert one.wait(10) == 0
    assert not schedules.admin.exists("redbeat:schedulers", "redbeat::lock")


def test_the_check_of_a_release_names_the_entries_that_beat_cannot_send(
    schedules: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = python("-m", "hothouse_celery", "check")
    assert not good.returncode, good.stderr
    monkeypatch.setenv("BAD", "yes")
    checked = python("-m", "hothouse_celery", "check")
    assert checked.returncode == 1
    named = [line.strip() for line in checked.stderr.splitlines()[1:]]
    bad = python("-c", "import json, schedules; print(json.dumps(list(map(repr, schedules.BAD))))")
    assert [
        line.partition(": ")[0] if not line.startswith("':") else "':schedule'" for line in named
    ] == json.loads(bad.stdout), checked.stderr
    assert "it sends the task 'missing', which this release does not have" in checked.stderr
