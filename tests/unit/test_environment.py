"""app_environment: what is refused, and that containers get the rest as it stands. Hosts: molecule/shared/tests."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from conftest import load_plugin
from environments import environment

preflight = load_plugin("action/hothouse_preflight")
filters = load_plugin("filter/hothouse")


def problems(values: dict[Any, Any]) -> list[str]:
    found = preflight.Problems()
    preflight.check_environment(found, values, {"app_environment": "main.yml:7"})
    return [str(problem) for problem in found]


def test_what_can_be_handed_over_is_let_through() -> None:
    assert (
        problems(
            {**environment(), "NUMBER": 8000, "LD_PRELOAD": "/usr/lib/libjemalloc.so", "CELERY": "x", "_": ""}
        )
        == []
    )


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "A=B", "é", "A\n", 7, None, True])
def test_names_that_no_environment_has_are_refused(name: Any) -> None:
    assert "cannot name an environment variable" in problems({name: "x"})[0]


@pytest.mark.parametrize(
    "name",
    ["PATH", "PYTHONPATH", "HOTHOUSE_APP", "HOTHOUSE_X", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC",
     "LISTEN_FDS", "REMAP_SIGTERM", "WORKER_OPTIONS", "BROKER_URL", "CELERY_BROKER_URL", "CELERY_BROKER_READ_URL",
     "CELERY_RESULT_BACKEND", "RESULT_BACKEND"],
)  # fmt: skip
def test_what_the_deployment_gives_is_not_given_twice(name: str) -> None:
    assert f"app_environment: {name} " in problems({name: "x"})[0]


@pytest.mark.parametrize("value", [None, True, False, 1.5, 1.0, [], ["a"], {}, {"a": 1}])
def test_values_that_are_no_text_are_refused(value: Any) -> None:
    """Whether the application reads `true`, `True` or `1` is for whoever sets it to say."""
    assert "write the text in quotes" in problems({"A": value})[0]


CONTROLS = [chr(number) for number in range(32) if chr(number) not in "\t\n"]
NO_CHARACTERS = ["\x7f", "\ud800", "\udcff", "\ufdd0", "\ufffe", "\uffff", "\U0001fffe", "\U0010ffff"]


@pytest.mark.parametrize("letter", CONTROLS + NO_CHARACTERS, ids=lambda letter: f"{ord(letter):x}")
def test_characters_that_systemd_does_not_take_are_refused(letter: str) -> None:
    assert f"U+{ord(letter):04X}" in problems({"A": f"x{letter}y"})[0]


def test_values_of_several_lines_and_without_an_end_are_refused() -> None:
    assert "has several lines" in problems({"A": "x\ny"})[0]
    assert "bytes that Linux takes" in problems({"A": "ü" * 65536})[0]
    assert problems({"A": "x" * 131069}) == []
    assert "bytes" in problems({"A": "x" * 131070})[0]


def test_compose_gives_a_container_what_stands_there() -> None:
    """As docker-compose reads it: YAML, then `$$` for a `$`; a `$` of its own would be a variable."""
    values = environment()
    text = "".join(
        f"{name}: {filters.yaml_quoted(value.replace('$', '$$'))}\n" for name, value in values.items()
    )
    read = yaml.safe_load(text)
    assert all(re.fullmatch(r"(?:[^$]|\$\$)*", value) for value in read.values())
    assert {name: value.replace("$$", "$") for name, value in read.items()} == values
