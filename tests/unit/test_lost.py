"""What hosts say of an earlier run, before credentials are generated."""

from __future__ import annotations

import base64
import random
from typing import Any

from conftest import load_plugin
from test_hothouse_credentials import run

filters = load_plugin("filter/hothouse")


def answer(item: str, *lines: str, **result: Any) -> dict[str, Any]:
    return {"item": item, "stdout_lines": list(lines), **result}


def authority(text: str) -> str:
    return f"authority {base64.b64encode(text.encode()).decode()}"


def test_hosts_are_new_deployed_or_silent() -> None:
    found = filters.lost_credentials(
        [
            answer("new", "Welcome!", "asked"),
            answer("old", "credential redis_admin", " credential host_key\r", authority("x"), "asked\r"),
            answer("cut", "credential redis_admin"),
            {"item": "away", "unreachable": True, "msg": "no route"},
            {"item": "left out", "skipped": True},
        ]
    )
    assert found == {"hosts": ["old", "cut"], "authorities": {"old": "x"}, "silent": ["cut", "away"]}


def test_a_host_of_another_environment_is_named(tmp_path: Any) -> None:
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
    own, _ = run("", tmp_path / "own")
    other, _ = run("", tmp_path / "other")

    def fault(*lines: str) -> str:
        return str(filters.authority_fault(list(lines), own, "redis1", "credentials.yml"))

    assert fault() == fault("os debian 13") == fault(authority(own["ca_certificate"])) == ""
    assert fault(authority(own["ca_certificate"] + other["ca_certificate"])) == ""
    assert "The host redis1 trusts another authority" in fault("Welcome!", authority(other["ca_certificate"]))


def test_an_answer_that_makes_no_sense_is_none(tmp_path: Any) -> None:
    own, _ = run("", tmp_path)
    line = authority(own["ca_certificate"])
    letters = random.Random(3)
    for end in range(0, len(line), 7):
        torn = line[:end] + letters.choice(("", "=", "\0", "é", "A"))
        assert filters.authority_fault([torn], own, "redis1", "credentials.yml") == ""
