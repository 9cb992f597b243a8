"""Who is the primary when nodes start: never one without data, whatever is left on its disk."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from conftest import BUNDLE, load_plugin

filters = load_plugin("filter/hothouse")
NODES = {"r1": "127.0.0.11", "r2": "127.0.0.12", "r3": "127.0.0.13"}
SENTINEL = "sentinel monitor hothouse 127.0.0.12 6379 2"
EMPTY, DATA = "known", "known\ndata"


def said(**lines: str) -> dict[str, Any]:
    """What hosts answered to roles/redis/tasks/primary.yml."""
    return {name: {"stdout_lines": text.splitlines()} for name, text in lines.items()}


def primary(**lines: str) -> str:
    return str(filters.redis_roles(NODES, said(**lines))["primary"])


def test_on_fresh_hosts_the_first_becomes_the_primary() -> None:
    assert filters.redis_roles(NODES, said(r1="", r2="", r3="")) == {
        "primary": "r1",
        "deployed": False,
        "known": [],
    }


def test_the_host_that_has_data_stays_the_primary_wherever_it_stands_in_the_inventory() -> None:
    assert primary(r1="", r2="", r3=DATA) == "r3"
    assert primary(r1="", r2="", r3="data") == "r3"


def test_a_run_that_was_interrupted_goes_on_with_the_same_primary() -> None:
    assert primary(r1="known\nreplicaof 127.0.0.12 6379", r2=EMPTY, r3="") == "r2"


def test_the_later_failover_counts() -> None:
    old = "sentinel monitor hothouse 127.0.0.11 6379 2\nsentinel config-epoch hothouse 9"
    new = f"{SENTINEL}\nsentinel config-epoch hothouse 10"
    assert primary(r1=f"{DATA}\n{old}", r2=f"{DATA}\n{new}", r3=f"{DATA}\n{old}") == "r2"
    # Also with the hosts of --limit alone.
    assert primary(r1=f"{DATA}\n{new}") == "r2"
    # A host whose disk was lost is told what the others know.
    assert filters.redis_roles(NODES, said(r1="", r2=f"{DATA}\n{new}", r3=DATA))["known"] == ["r2", "r3"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({"r1": DATA, "r2": DATA, "r3": ""}, "r1 and r2 have data of their own"),
        ({"r1": "", "r3": ""}, "r2 is not part of this run (--limit?)"),
        (
            {"r1": DATA, "r2": SENTINEL, "r3": ""},
            "r2 for the primary of Redis, but it has no data (a lost disk?)",
        ),
        (
            {"r1": f"{DATA}\nsentinel monitor hothouse 127.0.0.19 6379 2", "r2": DATA, "r3": DATA},
            "127.0.0.19, which is no host of the group `redis` any more",
        ),
    ],
)
def test_a_choice_that_could_cost_data_is_refused(lines: dict[str, str], expected: str) -> None:
    with pytest.raises(AnsibleFilterError) as error:
        primary(**lines)
    assert expected in str(error.value) and "nothing was changed on the redis hosts" in str(error.value)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of the units as r1, alone: of the other nodes nobody answers."""
    path = BUNDLE / "roles/redis/files/hothouse_redis.py"
    spec = importlib.util.spec_from_file_location("hothouse_redis", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"address": NODES["r1"], "port": port, "sentinel_port": port, "tls": False}
    settings["nodes"] = {address: name for name, address in NODES.items()}
    (tmp_path / "redis.json").write_text(json.dumps(settings))
    (tmp_path / "redis_sentinel").write_text("secret\n")
    (tmp_path / "redis_admin").write_text("secret\n")
    for name, value in {"STATE": tmp_path, "CREDENTIALS": tmp_path, "PRIMARY_SECONDS": 0.3}.items():
        monkeypatch.setattr(module, name, value)
    module.__dict__["settings"] = module.Settings(tmp_path / "redis.json")
    return module


def leave(folder: Path, data: bool = False, **files: str) -> None:
    """What is on the disk of the node."""
    if data:
        (folder / "appendonlydir").mkdir()
        (folder / "appendonlydir/appendonly.aof.manifest").write_text("")
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


REPLICA = "include /etc/redis/redis.conf\nreplicaof 127.0.0.13 6379\n"
PRIMARY = "include /etc/redis/redis.conf\n"


@pytest.mark.parametrize(
    ("left", "follows"),
    [
        ({"seed": "primary\n"}, None),
        ({"seed": "replicaof 127.0.0.13 6379\n"}, "127.0.0.13"),
        ({"data": True, "redis_conf": PRIMARY}, None),
        ({"data": True, "redis_conf": REPLICA}, "127.0.0.13"),
        ({"data": False, "redis_conf": REPLICA}, "127.0.0.13"),
        # Its own Sentinel saw a failover while Redis was down.
        ({"data": True, "redis_conf": PRIMARY, "sentinel_conf": SENTINEL}, "127.0.0.12"),
        ({"data": False, "sentinel_conf": SENTINEL}, "127.0.0.12"),
        ({"data": True, "seed": "primary"}, None),
    ],
)
def test_a_node_starts_in_the_role_that_it_remembers(
    node: ModuleType, tmp_path: Path, left: dict[str, Any], follows: str | None
) -> None:
    leave(tmp_path, **left)
    assert node.followed_primary(node.settings) == follows


@pytest.mark.parametrize(
    "left",
    [
        {},
        {"redis_conf": PRIMARY},
        {"sentinel_conf": SENTINEL.replace("127.0.0.12", "127.0.0.11")},
        {"seed": "replicaof 127.0.0.11 6379\n", "sentinel_conf": SENTINEL.replace(".12", ".11")},
        # Data that nobody deployed: they may be anything.
        {"data": True},
    ],
)
def test_a_node_without_data_never_starts_as_the_primary(
    node: ModuleType, tmp_path: Path, left: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, **left)
    with pytest.raises(node.RedisError, match="does not start as an empty primary"):
        node.followed_primary(node.settings)
    assert "waits until the Sentinels have made another node the primary" in capsys.readouterr().err
