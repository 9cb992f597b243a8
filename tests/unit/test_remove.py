"""What a host loses with a noun: the table of playbooks/remove.yml against what the roles write, and against hosts."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BUNDLE, load_plugin

filters = load_plugin("filter/hothouse")
TABLE: dict[str, dict[str, Any]] = yaml.safe_load((BUNDLE / "roles/prepare/vars/remove.yml").read_text())[
    "__prepare_remains"
]
# The host needs its clock, and folders of other packages stay.
STAYS = {"/etc/chrony", "/etc/chrony/chrony.conf", "/etc/default/chrony", "/etc/sysusers.d"}
NOUNS = {
    "monitor": ["monitor_node", "monitor_redis", "monitor_nginx", "monitor_server"],
    "nginx": ["nginx", "nginx_acme"],
    "prepare": ["celery", "tls", "host"],
}


def patterns(noun: str) -> list[str]:
    entry = TABLE[noun]
    return [entry["marker"], *entry.get("files", []), *entry.get("data", [])]


def covered(path: str, nouns: list[str]) -> bool:
    """Whether a path, or a folder that it is in, goes with one of these nouns or with the host."""
    globs = [glob for noun in {*nouns, "celery", "host"} for glob in patterns(noun)]
    return any(
        fnmatch.fnmatchcase(str(part), glob) for part in (Path(path), *Path(path).parents) for glob in globs
    )


def written(role: str) -> set[str]:
    """Every path that a role puts on a host; an expression in it may become any text."""
    texts = [path.read_text() for path in (BUNDLE / "roles" / role).glob("vars/main.yml")]
    texts += [path.read_text() for path in (BUNDLE / "roles" / role).glob("tasks/*.yml")]
    found = re.findall(r"(?:\bpath: |__\w+: )\"?(/(?:etc|opt|usr|var)/[^\s\"']+)", "\n".join(texts))
    return {re.sub(r"\{\{.*?\}\}", "x", path) for path in found}


ROLES = ["app", "beat", "flower", "haproxy", "mail", "monitor", "nginx", "prepare", "redis", "worker"]


@pytest.mark.parametrize("role", ROLES)
def test_everything_that_a_role_writes_goes_with_its_noun(role: str) -> None:
    paths = written(role)
    assert paths
    # A folder of drop-ins is made for them, and may hold others.
    left = {path for path in paths - STAYS if not path.endswith(".d")}
    assert [path for path in sorted(left) if not covered(path, NOUNS.get(role, [role]))] == []


def test_credentials_go_with_the_noun_that_they_are_named_after() -> None:
    for noun in ("app", "beat", "flower", "worker"):
        assert f"/etc/hothouse/credentials/{noun}_*" in patterns(noun)
    assert covered("/etc/hothouse/worker-default-1.env", ["worker"])


def test_no_pattern_is_wide_enough_to_take_what_is_not_ours() -> None:
    for noun in TABLE:
        for pattern in patterns(noun):
            assert pattern.startswith("/") and pattern.count("/") >= 2, pattern
            before = pattern.partition("*")[0]
            assert before == pattern or len(before.rpartition("/")[0]) > len("/var/lib"), pattern
            assert noun == "host" or pattern not in ("/etc/hothouse", "/opt/hothouse"), pattern


def table(root: Path) -> dict[str, dict[str, Any]]:
    """The same table below a folder."""
    return {
        name: {
            **noun,
            "marker": f"{root}{noun['marker']}",
            "files": [f"{root}{path}" for path in noun.get("files", [])],
            "data": [f"{root}{path}" for path in noun.get("data", [])],
        }
        for name, noun in TABLE.items()
    }


def ask(root: Path) -> list[str]:
    """What a host answers whose / is this folder."""
    command = filters.remains_command(table(root))
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def make(root: Path, *nouns: str) -> None:
    """Everything that these nouns have."""
    for noun in nouns:
        for path in patterns(noun):
            file = Path(f"{root}{path.replace('*', 'some-1')}")
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.write_text("")


@pytest.mark.parametrize("noun", sorted(set(TABLE) - {"tls", "host"}))
def test_a_noun_that_is_lost_goes_alone_and_its_marker_last(tmp_path: Path, noun: str) -> None:
    others = sorted(set(TABLE) - {"tls", "host", noun})
    make(tmp_path, *others)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    make(tmp_path, noun)
    mine = {str(path) for path in tmp_path.rglob("*") if path.is_file()} - {str(path) for path in before}
    found = filters.remains(["Welcome", *ask(tmp_path)], table(tmp_path), [*others, "host", "tls"])
    assert found["nouns"] == [noun]
    assert found["files"][-1]["path"] == f"{tmp_path}{TABLE[noun]['marker']}"
    paths = {entry["path"] for entry in found["files"] + found["data"]}
    assert {entry["state"] for entry in found["files"]} == {"absent"}
    assert mine <= paths
    # /var/lib/private/nginx-acme is nginx' and nginx_acme's.
    assert {path for path in paths - mine if "nginx-acme" not in path} == set()
    assert found["units"] == TABLE[noun].get("units", [])


def test_a_service_of_the_hosts_own_is_none_of_ours(tmp_path: Path) -> None:
    for path in (
        "etc/nginx/nginx.conf",
        "etc/redis/redis.conf",
        "var/lib/redis/dump.rdb",
        "etc/haproxy/haproxy.cfg",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    assert ask(tmp_path) == []


def test_data_are_apart_from_files(tmp_path: Path) -> None:
    make(tmp_path, "redis", "flower")
    found = filters.remains(ask(tmp_path), table(tmp_path), [])
    assert [entry["path"].removeprefix(str(tmp_path)) for entry in found["data"]] == [
        "/var/lib/redis/appendonlydir",
        "/var/lib/redis/some-1.rdb",
        "/var/lib/hothouse/flower",
    ]
    assert not {entry["path"] for entry in found["data"]} & {entry["path"] for entry in found["files"]}


def test_a_host_cannot_name_what_is_not_in_the_table() -> None:
    for line in ("remains unknown /etc/passwd", "remains nginx /etc/passwd"):
        assert filters.remains([line], TABLE, [])["files"] == []
