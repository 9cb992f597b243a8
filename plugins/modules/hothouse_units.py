#!/usr/bin/python
"""Units of a role in one module execution, with few calls of systemctl however many units there are."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: hothouse_units
short_description: Enables, disables, starts and stops a list of systemd units in one execution
version_added: "0.1.0"
description:
  - Does for a whole list of units what M(ansible.builtin.systemd_service) does for one,
    in one module execution. When nothing is to be done no module is executed at all, because the controller asks
    C(systemctl) itself, which costs a fraction.
  - Reloads systemd's configuration when systemd says that a listed unit's files changed, when a listed unit
    is not known to it yet, and before every start and restart.
    That alone does not count as a change.
  - Starts count as done when the unit is active afterwards. A unit in state C(failed), or waiting for its
    automatic restart, is not started. A service of type C(simple), C(exec) or C(idle), which never tells when
    it is ready, is looked at one second after its start.
  - The failure counter of a failed unit is reset before the next try, so that a start limit that was hit does
    not outlive its cause.
  - A unit that could not be started fails the task, with its result and the last lines of its journal in the
    message.
options:
  units:
    description: The units. Names must be different.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Full name with its suffix, such as C(nginx.service) or C(celery-worker@default.service).
        type: str
        required: true
      enabled:
        description: Whether the unit starts with the machine. Left as it is if not given.
        type: bool
      state:
        description:
          - V(started) and V(stopped) do nothing if the unit is so already.
          - V(restarted) always restarts, and V(reloaded) always reloads.
            Both start a unit that is not running, and always report a change.
          - Left as it is if not given.
        type: str
        choices: [started, stopped, restarted, reloaded]
      restart_after:
        description:
          - With V(started), paths that the unit reads only when it starts. A running unit that started before
            one of them last changed is restarted. Unlike a handler's, this restart is not lost when a play
            fails in between, and it sees what an earlier play or another role changed.
          - What counts is when the file was put in place, or its owner or mode changed, not the time written
            on it.
          - A symbolic link counts itself, not what it points to. A path that does not exist is passed over.
        type: list
        elements: str
      reload_after:
        description:
          - The same for paths that the unit reads again when it is reloaded. It is reloaded if its state last changed,
            by a start or a reload, before one of them did.
        type: list
        elements: str
  exclusive:
    description:
      - Globs. A unit that matches one and is not in O(units), but is loaded or enabled, is stopped, disabled
        and its failure forgotten, after everything in O(units) was done.
        For instances of templates that are in the list no longer.
      - A glob must begin with at least four plain characters.
    type: list
    elements: str
attributes:
  check_mode:
    support: full
    description:
      - Predicts from the present state.
        A unit whose file is not there yet counts as neither enabled nor active.
  diff_mode:
    support: full
    description: Enabled and active state of each unit that changes.
notes:
  - The order of O(units) does not matter; systemd orders starts and stops by the units' own dependencies.
author: Hothouse
"""

EXAMPLES = r"""
- name: Run the worker pools, and no others
  hothouse_units:
    units:
      - {name: celery-worker@default.service, enabled: true, state: started}
      - {name: celery-worker@email_senders.service, enabled: true, state: started}
    exclusive: celery-worker@*.service

- name: Restart Flower
  hothouse_units:
    units:
      - {name: flower.service, state: restarted}
"""

RETURN = r"""
actions:
  description: What was done, or would be done in check mode, in order.
  returned: success
  type: list
  elements: str
  sample: [daemon-reload, enable nginx.service, start nginx.service]
"""

UNIT_OPTIONS: dict[str, dict[str, Any]] = {
    "name": {"type": "str", "required": True},
    # Checked by check_units(): ansible-lint validates tasks against this before templates are rendered.
    "enabled": {"type": "raw"},
    "state": {"type": "raw"},
    "restart_after": {"type": "list", "elements": "str"},
    "reload_after": {"type": "list", "elements": "str"},
}
ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "units": {"type": "list", "elements": "dict", "required": True, "options": UNIT_OPTIONS},
    "exclusive": {"type": "list", "elements": "str"},
}
STATES = ("started", "stopped", "restarted", "reloaded")
SUFFIXES = "service|socket|target|timer|path|mount|automount|swap|slice|scope"
UNIT_NAME = re.compile(rf"[A-Za-z0-9:_.\\-]+(@[A-Za-z0-9:_.\\-]+)?\.({SUFFIXES})")
PROPERTIES = ",".join(
    (
        "Id",
        "Names",
        "LoadState",
        "ActiveState",
        "SubState",
        "UnitFileState",
        "NeedDaemonReload",
        "Type",
        "Result",
        "InactiveExitTimestamp",
        "ExecMainStartTimestamp",
        "StateChangeTimestamp",
    )
)
JOURNAL_LINES = 30
# Types of services that never tell when they are ready: active once they are forked. There is nothing to wait
# for; a moment shows at least those that die at once, of a missing user, file or library.
UNTOLD = ("simple", "exec", "idle")
SETTLE_SECONDS = 1.0


