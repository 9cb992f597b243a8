"""app_environment as processes read it, under both releases of systemd."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from shlex import quote

import pytest
from conftest import REPOSITORY, Stack
from testinfra.host import Host

sys.path += [str(REPOSITORY / "tests/unit"), str(REPOSITORY / "plugins/filter")]
import hothouse as filters  # found by the line above
from environments import environment

pytestmark = pytest.mark.scenarios("prod")

FILE, KEPT = "/etc/hothouse/app.env", "/run/hothouse-test-app.env"
SHOW = "import json, os; print(json.dumps({name: os.environ[name] for name in os.environ if name.startswith('TEST_')}))"


@pytest.fixture(params=["worker", "redis"])
def host(request: pytest.FixtureRequest, stack: Stack) -> Iterator[Host]:
    """A host of Debian 12, and one of Debian 13, with an application's environment of many values."""
    found = stack.first(request.param)
    text = "".join(f"{name}={filters.systemd_quoted(value)}\n" for name, value in environment().items())
    found.check_output(f"[ ! -e {FILE} ] || cp --archive {FILE} {KEPT}")
    found.check_output(f"printf %s {quote(text)} >{KEPT}.test")
    yield found
    found.check_output(f"[ ! -e {KEPT} ] || mv {KEPT} {FILE}; rm {KEPT}.test")


def test_a_unit_reads_every_value_as_it_was_set(host: Host) -> None:
    """In one file, so that none spoils another."""
    said = host.check_output(
        f"systemd-run --quiet --wait --pipe --property=EnvironmentFile={KEPT}.test python3 -c {quote(SHOW)}"
    )
    assert json.loads(said) == environment()


def test_hothouse_run_hands_on_every_value_as_it_was_set(host: Host) -> None:
    if not host.file("/usr/local/bin/hothouse-run").exists:
        return  # no host of the application
    host.check_output(f"cat {KEPT}.test >{FILE}")
    assert json.loads(host.check_output(f"hothouse-run python -c {quote(SHOW)}")) == environment()
