"""hothouse_units: what is planned for which state, and what is refused. Real units are Molecule's subject."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Play, load_plugin

units = load_plugin("modules/hothouse_units")
Runner = Callable[..., Play]

# Recorded on Debian 13 (systemd 257). Debian 12 (252) prints the same keys.
SHOWN = {
    "ssh.service": """\
Type=notify
Result=success
Id=ssh.service
Names=ssh.service sshd.service
LoadState=loaded
ActiveState=active
SubState=running
UnitFileState=enabled
InactiveExitTimestamp=Sun 2026-11-22 09:38:56.603104 UTC
NeedDaemonReload=no
""",
    "celery-worker@default.service": """\
Type=notify
Result=exit-code
Id=celery-worker@default.service
Names=celery-worker@default.service
LoadState=loaded
ActiveState=activating
SubState=auto-restart
UnitFileState=enabled
InactiveExitTimestamp=Sun 2026-11-22 09:49:19.900792 UTC
NeedDaemonReload=no
""",
    "celery-worker@c.service": """\
Type=simple
Result=exit-code
Id=celery-worker@c.service
Names=celery-worker@c.service
LoadState=loaded
ActiveState=failed
SubState=failed
UnitFileState=enabled
NeedDaemonReload=yes
""",
    "flower.service": """\
Type=notify
Result=success
Id=flower.service
Names=flower.service
LoadState=loaded
ActiveState=inactive
SubState=dead
UnitFileState=disabled
InactiveExitTimestamp=
NeedDaemonReload=no
""",
    "ssh.socket": """\
Result=success
Id=ssh.socket
Names=ssh.socket
LoadState=masked
ActiveState=inactive
SubState=dead
UnitFileState=masked
InactiveExitTimestamp=
NeedDaemonReload=no
""",
    "nginx.service": """\
Type=
Result=success
Id=nginx.service
Names=nginx.service
LoadState=not-found
ActiveState=inactive
SubState=dead
UnitFileState=
InactiveExitTimestamp=
NeedDaemonReload=no
""",
    "systemd-journald.service": """\
Type=notify
Result=success
Id=systemd-journald.service
Names=systemd-journald.service
LoadState=loaded
ActiveState=active
SubState=running
UnitFileState=static
InactiveExitTimestamp=Sun 2026-11-22 09:38:56.133363 UTC
NeedDaemonReload=no
""",
    "dpkg-db-backup.timer": """\
Result=success
Id=dpkg-db-backup.timer
Names=dpkg-db-backup.timer
LoadState=loaded
ActiveState=active
SubState=waiting
UnitFileState=enabled
InactiveExitTimestamp=Sun 2026-11-22 09:38:56.552543 UTC
NeedDaemonReload=no
""",
    "dpkg-db-backup.service": """\
