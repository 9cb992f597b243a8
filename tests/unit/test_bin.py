"""The commands in bin/ refuse bad input before they start anything, and say what, where and how to mend it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BUNDLE = Path(__file__).resolve().parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=BUNDLE,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A TCP port of this machine on which this process listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("topology", ["local", "prod"])
@pytest.mark.parametrize("name", ["https", "flower", "ssh"])
def test_up_names_a_taken_port_and_who_has_it(taken_port: int, name: str, topology: str) -> None:
    done = run("bin/up", "--topology", topology, f"--{name}-port", str(taken_port))
    assert done.returncode == 1
    assert re.search(
        rf"port {taken_port} \(--{name}-port\) is taken by .+ \(pid {os.getpid()}\)\n", done.stderr
    )
    assert "choose other ports: bin/up --help" in done.stderr
    assert done.stdout == "", "nothing was started"


def test_up_takes_ports_from_the_environment(taken_port: int) -> None:
    done = run("bin/up", HOTHOUSE_HTTPS_PORT=str(taken_port))
    assert f"port {taken_port} (--https-port) is taken by" in done.stderr


def test_up_does_not_remember_a_port_that_it_refused(taken_port: int) -> None:
    run("bin/up", "--https-port", str(taken_port))
    assert f"HOTHOUSE_HTTPS_PORT, {taken_port}" not in run("bin/up", "--help").stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("bin/up", "--https-port", "https"), "--https-port https is no port"),
        (("bin/up", "--https-port", "65536"), "--https-port 65536 is no port"),
        (("bin/up", "--https-port"), "--https-port needs a value"),
        (("bin/up", "--topology", "staging"), 'there is no topology "staging"'),
        (("bin/up", "--port", "1"), "unknown option --port"),
        (("bin/down", "--al"), "unknown option --al"),
        (("bin/test", "shared"), 'there is no scenario "shared"'),
    ],
)
def test_wrong_usage_is_refused_in_one_message(command: tuple[str, ...], message: str) -> None:
    done = run(*command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"\n{command[0]}: {message}\n  ")


@pytest.mark.parametrize("command", ["up", "down", "test"])
def test_every_command_explains_itself(command: str) -> None:
    done = run(f"bin/{command}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: bin/{command} ")


def count(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "bin/lib/count.py", *arguments)


def test_the_closing_line_sums_up_all_runs(tmp_path: Path) -> None:
    suite = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="{}" /></testsuites>'
    first, second = tmp_path / "first.xml", tmp_path / "second.xml"
    first.write_text(suite.format(10, 0, 0, 0))
    second.write_text(suite.format(6, 1, 1, 1))
    done = count("1500", "0", str(first))
    assert (done.stdout, done.returncode) == ("===== 10 passed in 1.5s =====\n", 0)
    done = count("1500", "1", str(first), str(second))
    assert done.stdout == "===== 2 failed, 13 passed, 1 skipped, 1 stages failed in 1.5s =====\n"
    assert done.returncode == 1


def test_no_tests_at_all_is_a_failure() -> None:
    done = count("0", "0")
    assert (done.stdout, done.returncode) == ("===== no tests ran in 0.0s =====\n", 1)