class UnitsError(Exception):
    """What is wrong with a unit, for the user to read."""


@dataclass(frozen=True)
class Status:
    """What systemd says about a unit (`systemctl show`, or the little that `systemctl list-units` tells)."""

    name: str
    load: str
    active: str
    sub: str
    file: str = ""
    reload: bool = False
    type: str = ""
    result: str = ""
    names: frozenset[str] = frozenset()
    started: float = 0.0  # when it last began to start, in seconds since the epoch; 0 for never
    loaded: float = 0.0  # when its state last changed, which a start and a reload do; as above

    @property
    def running(self) -> bool:
        """Whether it does its work: not failed, and not waiting for an automatic restart."""
        return self.active in ("active", "reloading", "refreshing")

    @property
    def stopped(self) -> bool:
        """Whether nothing of it runs or is about to."""
        return self.active in ("inactive", "failed")

    @property
    def enabled(self) -> bool:
        """Whether it starts with the machine. Of a SysV script (`generated`) systemd can tell no more."""
        return self.file in ("enabled", "alias", "generated")

    @property
    def missing(self) -> bool:
        """Whether systemd finds no file for it."""
        return self.load == "not-found"

    @property
    def troubled(self) -> bool:
        """Whether failures of the past may keep it from being started."""
        return self.active == "failed" or self.sub == "auto-restart"


@dataclass
class Plan:
    """Names of units by what is to be done with them."""

    reload_daemon: bool = False
    disable: list[str] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    enable: list[str] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)
    start: list[str] = field(default_factory=list)
    reload: list[str] = field(default_factory=list)
    restart: list[str] = field(default_factory=list)
    extra_disable: list[str] = field(default_factory=list)
    extra_stop: list[str] = field(default_factory=list)
    extra_reset: list[str] = field(default_factory=list)

    def steps(self) -> list[tuple[str, list[str]]]:
        """List systemctl's verbs with their units, in order of execution."""
        steps = [
            ("disable", self.disable),
            ("stop", self.stop),
            ("enable", self.enable),
            ("reset-failed", self.reset),
            ("start", self.start),
            ("reload", self.reload),
            ("restart", self.restart),
            ("disable", self.extra_disable),
            ("stop", self.extra_stop),
            ("reset-failed", self.extra_reset),
        ]
        return [(verb, names) for verb, names in steps if names]

    @property
    def changed(self) -> bool:
        """Whether anything but daemon-reload and reset-failed of listed units is to be done."""
        return any(names for verb, names in self.steps() if names is not self.reset)

    def actions(self) -> list[str]:
        """Put it in words."""
        lines = [f"{verb} {name}" for verb, names in self.steps() for name in names]
        return ["daemon-reload", *lines] if self.reload_daemon else lines


def check_units(units: list[dict[str, Any]], globs: Iterable[str]) -> None:
    """Refuse what makes no sense, whatever is on the host, and make `enabled` bool. Raises UnitsError."""
    seen = set()
    for unit in units:
        name = unit["name"]
        if not UNIT_NAME.fullmatch(name) or len(name) > 255:
            template = re.search(r"@\.\w+$", name)
            hint = "name the instance" if template else "write it in full, such as nginx.service"
            raise UnitsError(f"{name!r} is not the name of a unit; {hint}")
        if name in seen:
            raise UnitsError(f"{name}: is in the list twice")
        seen.add(name)
        if unit["state"] is not None and unit["state"] not in STATES:
            raise UnitsError(f"{name}: state must be one of {', '.join(STATES)}, not {unit['state']!r}")
        enabled = unit["enabled"]
        if isinstance(enabled, str) and enabled.lower() in ("true", "yes", "false", "no"):
            unit["enabled"] = enabled.lower() in ("true", "yes")
        elif enabled is not None and not isinstance(enabled, bool):
            raise UnitsError(f"{name}: enabled must be true or false, not {enabled!r}")
    for glob in globs:
        if not re.match(r"[A-Za-z0-9:_.\\-]{4}", glob) or not re.search(rf"\.({SUFFIXES})$", glob):
            raise UnitsError(
                f"exclusive: {glob!r} is too wide; begin with at least four plain characters "
                "and end with the suffix, such as celery-worker@*.service"
            )


