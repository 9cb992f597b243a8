"""Two runs: the second one is refused and told of the first, which gives its lock back however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BUNDLE, Play, load_plugin

plugin = load_plugin("action/hothouse_lock")
filters = load_plugin("filter/hothouse")
LEASE_SECONDS = 8


def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not come true"
        time.sleep(0.05)


class Environment:
    """A host with a lock, and runs that take it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = folder / "lock"
        self.go = folder / "go"
        lock = {"path": str(self.lock), "lease_seconds": LEASE_SECONDS}
        tasks: list[dict[str, Any]] = [
            {"hothouse_lock": lock, "run_once": True},
            # As a second play of the same run that begins with the role prepare does.
            {"hothouse_lock": lock, "run_once": True},
            {"ansible.builtin.raw": f"touch {folder}/at-work; while [ ! -e {self.go} ]; do sleep 0.1; done"},
            {"ansible.builtin.raw": "exit {{ code | default(0) }}"},
        ]
        (folder / "site.yml").write_text(
            yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": tasks}])
        )
        (folder / "hosts.yml").write_text("all: {hosts: {a: {ansible_connection: local}}}")
        (folder / "ansible.cfg").write_text(
            f"[defaults]\nlibrary={BUNDLE}/plugins/modules\naction_plugins={BUNDLE}/plugins/action\n"
        )

    def begin(self, *words: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        return subprocess.Popen(
            [Path(sys.executable).with_name("ansible-playbook"), "-i", "hosts.yml", "site.yml", *words],
            cwd=self.folder, env=environment | {"ANSIBLE_CONFIG": "ansible.cfg"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def at_work(self, *words: str) -> subprocess.Popen[str]:
        """A run that has the lock and goes on until `go` is there."""
        run = self.begin(*words)
        until(lambda: (self.folder / "at-work").exists() or run.poll() is not None)
        assert run.poll() is None, run.communicate()[0]
        return run

    def finish(self, run: subprocess.Popen[str]) -> str:
        self.go.touch()
        return self.output(run)

    @staticmethod
    def output(run: subprocess.Popen[str]) -> str:
        """Its exit code and, in one line, what it said."""
        output = run.communicate(timeout=30)[0]
        return f"{run.returncode} {' '.join(output.split())}"

    def holders(self, run: subprocess.Popen[str]) -> list[str]:
        """The processes that renew the lock: of ansible-playbook, but not of this run any more."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                here = (process / "cwd").readlink() == self.folder
                if here and b"site.yml" in (process / "cmdline").read_bytes():
                    found += [] if str(run.pid) in (process.name, parent) else [process.name]
        return found

    def free(self) -> bool:
        return not self.lock.read_text()


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    environment = Environment(tmp_path)
    yield environment
    environment.go.touch()


def test_a_second_run_is_refused_and_told_whose_the_first_one_is(environment: Environment) -> None:
    first = environment.at_work("--limit", "all")
    second = environment.output(environment.begin())
    assert second.startswith("2 ")
    for words in (
        "Another run is at work on this environment: site.yml --limit all by ",
        f"(process {first.pid}), since 20",
        "has changed nothing on the hosts",
        f"the file {environment.lock} on a; to break it",
    ):
        assert words in second
    assert environment.output(environment.begin("--check")).startswith("0 "), "a dry run takes no lock"
    assert environment.finish(first).startswith("0 ")
    until(environment.free)


def test_a_run_that_takes_longer_than_its_lease_keeps_the_lock(environment: Environment) -> None:
    run = environment.at_work()
    written = environment.lock.stat().st_mtime
    until(lambda: environment.lock.stat().st_mtime > written + LEASE_SECONDS / 2)
    assert environment.finish(run).startswith("0 ")


@pytest.mark.parametrize("end", ["failure", signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_the_lock_is_free_however_a_run_ends(environment: Environment, end: str | signal.Signals) -> None:
    run = environment.at_work("-e", "code=1")
    if isinstance(end, str):
        assert environment.finish(run).startswith("2 ")
    else:
        run.send_signal(end)
        run.wait(timeout=30)
    until(environment.free, seconds=LEASE_SECONDS - 1)


@pytest.mark.parametrize(
    ("age", "code"), [(1, 2), (LEASE_SECONDS + 5, 0)], ids=["alive", "lost with its controller"]
)
def test_the_lock_of_another_controller_ends_with_its_lease(
    environment: Environment, age: int, code: int
) -> None:
    environment.lock.write_text("elsewhere/7/4711/99\nsite.yml by ops@elsewhere\n")
    long_ago = time.time() - age
    os.utime(environment.lock, (long_ago, long_ago))
    assert environment.finish(environment.begin()).startswith(f"{code} ")


def test_the_lock_of_a_run_of_this_controller_that_is_no_more_is_taken_at_once(
    environment: Environment,
) -> None:
    ended = subprocess.Popen(["sleep", "60"])
    name = plugin.process(ended.pid)
    environment.lock.write_text(f"{name}\nsite.yml by someone\n")
    assert not plugin.has_ended(name)
    ended.kill()
    ended.wait()
    assert plugin.has_ended(name)
    assert environment.finish(environment.begin()).startswith("0 ")


def test_a_lock_that_was_broken_stays_with_the_one_who_took_it(environment: Environment) -> None:
    first = environment.at_work()
    environment.lock.unlink()
    environment.lock.write_text("elsewhere/7/4711/99\nsite.yml by ops@elsewhere\n")
    assert environment.holders(first)
    until(lambda: not environment.holders(first))
    assert environment.finish(first).startswith("0 ")
    assert environment.lock.read_text().startswith("elsewhere/")


def test_a_host_that_does_not_answer_is_passed_over(play: Callable[..., Play], tmp_path: Path) -> None:
    lock = {
        "hothouse_lock": {"path": f"{tmp_path}/lock"},
        "vars": {"ansible_connection": "ssh", "ansible_port": 1},
    }
    said = play([{**lock, "delegate_to": "127.0.0.1"}], text=True)
    assert said.code == 0 and "127.0.0.1 does not answer, so it keeps no other run away" in said.output


def asked(release: str, *units: str, moved: int = 100) -> dict[str, Any]:
    """What a host said; a unit is NAME STATE STARTED."""
    blocks = [
        f"Id={name} ActiveState={state} ExecMainStartTimestamp={started}"
        for name, state, started in (unit.split() for unit in units)
    ]
    return {"stdout_lines": ["os debian 12", f"release {release} {moved}", "services " + "  ".join(blocks)]}


@pytest.mark.parametrize(
    ("hosts", "faults"),
    [
        ({"w1": {"stdout_lines": ["os debian 12"]}}, []),
        ({"w1": asked("a", "worker@1 active @100"), "w2": asked("a", "beat inactive n/a")}, []),
        ({"w1": asked("a", "worker@1 inactive @99", "worker@2 active @101")}, []),
        (
            {"w1": asked("a", "worker@1 active @99", "beat deactivating @1", "worker@2 active @100")},
            ["worker@1, beat of w1 started before the release a"],
        ),
        ({"w1": asked("a"), "w2": asked("b"), "w3": asked("a")}, ["(w1, w3: a; w2: b)"]),
        ({"w1": asked("a"), "w2": asked("b", "beat active @1")}, ["(w1: a; w2: b)", "beat of w2 started"]),
    ],
    ids=["nothing yet", "all well", "stopped", "older", "differ", "both"],
)
def test_what_a_deployment_left_undone_is_named(hosts: dict[str, Any], faults: list[str]) -> None:
    found = filters.release_faults(hosts)
    assert len(found) == len(faults)
    for text, part in zip(found, faults, strict=True):
        assert part in text and "playbooks/worker.yml" in text
