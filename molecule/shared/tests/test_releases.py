"""As whom a release runs from its installation on, what its libraries may do, and what a failed installation leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import REPOSITORY, Stack

pytestmark = pytest.mark.scenarios("own-app")
APP = "/opt/hothouse/app"
RECORDER = REPOSITORY / "molecule/own-app/recorder"
UPLOAD = f"hothouse-release-{hashlib.sha256(APP.encode()).hexdigest()[:16]}.zip"
UNIT = "celery-worker@everything-1.service"
WORKERS = f"{UNIT} celery-worker@everything-2.service"


def task(name: str, queue: str) -> str:
    """A command that runs a task through a queue and prints what it returned, as JSON."""
    send = f"h.app.send_task('{name}', queue='{queue}').get(timeout=60)"
    return f'hothouse-run python -c "import json, hothouse_celery as h; print(json.dumps({send}))"'


@pytest.mark.parametrize("queue", ["default", "threads"])
def test_libraries_do_in_the_sandbox_what_they_do_elsewhere(stack: Stack, queue: str) -> None:
    """In a child of a prefork worker and in a thread; what is denied raises and ends nothing."""
    found = json.loads(stack.first("app").check_output(task("tally.use", queue)))
    assert len(found) >= 12
    assert {name: error for name, error in found.items() if error} == {}


def test_a_command_has_the_sandbox_of_the_services(stack: Stack) -> None:
    """Every line of the one drop-in is in force for hothouse-run, and so for the check of a release."""
    host = stack.first("app")
    lines = (REPOSITORY / "roles/prepare/files/10-hardening.conf").read_text().splitlines()
    properties = sorted({line.partition("=")[0] for line in lines if line[:1].isalpha()})
    assert len(properties) > 25
    show = f"systemctl show --property={','.join([*properties, 'SystemCallErrorNumber'])}"
    # The command waits for the answer on its standard input.
    command = f"""
        coproc hothouse-run sh -c 'echo here; read -r answer'
        read -r answer <&"${{COPROC[0]}}"
        {show} "$(systemctl list-units --plain --no-legend 'hothouse-run-*' | cut -d ' ' -f 1)"
        echo >&"${{COPROC[1]}}"
        wait
    """
    assert sorted(host.check_output("bash -c %s", command).splitlines()) == sorted(
        host.check_output(f"{show} {UNIT}").splitlines()
    )


@pytest.fixture(scope="module")
def recorded(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What ran of a release that tells, while it was installed, checked, started and used; as `uid` as whom.

    Before that the host is left as a killed deployment leaves it.
    """
    host = stack.first("app")
    source = shutil.copytree(RECORDER, tmp_path_factory.mktemp("recorder") / "recorder")
    (source / "src/tally/new.py").write_text(f'"""{time.time_ns()}: not on the host yet."""\n')
    before = host.check_output(f"basename $(readlink {APP}/current)")
    host.check_output(
        f"mkdir -p {APP}/.install-killed/wheels {APP}/releases/killed/bin /root/.ansible/tmp/ansible-tmp-killed"
        f" && touch /root/.ansible/tmp/ansible-tmp-killed/{UPLOAD}"
        " && systemd-run --quiet --unit=hothouse-release-opt-hothouse-app.service sleep 1000"
        # Without the monitoring nothing counts what the watchdog does: root does, with the environment of the unit.
        " && mkdir -p /var/lib/prometheus/node-exporter"
    )
    since = host.check_output("date +%s")
    try:
        stack.playbook("playbooks/app.yml", "-e", f"app_source={source}")
        host.check_output(f"systemctl restart {WORKERS}")
        host.check_output("hothouse-run tally-recorder")
        host.check_output(task("tally.recorded", "default"))
        show = f"journalctl --identifier=tally-recorder --since=@{since} --output=json"
        entries = map(json.loads, host.check_output(f"journalctl --sync && {show}").splitlines())
        yield [json.loads(entry["MESSAGE"]) | {"uid": entry["_UID"]} for entry in entries]
    finally:
        stack.playbook("playbooks/app.yml")
        host.check_output(f"rm -r /var/lib/prometheus/node-exporter; systemctl restart {WORKERS}")
    assert host.check_output(f"basename $(readlink {APP}/current)") == before


