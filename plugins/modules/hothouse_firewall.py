#!/usr/bin/python
"""The firewall of a host: the half that runs on it. The other half, in the action, proves that it is still reached."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: hothouse_firewall
short_description: Replaces the nftables rules of a host without locking anybody out
version_added: "0.2.0"
description:
  - Refuses rules that C(nft) does not accept, and rules that would not let in the SSH connection of this very run.
  - Loads them into the kernel, with a timer of systemd that puts the present ones back, opens a connection anew, and
    only when that succeeds stops the timer and puts the file in place that is loaded when the host starts. If it does
    not, or the run ends in between, the old rules come back by themselves; the file is the old one all the time.
  - Refuses to try rules while another run tries some, because what is loaded then are not rules to go back to.
  - Only the table C(inet hothouse) is replaced, in one step. Other tables of the host are left alone.
options:
  rules:
    description: The file for C(nft -f). All of its rules are in the table C(inet hothouse), which it replaces.
    type: str
    required: true
  accepts:
    description:
      - What the rules let in, to hold this run's connection against, each with C(protocol), C(port) (a number, or a
        range such as C(60000-61000)) and C(from) (addresses and networks; none for anybody).
    type: list
    elements: dict
    required: true
  path:
    description: The file on the host. Beside it, with the suffix C(.listing), is what the kernel made of it.
    type: path
    required: true
  rollback_seconds:
    description: After this time the old rules come back, unless the host was reached within half of it.
    type: int
    default: 60
  phase:
    description: Set by the action.
    type: str
    choices: [check, try, confirm]
    default: check
attributes:
  check_mode:
    support: full
    description: The rules are checked, if the host has C(nft) already.
  diff_mode:
    support: full
notes:
  - Reports a change whenever it is run; whether the host has these rules is for the caller to ask, because asking costs
    less than a module does.
  - Over a connection that is not SSH nobody can be locked out, and the rules are kept at once.
author: Hothouse
"""

EXAMPLES = r"""
- name: Replace the rules of the firewall
  hothouse_firewall:
    rules: "{{ lookup('ansible.builtin.template', 'firewall.nft.j2') }}"
    path: /etc/hothouse/firewall.nft
    accepts:
      - {protocol: tcp, port: 22, from: [192.0.2.0/24]}
"""

RETURN = r"""
before:
  description: The file as it was.
  returned: success
  type: str
"""

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "rules": {"type": "str", "required": True},
    "accepts": {"type": "list", "elements": "dict", "required": True},
    "path": {"type": "path", "required": True},
    "rollback_seconds": {"type": "int", "default": 60},
    "phase": {"type": "str", "choices": ["check", "try", "confirm"], "default": "check"},
}
TABLE = ("table", "inet", "hothouse")
STATE = Path("/run/hothouse-firewall")  # forgotten by a reboot, as the rules in the kernel are
TIMER = "hothouse-firewall-rollback"


class FirewallError(Exception):
    """What is wrong, for the user to read."""


def call(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command of the host that reads `text`."""
    try:
        return subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise FirewallError(f"there is no {words[0]} on the host") from None


def must(*words: str) -> str:
    """Run a command that has to succeed, and return what it prints. Raises FirewallError with its message."""
    done = call(*words)
    if done.returncode:
        raise FirewallError(f"{' '.join(words)} exited with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def listed() -> str:
    """The table in the kernel; nothing if there is none."""
    return call("nft", "--stateless", "list", *TABLE).stdout


def put(path: Path, text: str) -> None:
    """Write a file that is complete or the old one at any moment, also after a crash."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
    Path(name).replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def noted(name: str) -> str:
    """A file of the last attempt; nothing if there was none since the host started."""
    path = STATE / name
    return path.read_text() if path.exists() else ""


def check(rules: str) -> None:
    """Let nft read the rules. Raises FirewallError with what it says."""
    done = call("nft", "--check", "--file", "-", text=rules)
    if done.returncode:
        raise FirewallError(f"nft does not accept the rules; nothing was changed:\n{done.stderr.strip()}")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let no other run try or keep rules meanwhile."""
    STATE.mkdir(mode=0o700, exist_ok=True)
    with (STATE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_tried() -> bool:
    """Whether rules are being tried, or the old ones are being put back."""
    units = (f"{TIMER}.timer", f"{TIMER}.service")
    return set(must("systemctl", "show", "--property=LoadState", "--value", *units).split()) != {"not-found"}


def refuse_second() -> None:
    """Raises FirewallError if rules are being tried already."""
    if is_tried():
        left = float(noted("until") or 0) - time.monotonic()
        raise FirewallError(
            f"another run tries rules right now; wait {max(1, math.ceil(left))} seconds, until they are kept or "
            f"the old ones are back ({TIMER}.timer), and run this again. Nothing was changed."
        )


def attempt(rules: str, seconds: int) -> None:
    """Load the rules, and have the present ones put back after `seconds`."""
    check(rules)
    with alone():
        # Before anything is written: the other run's timer reads old.nft, and what is loaded now is not proven.
        refuse_second()
        words = " ".join(TABLE)
        put(STATE / "old.nft", f"{words}\ndelete {words}\n{listed()}")
        put(STATE / "new.nft", rules)
        put(STATE / "until", str(time.monotonic() + seconds))
        must(
            "systemd-run", "--quiet", "--collect", f"--unit={TIMER}", f"--on-active={seconds}",
            "--timer-property=AccuracySec=1s", "/usr/sbin/nft", "--file", str(STATE / "old.nft"),
        )  # fmt: skip
        try:
            must("nft", "--file", str(STATE / "new.nft"))
        except FirewallError:
            call("systemctl", "stop", f"{TIMER}.timer")
            raise
        put(STATE / "new.listing", listed())


def confirm(rules: str, path: Path) -> None:
    """Keep the rules that are being tried, also for the next start of the host. Raises FirewallError and OSError."""
    with alone():
        if not is_tried() or noted("new.nft") != rules:
            raise FirewallError("the new connection came too late: these rules are not being tried any more")
        listing = noted("new.listing")
        if listed() != listing:
            raise FirewallError(
                "other rules are loaded than those that were tried; the old ones are back, or come back by themselves"
            )
        try:
            must("systemctl", "stop", f"{TIMER}.timer")
            # It may have been due just before: then its command was started, and is not there otherwise.
            call("systemctl", "stop", f"{TIMER}.service")
            if listed() != listing:
                raise FirewallError("the new connection came too late")
            # In this order: should the second one fail, the next run sees that the host has other rules.
            put(path.with_name(f"{path.name}.listing"), listing)
            put(path, rules)
        except (FirewallError, OSError) as error:
            # No timer does it any more.
            must("nft", "--file", str(STATE / "old.nft"))
            raise FirewallError(f"the old rules are back: {error}") from error


def run(params: dict[str, Any], check_mode: bool) -> dict[str, Any]:
    """Do one phase and return the result. Raises FirewallError."""
    path, rules = Path(params["path"]), params["rules"]
    before = path.read_text() if path.exists() else ""
    if check_mode or params["phase"] == "check":
        if shutil.which("nft"):
            check(rules)
    elif params["phase"] == "try":
        attempt(rules, params["rollback_seconds"])
    else:
        confirm(rules, path)
    return {"changed": True, "before": before}


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(ARGUMENT_SPEC, supports_check_mode=True)
    try:
        result = run(module.params, module.check_mode)
    except FirewallError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