def parse_show(text: str, names: list[str]) -> dict[str, Status]:
    """Read what `systemctl show` says of these names: a block of KEY=VALUE lines each, in the same order."""
    blocks = [block for block in text.split("\n\n") if block.strip()]
    if len(blocks) != len(names):
        raise UnitsError(f"systemctl show answered for {len(blocks)} units, not for {len(names)}")
    found = {}
    for name, block in zip(names, blocks, strict=True):
        value = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        found[name] = Status(
            name=name,
            load=value.get("LoadState", ""),
            active=value.get("ActiveState", ""),
            sub=value.get("SubState", ""),
            file=value.get("UnitFileState", ""),
            reload=value.get("NeedDaemonReload") == "yes",
            type=value.get("Type", ""),
            result=value.get("Result", ""),
            names=frozenset(value.get("Names", "").split()) | {value.get("Id", name), name},
            # An automatic restart never was inactive in between: only its main process is new.
            started=max(
                parse_timestamp(value.get("InactiveExitTimestamp", "")),
                parse_timestamp(value.get("ExecMainStartTimestamp", "")),
            ),
            loaded=parse_timestamp(value.get("StateChangeTimestamp", "")),
        )
    return found


def parse_timestamp(text: str) -> float:
    """Read a time as `systemctl --timestamp=us+utc` prints it; seconds since the epoch, 0 for none."""
    if not text or text == "n/a":
        return 0.0
    _weekday, date, time_of_day, _zone = text.split()
    return datetime.fromisoformat(f"{date} {time_of_day}").replace(tzinfo=UTC).timestamp()


def is_stale(read: float, paths: Iterable[str] | None, changed: Mapping[str, float]) -> bool:
    """Whether one of the paths changed after it was `read`; `changed` has the times of those that exist."""
    return any(changed.get(path, 0.0) > read for path in paths or ())


def parse_list(text: str) -> dict[str, Status]:
    """Read the output of `systemctl list-units --all --plain --no-legend`."""
    found = {}
    for line in text.splitlines():
        if len(words := line.split(maxsplit=4)) >= 4:
            name, load, active, sub = words[:4]
            found[name] = Status(name, load, active, sub)
    return found


def find_links(folder: Path, globs: Iterable[str]) -> set[str]:
    """Name the enabled units that match; `list-unit-files` knows templates, not their enabled instances."""
    return match(
        (link.name for kind in ("wants", "requires", "upholds") for link in folder.glob(f"*.{kind}/*")), globs
    )


def match(names: Iterable[str], globs: Iterable[str]) -> set[str]:
    """Pick the names that match."""
    return {name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)}


def needs_reload(units: Iterable[Mapping[str, Any]], statuses: Mapping[str, Status]) -> bool:
    """Whether systemd has to read unit files again before these wishes can be met."""
    return any(
        statuses[unit["name"]].reload or (statuses[unit["name"]].missing and wants_unit(unit))
        for unit in units
    )


def wants_unit(unit: Mapping[str, Any]) -> bool:
    """Whether the unit's file has to be there for this."""
    return bool(unit["enabled"]) or unit["state"] in ("started", "restarted", "reloaded")


def impossible(units: Iterable[Mapping[str, Any]], statuses: Mapping[str, Status]) -> str | None:
    """Say which wish cannot be met, and why."""
    for unit in units:
        status = statuses[unit["name"]]
        if not wants_unit(unit):
            continue
        if status.missing:
            return f"{status.name}: systemd finds no such unit; install the package or the unit file first"
        if status.load == "masked":
            return f"{status.name}: is masked; undo that with: systemctl unmask {status.name}"
        if status.load not in ("loaded", ""):
            return f"{status.name}: does not load ({status.load}); see: systemd-analyze verify {status.name}"
        if unit["enabled"] and status.file == "static":
            return f"{status.name}: cannot be enabled, its unit file has no [Install] section"
    return None