Type=oneshot
Result=success
Id=dpkg-db-backup.service
Names=dpkg-db-backup.service
LoadState=loaded
ActiveState=inactive
SubState=dead
UnitFileState=static
InactiveExitTimestamp=Sun 2026-11-22 09:45:12.564050 UTC
NeedDaemonReload=no
""",
}
LISTED = """\
celery-worker@default.service loaded    activating auto-restart celery-worker@default.service
celery-worker@gone.service    not-found failed     failed       celery-worker@gone.service
celery-worker@old.service     loaded    active     running      Celery worker (old)
celery-worker@idle.service    not-found inactive   dead         celery-worker@idle.service
"""
STATUSES = units.parse_show("\n".join(SHOWN.values()), list(SHOWN))


def unit(name: str, state: str | None = None, enabled: Any = None, **options: Any) -> dict[str, Any]:
    """A unit as the module gets it."""
    return {
        "name": name,
        "state": state,
        "enabled": enabled,
        "restart_after": None,
        "reload_after": None,
        **options,
    }


def actions(*wanted: dict[str, Any]) -> list[str]:
    """What is planned for these units."""
    return units.make_plan(wanted, STATUSES).actions()


def test_the_status_of_each_unit_is_read_under_the_name_it_was_asked_by() -> None:
    found = units.parse_show(
        SHOWN["ssh.service"] + "\n" + SHOWN["nginx.service"], ["sshd.service", "nginx.service"]
    )
    ssh, nginx = found["sshd.service"], found["nginx.service"]
    assert ssh.running and ssh.enabled and not ssh.missing
    assert ssh.names == {"ssh.service", "sshd.service"}
    assert nginx.missing and nginx.stopped and not nginx.enabled
    with pytest.raises(units.UnitsError, match="answered for 1 units, not for 2"):
        units.parse_show(SHOWN["ssh.service"], ["ssh.service", "nginx.service"])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (unit("ssh.service", "started", True), []),
        (unit("ssh.service"), []),
        (unit("ssh.service", "stopped", False), ["disable ssh.service", "stop ssh.service"]),
        (unit("ssh.service", "restarted"), ["restart ssh.service"]),
        (unit("ssh.service", "reloaded"), ["reload ssh.service"]),
        (unit("flower.service", "started", True), ["enable flower.service", "start flower.service"]),
        (unit("flower.service", "reloaded"), ["start flower.service"]),
        (unit("flower.service", "restarted"), ["restart flower.service"]),
        (unit("flower.service", "stopped", False), []),
        (unit("nginx.service", "started", True), ["enable nginx.service", "start nginx.service"]),
        (unit("nginx.service", "stopped", False), []),
        (unit("dpkg-db-backup.timer", "started", True), []),
        (unit("systemd-journald.service", "started", False), []),
    ],
)
def test_only_what_differs_is_planned(wanted: dict[str, Any], expected: list[str]) -> None:
    assert actions(wanted) == expected


@pytest.mark.parametrize("name", ["celery-worker@c.service", "celery-worker@default.service"])
def test_a_failed_unit_and_one_waiting_for_its_restart_are_not_started(name: str) -> None:
    assert actions(unit(name, "started")) == [f"reset-failed {name}", f"start {name}"]
    assert actions(unit(name, "restarted")) == [f"reset-failed {name}", f"restart {name}"]


def test_a_unit_waiting_for_its_restart_is_not_stopped_either_but_a_failed_one_is() -> None:
    assert actions(unit("celery-worker@default.service", "stopped")) == ["stop celery-worker@default.service"]
    assert actions(unit("celery-worker@c.service", "stopped")) == []


def test_units_with_the_same_step_share_one_call() -> None:
    plan = units.make_plan(
        [unit("flower.service", "started", True), unit("nginx.service", "started", True)], STATUSES
    )
    both = ["flower.service", "nginx.service"]
    assert plan.steps() == [("enable", both), ("start", both)]


def test_a_running_unit_is_restarted_when_what_it_read_at_its_start_is_newer(tmp_path: Path) -> None:
    ssh = STATUSES["ssh.service"]
    assert ssh.started == pytest.approx(1795340336.603104)
    path = tmp_path / "conf"
    wanted = unit("ssh.service", "started", restart_after=[str(tmp_path / "missing"), str(path)])
    assert actions(wanted) == []
    path.touch()
    os.utime(path, (0, 0))  # the time that a package or an archive writes on a file says nothing
    changed = path.stat().st_ctime
    earlier, later = (replace(ssh, started=changed + seconds) for seconds in (-1, 1))
    times = units.Systemd().changed(wanted["restart_after"])
    assert times == {str(path): changed}
    assert units.make_plan([wanted], {"ssh.service": earlier}, times).actions() == ["restart ssh.service"]
    assert units.make_plan([wanted], {"ssh.service": later}, times).actions() == []


def test_an_automatic_restart_is_a_start_too() -> None:
    """systemd does not call a unit inactive that waits for it, so the time of leaving that state stays the old one."""
    at = "Sun 2026-11-22 {}:00:00.000000 UTC".format
    text = f"Id=a.service\nInactiveExitTimestamp={at('09')}\nExecMainStartTimestamp={at('10')}\n"
    assert units.parse_show(text, ["a.service"])["a.service"].started == units.parse_timestamp(at("10"))


def test_a_running_unit_is_reloaded_when_what_it_read_last_is_newer() -> None:
    nginx = replace(STATUSES["ssh.service"], started=100.0, loaded=200.0)
    wanted = unit("ssh.service", "started", reload_after=["/etc/a"])
    for time, expected in ((150.0, []), (250.0, ["reload ssh.service"])):
        assert units.make_plan([wanted], {"ssh.service": nginx}, {"/etc/a": time}).actions() == expected
    both = unit("ssh.service", "started", reload_after=["/etc/a"], restart_after=["/etc/b"])
    changed = {"/etc/a": 250.0, "/etc/b": 250.0}
    assert units.make_plan([both], {"ssh.service": nginx}, changed).actions() == ["restart ssh.service"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (unit("ssh.service", "started", True), False),
        (unit("ssh.service", "restarted"), False),
        (unit("celery-worker@c.service"), True),
        (unit("nginx.service", "started"), True),
        (unit("nginx.service", enabled=True), True),
        (unit("nginx.service", "stopped", False), False),
    ],
)
def test_systemd_reads_its_files_again_when_it_has_to(wanted: dict[str, Any], expected: bool) -> None:
    assert units.needs_reload([wanted], STATUSES) is expected


class Recorder(units.Systemd):
    """Notes the verbs that the module would call; every unit is in the state it is led to."""

    def __init__(self) -> None:
        self.verbs: list[str] = []

    def call(self, *words: str, check: bool = True) -> str:
        self.verbs.append(words[0])
        return ""

    def show(self, names: list[str]) -> Any:
        started = {"start", "restart"} & set(self.verbs)
        return {name: STATUSES["ssh.service" if started else name] for name in names}


@pytest.mark.parametrize(
    ("wanted", "verbs"),
    [
        (unit("flower.service", "started"), ["daemon-reload", "start"]),
        (unit("ssh.service", "restarted"), ["daemon-reload", "restart"]),
        (unit("ssh.service", "started"), []),
        (unit("ssh.service", "reloaded"), ["reload"]),
        (unit("flower.service", enabled=True), ["enable"]),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_systemd_reads_its_files_again_before_every_start_because_it_overlooks_new_folders_of_drop_ins(
    wanted: dict[str, Any], verbs: list[str], check: bool
) -> None:
    systemd = Recorder()
    result = units.run({"units": [wanted], "exclusive": None}, check, False, systemd)
    assert systemd.verbs == ([] if check else verbs)
    assert ("daemon-reload" in result["actions"]) == ("daemon-reload" in verbs)


def test_a_reload_that_failed_is_tried_again_by_the_next_run(tmp_path: Path) -> None:
    """systemd moves the time of the unit's state either way."""

    class Refusing(Recorder):
        def call(self, *words: str, check: bool = True) -> str:
            if words[0] == "reload":
                raise units.UnitsError("it cannot")
            return super().call(*words, check=check)

    file = tmp_path / "users.acl"
    file.touch()
    wanted = unit("ssh.service", "started", reload_after=[str(file), str(tmp_path / "missing")])
    before = file.lstat().st_ctime
    with pytest.raises(units.UnitsError, match="it cannot"):
        units.run({"units": [wanted], "exclusive": None}, False, False, Refusing())
    assert file.lstat().st_ctime > before