def test_nothing_of_a_release_runs_as_root(stack: Stack, recorded: list[dict[str, Any]]) -> None:
    host = stack.first("app")
    ways = {(entry["unit"], entry["way"]) for entry in recorded}
    for unit in ("hothouse-release-opt-hothouse-app.service", "hothouse-run-", UNIT):
        assert any(name.startswith(unit) and way == "pth" for name, way in ways), (
            f"{unit} left no trace: {ways}"
        )
    # Debian has a sitecustomize of its own, which Python finds first.
    assert {"pth", "import", "script", "task"} <= {way for _, way in ways}
    release = host.check_output("id -u hothouse-release")
    for entry in recorded:
        assert entry["uid"] != "0", entry
        assert (entry["uid"] == release) == entry["unit"].startswith("hothouse-release"), entry


def test_all_that_runs_of_a_release_is_in_the_sandbox(recorded: list[dict[str, Any]]) -> None:
    for entry in recorded:
        assert entry["capabilities"] == 0 and entry["no_new_privileges"] == "1" and entry["seccomp"] == "2", (
            entry
        )
        assert not entry["namespaces"] and not entry["homes"], entry
        installing = entry["unit"].startswith("hothouse-release")
        assert installing or entry["writable"] == [], entry
        assert not {"/etc/hothouse", "/opt/hothouse"} & set(entry["writable"]), entry


def test_a_release_belongs_to_root_when_it_is_installed(stack: Stack, recorded: list[dict[str, Any]]) -> None:
    host = stack.first("app")
    strange = f"find {APP}/ '(' ! -user root -o ! -group root -o ! -type l -perm /7022 ')'"
    assert host.check_output(strange) == ""
    assert host.check_output("find / -xdev -user hothouse-release -not -path '/proc/*'") == ""


def test_what_a_killed_deployment_left_is_removed_by_the_next(
    stack: Stack, recorded: list[dict[str, Any]]
) -> None:
    host = stack.first("app")
    assert host.check_output(f"ls -A {APP}").split() == [".lock", "current", "previous", "releases"]
    assert not host.file(f"{APP}/releases/killed").exists
    assert host.check_output(f"find /root/.ansible/tmp -name {UPLOAD}") == ""
    assert not host.service("hothouse-release-opt-hothouse-app").is_running


def ask(stack: Stack, *words: str, **options: Any) -> str:
    """What Ansible says of a task hothouse_release with the recorder, alone, at a path of its own."""
    asked = {
        "source": str(RECORDER),
        "path": "/mnt/small/app",
        "account": "hothouse-release",
        "sandbox": "/etc/systemd/system/celery-.service.d",
    }
    done = subprocess.run(
        ["ansible", *stack.inventory_options, stack.group("app")[0], "-m", "hothouse_release", "-a",
         json.dumps(asked | options), *words],
        cwd=REPOSITORY, env=stack.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def small(stack: Stack) -> Iterator[Callable[[str], None]]:
    """Mounts a file system of a size at /mnt/small."""
    host = stack.first("app")

    def mount(options: str) -> None:
        host.check_output(f"mkdir -p /mnt/small && mount -t tmpfs -o {options} tmpfs /mnt/small")

    yield mount
    host.check_output("umount /mnt/small && rmdir /mnt/small")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size=40m", "/mnt/small/app on this host has 40 MB free, the release needs"),
        ("size=400m,nr_inodes=300", "inodes free, the release needs"),
    ],
)
def test_a_release_for_which_there_is_no_room_is_not_sent(
    stack: Stack, small: Callable[[str], None], options: str, message: str
) -> None:
    small(options)
    said = ask(stack)
    assert message in said and "Nothing was sent or installed" in said, said
    assert stack.first("app").check_output("find /mnt/small/app -mindepth 1") == "/mnt/small/app/.lock"


def test_an_installation_that_fails_leaves_nothing(stack: Stack, small: Callable[[str], None]) -> None:
    """Its check does not succeed: in the sandbox no home can be seen."""
    small("size=400m")
    said = ask(stack, check=["/usr/bin/ls", "/root"])
    assert (
        "The check of release" in said
        and "Permission denied" in said
        and "removed from the host again" in said
    ), said
    host = stack.first("app")
    assert host.check_output("cd /mnt/small/app && find . -mindepth 1 | sort").split() == [
        "./.lock",
        "./releases",
    ]
    assert host.check_output("find /root/.ansible/tmp -name 'hothouse-release-*'") == ""


def test_what_a_user_adds_to_the_sandbox_holds_for_commands(stack: Stack) -> None:
    host = stack.first("app")
    own = "/etc/systemd/system/celery-.service.d/20-own.conf"
    assert host.check_output("hothouse-run sh -c umask") == "0077"
    host.check_output(f"printf '[Service]\\nUMask=0027\\n' >{own}")
    try:
        assert host.check_output("hothouse-run sh -c umask") == "0027"
    finally:
        host.check_output(f"rm {own}")