def make_plan(
    units: Iterable[Mapping[str, Any]],
    statuses: Mapping[str, Status],
    changed: Mapping[str, float] | None = None,
) -> Plan:
    """Compare wishes with what is. `changed`: when each path of `restart_after` last changed."""
    plan = Plan()
    for unit in units:
        name, state = unit["name"], unit["state"]
        status = statuses[name]
        if unit["enabled"] is True and not status.enabled:
            plan.enable.append(name)
        if unit["enabled"] is False and status.file in ("enabled", "enabled-runtime", "alias"):
            plan.disable.append(name)
        if state == "stopped" and not status.stopped:
            plan.stop.append(name)
        elif state == "restarted":
            plan.restart.append(name)
        elif state == "reloaded" and status.running:
            plan.reload.append(name)
        elif state in ("started", "reloaded") and not status.running:
            plan.start.append(name)
        elif state == "started" and is_stale(status.started, unit.get("restart_after"), changed or {}):
            plan.restart.append(name)
        elif state == "started" and is_stale(status.loaded, unit.get("reload_after"), changed or {}):
            plan.reload.append(name)
        if status.troubled and (name in plan.start or name in plan.restart):
            plan.reset.append(name)
    return plan


def add_extras(plan: Plan, keep: set[str], loaded: Mapping[str, Status], links: Iterable[str]) -> None:
    """Plan the end of units that match `exclusive` and are not to keep, be they loaded or only enabled."""
    plan.extra_disable = sorted(set(links) - keep)
    for name, status in sorted(loaded.items()):
        if name in keep:
            continue
        if not status.stopped:
            plan.extra_stop.append(name)
        elif status.active == "failed":
            plan.extra_reset.append(name)


def describe(status: Status | None) -> str:
    """Put a status in a few words, for the diff."""
    if status is None or status.missing:
        return "not there"
    return f"{status.file or 'not enabled'}, {status.active} ({status.sub})"