def test_reading_files_again_is_no_change_of_its_own() -> None:
    assert not units.Plan(reload_daemon=True).changed
    assert units.Plan(reload_daemon=True).actions() == ["daemon-reload"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (unit("nginx.service", "started"), "nginx.service: systemd finds no such unit"),
        (
            unit("ssh.socket", enabled=True),
            "ssh.socket: is masked; undo that with: systemctl unmask ssh.socket",
        ),
        (unit("systemd-journald.service", enabled=True), "systemd-journald.service: cannot be enabled"),
        (unit("nginx.service", "stopped", False), None),
        (unit("systemd-journald.service", "started"), None),
    ],
)
def test_what_cannot_be_done_is_told_with_its_reason(wanted: dict[str, Any], message: str | None) -> None:
    problem = units.impossible([wanted], STATUSES)
    assert problem is None if message is None else problem.startswith(message)


def test_exclusive_ends_what_is_loaded_or_enabled_and_not_listed() -> None:
    plan = units.Plan()
    links = [
        "celery-worker@default.service",
        "celery-worker@enabled-only.service",
        "celery-worker@old.service",
    ]
    units.add_extras(plan, {"celery-worker@default.service"}, units.parse_list(LISTED), links)
    assert plan.actions() == [
        "disable celery-worker@enabled-only.service",
        "disable celery-worker@old.service",
        "stop celery-worker@old.service",
        "reset-failed celery-worker@gone.service",
    ]
    assert plan.changed


