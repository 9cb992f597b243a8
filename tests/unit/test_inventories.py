"""Inventories of any kind, runs of a part, and runs from elsewhere: they work, or one message says what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import BUNDLE, ENVIRONMENT, load_plugin
from test_preflight import Inventory

types = load_plugin("plugin_utils/hothouse_variable_types")

INI = """\
[redis]
h1 ansible_host=192.0.2.1 flower_port=5557 app_extra_queues='["more"]'

[worker]
h1
[beat]
h1
[app:children]
worker
beat

[flower]
h1
[nginx]
h1

[all:vars]
nginx_hsts=false
beat_lock_seconds = 40
worker_pools=[{"name": "all", "queues": "default,email_senders,more", "concurrency": "4"}]
"""
GROUPS = {
    **{noun: {"hosts": ["h1"]} for noun in ("redis", "worker", "beat", "flower", "nginx")},
    "app": {"children": ["worker", "beat"]},
}
VALUES = {"flower_port": "5557", "nginx_hsts": "no", "beat_lock_seconds": "40", "app_extra_queues": "more"}
VALUES |= {"worker_pools": json.dumps([{"name": "all", "queues": ["default", "email_senders", "more"]}])}


def as_ini(folder: Path) -> None:
    (folder / "hosts").write_text(INI)


def as_script(folder: Path) -> None:
    document = GROUPS | {"_meta": {"hostvars": {"h1": VALUES | {"ansible_host": "192.0.2.1"}}}}
    (folder / "hosts.py").write_text(f"#!/usr/bin/env python3\nprint({json.dumps(document)!r})\n")
    (folder / "hosts.py").chmod(0o755)


def as_json(folder: Path) -> None:
    children = {noun: {"hosts": {"h1": {}}} for noun in GROUPS if noun != "app"}
    children["app"] = {"children": {"worker": {}, "beat": {}}}
    document = {"all": {"hosts": {"h1": VALUES | {"ansible_host": "192.0.2.1"}}, "children": children}}
    (folder / "hosts.json").write_text(json.dumps(document))


def as_plugins(folder: Path) -> None:
    """A folder of several files, of which two are the settings of plugins, and notes."""
    generator = {
        "plugin": "ansible.builtin.generator",
        "hosts": {"name": "h{{ number }}", "parents": [{"name": "machines"}]},
        "layers": {"number": [1]},
    }
    (folder / "1.yml").write_text(yaml.safe_dump(generator))
    (folder / "2.ini").write_text("h1 ansible_host=192.0.2.1 flower_port=5557\n")
    groups = {noun: "inventory_hostname == 'h1'" for noun in GROUPS}
    composed = {"plugin": "ansible.builtin.constructed", "groups": groups, "strict": True}
    composed["compose"] = {name: repr(value) for name, value in VALUES.items()}
    (folder / "3.yaml").write_text(yaml.safe_dump(composed))
    (folder / "notes.txt").write_text("Not an inventory.\n")


def checked(inventory: Inventory, *words: str) -> str:
    done = inventory.check(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    """A copy of staging without its hosts; its group_vars lie beside what a test writes."""
    copy = Inventory(tmp_path / "inventories")
    (copy.path / "hosts.yml").unlink()
    main = yaml.safe_load((copy.path / "group_vars/all/main.yml").read_text())
    del main["worker_pools"]
    (copy.path / "group_vars/all/main.yml").write_text(yaml.safe_dump(main))
    return copy


@pytest.mark.parametrize("write", [as_ini, as_script, as_json, as_plugins])
def test_inventories_of_every_kind_are_ready_and_have_types(
    inventory: Inventory, write: Callable[[Path], None]
) -> None:
    write(inventory.path)
    checked(inventory)
    message = (
        "{{ [flower_port, nginx_hsts, beat_lock_seconds, app_queues, worker_pools[0].queues | length] }}"
    )
    done = subprocess.run(
        ["ansible", "-i", inventory.path, "h1", "-m", "ansible.builtin.debug", "-a", f"msg={message}"],
        cwd=BUNDLE, env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = yaml.safe_load(done.stdout.partition("=>")[2])["msg"]
    assert found == [5557, False, 40, ["default", "email_senders", "more"], 3]


def test_a_value_in_an_ini_file_is_refused_with_its_line(inventory: Inventory) -> None:
    (inventory.path / "hosts").write_text(INI.replace("lock_seconds = 40", "lock_seconds = soon"))
    message = inventory.refusal()
    line = INI[: INI.index("beat_lock_seconds")].count("\n") + 1
    assert (
        f"`beat_lock_seconds`: 'soon' is not a whole number (host `h1`) where: {inventory.path}/hosts:{line} "
        in message
    )
    assert "mend: see roles/beat/README.md" in message


def test_a_value_on_the_command_line_is_refused_as_such(inventory: Inventory) -> None:
    as_ini(inventory.path)
    message = inventory.refusal("-e", "app_releases_kept=many", "-e", "private_tls=perhaps")
    for name, fault in (
        ("app_releases_kept", "'many' is not a whole number"),
        ("private_tls", "'perhaps' is not true or"),
    ):
        assert f"`{name}`: {fault}" in message
    assert message.count("where: -e or --extra-vars of this run") == 2 * message.count("1. ")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("hosts.yml", "all:\n  hosts: [\n", "hosts.yml:3:1 cannot be read as YAML"),
        ("hosts.yml", "", "hosts.yml cannot be read as YAML"),
        ("hosts.yml", "all: {children: {redis: {}}}\n", "names no host"),
        ("hosts.yml", "plugin: nothing\n", "unknown plugin 'nothing'"),
        ("hosts.ini", "[redis\nh1\n", "hosts.ini cannot be read as INI"),
        ("hosts.ini", "", "names no host"),
        ("hosts.json", "{", "hosts.json cannot be read as YAML"),
        ("hosts.toml", "[", "hosts.toml cannot be read as TOML"),
        ("hosts.sh", "#!/bin/sh\necho sorry; exit 3\n", "returned non-zero exit code 3"),
        ("hosts.sh", "#!/bin/sh\necho sorry\n", "could not be parsed as JSON"),
    ],
)  # fmt: skip
def test_an_inventory_that_cannot_be_read_or_is_empty_ends_the_run_with_one_message(
    inventory: Inventory, name: str, text: str, reason: str
) -> None:
    path = inventory.path / name
    path.write_text(text)
    path.chmod(0o755 if name.endswith(".sh") else 0o644)
    done = inventory.check()
    said = done.stdout + done.stderr
    assert done.returncode == 4 and "PLAY" not in said, said
    assert said.startswith("[ERROR]: The inventory") and reason in said
    assert said.count("[ERROR]") == 1 and "[WARNING]" not in said, said
    assert "mend:" in said and "Nothing was touched." in said


@pytest.mark.parametrize(
    ("name", "text", "reason", "mend"),
    [
        (
            "group_vars/all/x.yml",
            "a: [\n",
            "x.yml:2:1 cannot be read: YAML parsing failed",
            "correct the file",
        ),
        ("group_vars/redis/x.yaml", "a:\n\tb: 1\n", "x.yaml:2:1 cannot be read: YAML", "correct the file"),
        ("group_vars/worker.yml", "- a\n", "worker.yml cannot be read: it is no mapping", "correct the file"),
        ("host_vars/h1", "text\n", "h1 cannot be read: it is no mapping", "correct the file"),
        ("host_vars/h1.json", "{", "h1.json", "correct the file"),
        ("group_vars/all/x.yml", "$ANSIBLE_VAULT;1.1;AES256\n3333\n", "x.yml cannot be read", types.UNLOCK),
        ("hosts.yml", "$ANSIBLE_VAULT;1.1;AES256\n3333\n", "hosts.yml cannot be read as YAML", types.UNLOCK),
    ],
)
def test_variables_that_cannot_be_read_end_the_run_with_one_message(
    inventory: Inventory, name: str, text: str, reason: str, mend: str
) -> None:
    as_ini(inventory.path)
    path = inventory.path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    done = inventory.check()
    assert done.returncode == 4 and "PLAY" not in done.stdout and done.stderr.count("[ERROR]") == 1, (
        done.stderr
    )
    assert reason in done.stderr and f"mend:  {mend}\nNothing was touched." in done.stderr


@pytest.mark.parametrize("words", ["@nowhere.yml", "@ansible.cfg", "./hosts.yml"])
def test_extra_variables_that_cannot_be_read_are_not_blamed_on_the_inventory(
    inventory: Inventory, words: str
) -> None:
    as_ini(inventory.path)
    done = inventory.check("-e", words)
    assert done.returncode == 4 and done.stderr.count("[ERROR]") == 1, done.stderr
    assert "[ERROR]: -e or --extra-vars cannot be read" in done.stderr and "mend:  give NAME=" in done.stderr


def test_an_inventory_that_is_not_there_ends_the_run(inventory: Inventory) -> None:
    inventory.path = inventory.path / "nowhere"
    done = inventory.check()
    assert done.returncode == 4 and f"The inventory {inventory.path} does not exist" in done.stderr


def tasks(*words: str) -> dict[str, list[str]]:
    """Play → its tasks that would run, without the checks of arguments."""
    done = subprocess.run(
        ["ansible-playbook", "-i", "inventories/prod", "site.yml", "--list-tasks", *words],
        cwd=BUNDLE, env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("  play #"):
            found[line.partition("): ")[2].partition("\t")[0]] = play = []
        elif "TAGS:" in line and "Validating arguments" not in line:
            play.append(line.partition("\t")[0].strip())
    return found


def test_every_noun_has_its_tag() -> None:
    for entry in yaml.safe_load((BUNDLE / "site.yml").read_text()):
        path = BUNDLE / entry["import_playbook"]
        (play,) = yaml.safe_load(path.read_text())
        assert play["tags"] == (["always", "prepare"] if path.stem == "prepare" else path.stem)


def test_a_tag_runs_one_noun_after_the_checks_and_skipping_it_the_others() -> None:
    everything = tasks()
    checks = "Check the inventory and prepare the hosts"
    assert len(everything[checks]) > 10 and len(everything["Run Redis"]) > 5
    whole = {checks, "Run Redis"}
    assert tasks("--tags", "redis") == {
        play: found if play in whole else [checks] for play, found in everything.items()
    }
    assert tasks("--skip-tags", "redis") == everything | {"Run Redis": []}


@pytest.mark.parametrize(
    ("playbook", "words", "reason"),
    [
        ("site.yml", ["--tags", "redsi"], "no part of a run has the tag redsi"),
        (
            "site.yml",
            ["--tags", "redis,flowr", "--tags", "Worker"],
            "no part of a run has the tag Worker, flowr",
        ),
        ("site.yml", ["--skip-tags", "flowr"], "no part of a run has the tag flowr"),
        ("site.yml", ["--skip-tags", "always"], "would leave out the checks and the credentials"),
        ("site.yml", ["--skip-tags", "all"], "would leave out the checks and the credentials"),
        ("playbooks/redis.yml", ["--start-at-task", "Write the files"], "leaves out the checks"),
        ("playbooks/check.yml", ["--tags", "redis"], "playbooks/check.yml has no tags"),
        ("playbooks/remove.yml", ["--skip-tags", "redis"], "playbooks/remove.yml has no tags"),
        ("playbooks/recover.yml", ["--tags", "always"], "playbooks/recover.yml has no tags"),
    ],
)
def test_options_that_would_run_nothing_or_leave_out_the_checks_are_refused(
    inventory: Inventory, playbook: str, words: list[str], reason: str
) -> None:
    as_ini(inventory.path)
    done = inventory.check(*words, playbook=playbook)
    assert done.returncode == 4 and "TASK" not in done.stdout and done.stderr.count("[ERROR]") == 1, (
        done.stdout
    )
    assert reason in done.stderr and "Nothing was touched." in done.stderr and "mend:" in done.stderr
    if "has the tag" in reason:
        assert (
            "app, beat, flower, haproxy, mail, monitor, nginx, prepare, redis, verify, worker" in done.stderr
        )


def test_a_playbook_checks_the_inventory_whatever_the_tags(inventory: Inventory) -> None:
    as_ini(inventory.path)
    message = inventory.refusal("--tags", "app", "-e", "redis_port=none", playbook="playbooks/redis.yml")
    assert "`redis_port`: 'none' is not a whole number" in message


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a run from elsewhere needs of the bundle."""
    folder = tmp_path / "checkout"
    for name in ("playbooks", "plugins", "roles", "transport"):
        ignored = shutil.ignore_patterns("__pycache__", ".venv", "tests")
        shutil.copytree(BUNDLE / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("ansible.cfg", "site.yml"):
        shutil.copy(BUNDLE / name, folder)
    return folder


@pytest.mark.parametrize("playbook", ["site.yml", "playbooks/app.yml", "playbooks/check.yml"])
def test_a_run_from_another_folder_says_where_to_run_it(
    tmp_path: Path, checkout: Path, playbook: str
) -> None:
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "ANSIBLE_CONFIG"}
    done = subprocess.run(
        ["ansible-playbook", "-i", BUNDLE / "inventories/prod", checkout / playbook],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4 and "TASK" not in done.stdout, done.stdout
    assert done.stderr.count("[ERROR]") == 1
    assert f"where: the run is in {tmp_path}\n    mend:  cd {checkout}\n" in done.stderr


def test_a_folder_that_everybody_may_write_to_is_named(checkout: Path) -> None:
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "ANSIBLE_CONFIG"}
    checkout.chmod(0o777)
    done = subprocess.run(
        ["ansible-playbook", "-i", BUNDLE / "inventories/prod", "site.yml"],
        cwd=checkout, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4 and f"chmod o-w {checkout}" in done.stderr