class Systemd:
    """The host's service manager."""

    def call(self, *words: str, check: bool = True) -> str:
        """Run systemctl and return what it prints. Raises UnitsError with its message."""
        return self._run(["systemctl", "--no-ask-password", "--no-pager", *words], check)

    def _run(self, argv: list[str], check: bool = False) -> str:
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
            )
        except FileNotFoundError:
            raise UnitsError(f"there is no {argv[0]} on the host") from None
        if check and done.returncode:
            raise UnitsError(f"{' '.join(argv)} exited with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def show(self, names: list[str]) -> dict[str, Status]:
        """Ask for the status of units by name."""
        if not names:
            return {}
        said = self.call("show", "--timestamp=us+utc", f"--property={PROPERTIES}", "--", *names)
        return parse_show(said, names)

    def matching(self, globs: list[str]) -> tuple[dict[str, Status], set[str]]:
        """Find what matches: loaded units with their status, and the names of enabled ones."""
        said = self.call("list-units", "--all", "--plain", "--no-legend", "--full", "--", *globs)
        return parse_list(said), self.links(globs)

    def links(self, globs: list[str]) -> set[str]:
        """Find the names of enabled units that match."""
        return find_links(Path("/etc/systemd/system"), globs)

    def changed(self, paths: list[str]) -> dict[str, float]:
        """When each path last changed, its name or mode included (ctime), in seconds since the epoch.

        Of a symbolic link itself. A path that does not exist is left out.
        """
        found = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                found[path] = os.lstat(path).st_ctime
        return found

    def touch(self, paths: Iterable[str]) -> None:
        """Let each path that exists count as changed now."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, follow_symlinks=False)

    def explain(self, name: str) -> str:
        """Tell why a unit does not run: systemctl's own words and the end of its journal."""
        wanted = ("Active:", "Process:", "Main PID:", "Status:")
        said = self._run(["systemctl", "--no-pager", "--full", "--lines=0", "status", "--", name])
        facts = [line.strip() for line in said.splitlines() if line.strip().startswith(wanted)]
        self._run(["journalctl", "--sync"])  # what the unit said last may still be on its way
        style = ["--no-pager", "--no-hostname", "--output=short-iso", f"--lines={JOURNAL_LINES}"]
        journal = self._run(["journalctl", *style, f"--unit={name}"])
        lines = [*facts, "its journal ends with:", journal.strip() or "(nothing)"]
        return "\n".join(f"  {line}" for part in lines for line in part.splitlines())


def run(params: Mapping[str, Any], check: bool, diff: bool, systemd: Systemd) -> dict[str, Any]:
    """Bring the units to what `params` say and return the result. Raises UnitsError."""
    units, globs = params["units"], params["exclusive"] or []
    check_units(units, globs)
    names = [unit["name"] for unit in units]
    before = systemd.show(names)
    reload_daemon = needs_reload(units, before)
    if reload_daemon and not check:
        systemd.call("daemon-reload")
        before = systemd.show(names)
    if not check and (problem := impossible(units, before)):
        raise UnitsError(problem)
    options = ("restart_after", "reload_after")
    paths = sorted({path for unit in units for option in options for path in unit[option] or ()})
    plan = make_plan(units, before, systemd.changed(paths) if paths else {})
    # systemd remembers which folders of drop-ins there were, and overlooks a new one until it reads everything again.
    if (plan.start or plan.restart) and not reload_daemon:
        reload_daemon = True
        if not check:
            systemd.call("daemon-reload")
    plan.reload_daemon = reload_daemon
    loaded: dict[str, Status] = {}
    if globs:
        loaded, links = systemd.matching(globs)
        add_extras(plan, {name for status in before.values() for name in status.names}, loaded, links)
    result: dict[str, Any] = {"changed": plan.changed, "actions": plan.actions()}
    touched = sorted({name for _, unit_names in plan.steps() for name in unit_names})
    if not check:
        try:
            carry_out(plan, before, systemd)
        except UnitsError:
            # systemd remembers a reload that failed like one that did not; the next run is to try it again.
            for unit in units:
                if unit["name"] in plan.reload:
                    systemd.touch(unit["reload_after"] or ())
            raise
    if diff and plan.changed:
        after = None if check else systemd.show(touched)
        result["diff"] = make_diff(plan, touched, {**loaded, **before}, after)
    return result


def carry_out(plan: Plan, before: Mapping[str, Status], systemd: Systemd) -> None:
    """Do what is planned. Raises UnitsError: which unit, why, and what its journal says."""
    for verb, names in plan.steps():
        if verb == "reset-failed":
            systemd.call(verb, "--", *names, check=False)  # it may have forgotten the unit by now
            continue
        error = None
        try:
            systemd.call(verb, "--", *names)
        except UnitsError as caught:
            error = caught
        if verb in ("start", "restart", "reload", "stop"):
            if not error and verb in ("start", "restart") and any(before[n].type in UNTOLD for n in names):
                time.sleep(SETTLE_SECONDS)
            bad = [status.name for status in systemd.show(names).values() if not arrived(verb, status)]
            if bad:
                raise UnitsError("\n".join(_failure(verb, name, systemd) for name in bad)) from error
        if names is plan.extra_stop:
            systemd.call("reset-failed", "--", *names, check=False)  # one that had to be killed
        if error:
            raise error


def arrived(verb: str, status: Status) -> bool:
    """Whether a unit is where the verb should have brought it."""
    if verb == "stop":
        return status.stopped
    # A oneshot unit without RemainAfterExit is done and inactive again by then.
    done = status.type == "oneshot" and status.active == "inactive" and status.result == "success"
    return status.running or done


def _failure(verb: str, name: str, systemd: Systemd) -> str:
    more = f"More: journalctl -b -u {name}; systemctl status {name}"
    return f"{name} did not {verb}.\n{systemd.explain(name)}\n  {more}"


def make_diff(
    plan: Plan, names: list[str], before: Mapping[str, Status], after: Mapping[str, Status] | None
) -> dict[str, dict[str, str]]:
    """Show each touched unit's state before and after; in check mode (no `after`) the plan instead."""
    if after is None:
        planned = {name: [verb for verb, units in plan.steps() if name in units] for name in names}
        new = {name: f"{describe(before.get(name))}, to {' and '.join(planned[name])}" for name in names}
    else:
        new = {name: describe(after[name]) for name in names}
    return {"before": {name: describe(before.get(name)) for name in names}, "after": new}


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(ARGUMENT_SPEC, supports_check_mode=True)
    try:
        result = run(module.params, module.check_mode, module._diff, Systemd())
    except UnitsError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