def test_exclusive_keeps_a_unit_that_is_listed_by_its_other_name() -> None:
    plan = units.Plan()
    loaded = units.parse_list("ssh.service loaded active running OpenBSD Secure Shell server\n")
    units.add_extras(plan, set(STATUSES["ssh.service"].names), loaded, ["sshd.service"])
    assert plan.actions() == []


def test_enabled_instances_are_found_by_their_links_even_dangling_ones(tmp_path: Path) -> None:
    wants = tmp_path / "multi-user.target.wants"
    wants.mkdir()
    for name in ("celery-worker@old.service", "flower.service"):
        (wants / name).symlink_to("/nowhere")
    (tmp_path / "celery-worker@.service").touch()
    assert units.find_links(tmp_path, ["celery-worker@*.service"]) == {"celery-worker@old.service"}


@pytest.mark.parametrize(
    ("verb", "name", "expected"),
    [
        ("start", "ssh.service", True),
        ("start", "celery-worker@default.service", False),
        ("restart", "celery-worker@c.service", False),
        ("start", "flower.service", False),
        ("start", "dpkg-db-backup.service", True),
        ("stop", "flower.service", True),
        ("stop", "ssh.service", False),
    ],
)
def test_a_verb_has_worked_when_the_unit_is_in_the_state_it_leads_to(
    verb: str, name: str, expected: bool
) -> None:
    assert units.arrived(verb, STATUSES[name]) is expected


def test_the_diff_shows_states_and_in_check_mode_the_plan() -> None:
    plan = units.make_plan([unit("flower.service", "started", True)], STATUSES)
    predicted = units.make_diff(plan, ["flower.service"], STATUSES, None)
    assert predicted["before"] == {"flower.service": "disabled, inactive (dead)"}
    assert predicted["after"] == {"flower.service": "disabled, inactive (dead), to enable and start"}
    done = units.make_diff(plan, ["flower.service"], STATUSES, {"flower.service": STATUSES["ssh.service"]})
    assert done["after"] == {"flower.service": "enabled, active (running)"}
    assert units.describe(STATUSES["nginx.service"]) == units.describe(None) == "not there"


@pytest.mark.parametrize(
    ("wanted", "globs", "message"),
    [
        ([unit("nginx")], [], "'nginx' is not the name of a unit; write it in full, such as nginx.service"),
        ([unit("a@.service")], [], "'a@.service' is not the name of a unit; name the instance"),
        ([unit("a.service/x")], [], "'a.service/x' is not the name of a unit"),
        ([unit("a.service"), unit("a.service")], [], "a.service: is in the list twice"),
        ([unit("a.service", enabled="maybe")], [], "a.service: enabled must be true or false, not 'maybe'"),
        ([], ["*.service"], "exclusive: '*.service' is too wide"),
        ([], ["celery-worker@*"], "exclusive: 'celery-worker@*' is too wide"),
    ],
)
def test_nonsense_is_refused(wanted: list[dict[str, Any]], globs: list[str], message: str) -> None:
    with pytest.raises(units.UnitsError) as caught:
        units.check_units(wanted, globs)
    assert str(caught.value).startswith(message)


def test_bad_arguments_end_in_one_clear_message(play: Runner) -> None:
    cases = [
        ({"units": [unit("a.service", "start")]}, "a.service: state must be one of started, stopped"),
        ({"units": [{"name": "a.service", "enable": True}]}, "Unsupported parameters"),
        ({"units": [{"state": "started"}]}, "missing required arguments: name found in units"),
    ]
    run = play([{"hothouse_units": wanted, "ignore_errors": True} for wanted, _ in cases])
    for result, (_, message) in zip(run.results, cases, strict=True):
        assert result["failed"]
        assert message in result["msg"]
