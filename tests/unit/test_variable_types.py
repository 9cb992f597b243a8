"""A variable has the type of its specification, wherever its value comes from: what is rendered is the same."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BUNDLE, ansible, load_plugin, render, shipped

types = load_plugin("plugin_utils/hothouse_variable_types")

TYPED = sorted(
    name
    for name, option in types.options().items()
    if option.get("type", "str") != "str" and not name.startswith("compose_")
)


def defaults() -> dict[str, Any]:
    """The defaults of all roles."""
    paths = sorted((BUNDLE / "roles").glob("*/defaults/main.yml"))
    return {name: value for path in paths for name, value in (yaml.safe_load(path.read_text()) or {}).items()}


@cache
def values(inventory: str) -> dict[str, dict[str, Any]]:
    """Host → name → value, of every variable whose type is not `str`."""
    names = "', '".join(TYPED)
    found = f"query('ansible.builtin.vars', '{names}', default='not set')"
    message = f"{{{{ dict(['{names}'] | zip({found})) | to_json }}}}"
    hosts = ansible(
        "ansible", "-i", f"inventories/{inventory}", "all", "-m", "ansible.builtin.debug", "-a", f"msg={message}",
        ANSIBLE_LOAD_CALLBACK_PLUGINS="1",
    )  # fmt: skip
    return {
        host: defaults()
        # What render.yml makes the host say, and what is only given to a single run.
        | {
            "prepare_debian": 12 if host == "local1" else 13,
            "credentials_replace": False,
            "prepare_ipv6": True,
        }
        | {name: value for name, value in json.loads(results[0]["msg"]).items() if value != "not set"}
        for host, results in hosts.items()
    }


def as_strings(value: Any, option: dict[str, Any]) -> Any:
    """The value with everything in it that is no text made one, where the specification says what it is."""
    if isinstance(value, list):
        element = {**option, "type": option.get("elements", "raw")}
        return [as_strings(item, element) for item in value]
    if isinstance(value, dict):
        parts = option.get("options") or {}
        return {key: as_strings(item, parts[key]) if key in parts else item for key, item in value.items()}
    return value if isinstance(value, str) or option["type"] == "raw" else json.dumps(value)


def written(value: Any, option: dict[str, Any], number: int) -> str:
    """The value as a text, in one of the ways in which people write it; `number` chooses."""
    inner = as_strings(value, option)
    if isinstance(value, bool):
        ways = [("yes", "on", "true", "True", "1"), ("no", "off", "false", "False", "0")][not value]
        return ways[number % 5]
    if isinstance(value, list):
        plain = all(isinstance(item, str) and "," not in item for item in inner)
        return [json.dumps(inner), str(inner), ",".join(inner) if plain else json.dumps(inner)][number % 3]
    if isinstance(value, dict):
        return [json.dumps(inner), str(inner)][number % 2]
    return [f"{inner}", f" {inner} "][number % 2]


def strings(found: dict[str, Any], offset: int = 0) -> dict[str, str]:
    return {
        name: written(value, types.options()[name], offset + number)
        for number, (name, value) in enumerate(found.items())
        if name in TYPED
    }


def test_every_typed_option_has_a_value_that_can_be_given_as_a_string() -> None:
    known = {
        name for inventory in ("local", "prod") for found in values(inventory).values() for name in found
    }
    assert set(TYPED) - known == set()
    assert len(TYPED) > 80


def test_extra_variables_that_are_all_strings_render_the_same_files(tmp_path: Path) -> None:
    """One host, whose values may therefore be given to all."""
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps(strings(values("local")["local1"])))
    assert render("-i", "inventories/local", "-e", f"@{extra}") == shipped("local")


def test_a_script_whose_variables_are_all_strings_renders_the_same_files(tmp_path: Path) -> None:
    """Eight hosts, each with values of its own."""
    hosts = {host: strings(found) for host, found in values("prod").items()}
    script = tmp_path / "inventory"
    document = {"all": {"hosts": list(hosts)}, "_meta": {"hostvars": hosts}}
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(document)}\nEND\n")
    script.chmod(0o755)
    assert render("-i", "inventories/prod", "-i", script) == shipped("prod")


def test_templates_that_give_strings_render_the_same_files(tmp_path: Path) -> None:
    """As a look-up in the environment does."""
    texts = strings(values("local")["local1"], 1)
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps({name: f"{{{{ __texts['{name}'] }}}}" for name in texts}))
    source = tmp_path / "texts.json"
    source.write_text(json.dumps({"__texts": texts}))
    arguments = ("-i", "inventories/local", "-e", f"@{extra}", "-e", f"@{source}")
    assert render(*arguments) == shipped("local")


@pytest.mark.parametrize(
    ("value", "option", "converted"),
    [
        ("30", {"type": "int"}, 30),
        (" 30 ", {"type": "int"}, 30),
        ("30.0", {"type": "int"}, 30),
        ("-1", {"type": "int"}, -1),
        ("95", {"type": "float"}, 95),
        ("0.5", {"type": "float"}, 0.5),
        ("FALSE", {"type": "bool"}, False),
        (" on", {"type": "bool"}, True),
        (0, {"type": "bool"}, False),
        (8080, {"type": "str"}, "8080"),
        ("a, b", {"type": "list", "elements": "str"}, ["a", "b"]),
        ("80,443", {"type": "list", "elements": "int"}, [80, 443]),
        (443, {"type": "list", "elements": "int"}, [443]),
        ("", {"type": "list", "elements": "str"}, []),
        ("[]", {"type": "list", "elements": "str"}, []),
        ("[a, 'b']", {"type": "list", "elements": "str"}, ["a", "b"]),
        ('{"a": {"b": [1, true]}}', {"type": "dict"}, {"a": {"b": [1, True]}}),
        ("a=1, b=2", {"type": "dict"}, {"a": "1", "b": "2"}),
        ("{'a': None, 'b': True}", {"type": "dict"}, {"a": None, "b": True}),
        ("", {"type": "dict"}, {}),
        ("1e3", {"type": "int"}, 1000),
        ("30\n", {"type": "int"}, 30),
        ("12345678901234567891", {"type": "int"}, 12345678901234567891),
        ("a,b,", {"type": "list", "elements": "str"}, ["a", "b"]),
        ("a\nb\n", {"type": "list", "elements": "str"}, ["a", "b"]),
        ("- a\n- b\n", {"type": "list", "elements": "str"}, ["a", "b"]),
        ("('a', 'b')", {"type": "list", "elements": "str"}, ["a", "b"]),
        (
            [{"name": 1, "concurrency": "4", "queues": "a,b", "other": "5"}],
            types.options()["worker_pools"],
            [{"name": "1", "concurrency": 4, "queues": ["a", "b"], "other": "5"}],
        ),
    ],
)
def test_a_value_becomes_what_its_specification_says(value: Any, option: Any, converted: Any) -> None:
    found = types.convert(value, option)
    assert found == converted and type(found) is type(converted)


@pytest.mark.parametrize(
    ("value", "option"),
    [
        ("3O", {"type": "int"}),
        ("30.5", {"type": "int"}),
        ("", {"type": "int"}),
        (True, {"type": "int"}),
        ("nan", {"type": "float"}),
        ("inf", {"type": "float"}),
        (False, {"type": "float"}),
        ([30], {"type": "int"}),
        (None, {"type": "int"}),
        (None, {"type": "str"}),
        ([None], {"type": "list", "elements": "str"}),
        ("Infinity", {"type": "int"}),
        ("1e400", {"type": "int"}),
        (float("inf"), {"type": "int"}),
        (float("nan"), {"type": "float"}),
        ("[" * 3000, {"type": "list", "elements": "str"}),
        ("{" * 3000, {"type": "dict"}),
        ("{a: 1, b: 2}", {"type": "list", "elements": "dict"}),
        ("maybe", {"type": "bool"}),
        ("2", {"type": "bool"}),
        ("", {"type": "bool"}),
        ('["a"', {"type": "list", "elements": "str"}),
        ({"a": 1}, {"type": "list", "elements": "str"}),
        (True, {"type": "list", "elements": "str"}),
        ("a,b", {"type": "list", "elements": "dict"}),
        ("{", {"type": "dict"}),
        ("a", {"type": "dict"}),
        (["a"], {"type": "dict"}),
        ({"a": 1}, {"type": "str"}),
        ([{"concurrency": "four"}], types.options()["worker_pools"]),
    ],
)
def test_a_value_that_is_none_of_its_type_is_refused(value: Any, option: Any) -> None:
    with pytest.raises(types.WrongType, match=" is not ") as error:
        types.convert(value, option)
    assert len(str(error.value)) < 300


def test_a_value_of_the_right_type_is_given_back_itself() -> None:
    """It may be one of Ansible's, which knows where it was written."""
    for found in values("prod").values():
        for name, value in found.items():
            if name in TYPED:
                assert types.convert(value, types.options()[name]) is value


def test_roles_that_share_a_variable_agree_on_its_type() -> None:
    for role, names in types.specifications().items():
        for name, option in names.items():
            kinds = {
                option.get("type", "str") in types.CONVERT,
                option.get("elements", "str") in types.CONVERT,
            }
            assert kinds == {True}, (role, name)
            assert option.get("type", "str") == types.options()[name].get("type", "str"), (role, name)


def test_a_secret_of_the_wrong_type_does_not_show() -> None:
    with pytest.raises(types.WrongType) as error:
        types.convert("secret", types.options()["app_credentials"])
    assert types.complaint("app_credentials", error.value) == (
        "`app_credentials` is not a mapping, such as {name: value}"
    )
