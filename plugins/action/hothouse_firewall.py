"""The firewall of a host: the half on the controller, which proves that the host is still reached."""

from __future__ import annotations

import importlib.util
import ipaddress
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase

sys.path.append(str(Path(__file__).parents[1] / "plugin_utils"))
import hothouse_addresses as addresses  # found by the line above

# Modules are no package that could be imported by name.
_spec = importlib.util.spec_from_file_location(
    "hothouse_firewall_module", Path(__file__).parents[1] / "modules" / "hothouse_firewall.py"
)
assert _spec and _spec.loader
module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(module)

MARGIN_SECONDS = 5  # until a timer that is due has done its work
PAUSE_SECONDS = 1  # between two attempts to connect
SSH = ("ssh", "smart", "paramiko", "paramiko_ssh")  # names of Ansible's ways to connect by it


class Session(NamedTuple):
    """An SSH connection as the host sees it."""

    address: str
    source: int
    port: int


def parse_session(text: str) -> Session | None:
    """What sshd puts into SSH_CONNECTION: address and port of the client, then those of the host."""
    words = text.split()
    if len(words) != 4 or not (words[1].isdigit() and words[3].isdigit()):
        return None
    try:
        address = ipaddress.ip_address(words[0].partition("%")[0])
    except ValueError:  # sshd says UNKNOWN where it cannot tell
        return None
    mapped = address.ipv4_mapped if address.version == 6 else None  # what the firewall sees is IPv4
    return Session(str(mapped or address), int(words[1]), int(words[3]))


def is_accepted(session: Session, accepts: list[dict[str, Any]]) -> bool:
    """Whether one of the rules lets in a new connection like this one."""
    address = ipaddress.ip_address(session.address)
    for rule in accepts:
        first, _, last = str(rule["port"]).partition("-")
        near = [addresses.network_of(text) for text in rule.get("from") or []]
        if (
            rule.get("protocol", "tcp") == "tcp"
            and int(first) <= session.port <= int(last or first)
            and (not near or any(address in network for network in near))
        ):
            return True
    return False


class ActionModule(ActionBase):
    """The `hothouse_firewall` action."""

    _requires_connection = True
    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Check, try, reach the host anew, keep. Raises AnsibleActionFail; then the old rules are what is loaded."""
        super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(module.ARGUMENT_SPEC)
        self._task_vars = task_vars or {}
        host = self._task_vars.get("inventory_hostname", "the host")
        session = self._session()
        if not session and self._connection.transport in SSH:
            raise AnsibleActionFail(
                f"{host} does not tell by which SSH connection it is reached (its SSH_CONNECTION is empty), so nobody "
                "can know whether the new rules of the firewall would lock this run out; they were not applied. See "
                "whether a ForceCommand in its sshd_config or a wrapper around the shell clears the environment."
            )
        if session and not is_accepted(session, args["accepts"]):
            raise AnsibleActionFail(
                f"The new rules of the firewall would lock this run out of {host}, which it reaches from "
                f"{session.address} on port {session.port}; they were not applied. Add that address to "
                f"prepare_ssh_addresses, or, if sshd of {host} listens on another port than prepare_ssh_port says, "
                "correct that."
            )
        result = self._phase("check" if self._task.check_mode else "try", args)
        if not result.get("failed") and not self._task.check_mode:
            began = time.monotonic()
            if session and not self._reaches_anew(session, began + args["rollback_seconds"] / 2):
                self._await_rollback(host, began + args["rollback_seconds"] + MARGIN_SECONDS)
            result = self._phase("confirm", args)
        before = result.pop("before", "")
        if self._task.diff and not result.get("failed"):
            path = args["path"]
            result["diff"] = {
                "before": before, "after": args["rules"], "before_header": path, "after_header": path,
            }  # fmt: skip
        return result

    def _phase(self, phase: str, args: dict[str, Any]) -> dict[str, Any]:
        return self._execute_module(
            module_name="hothouse_firewall", module_args={**args, "phase": phase}, task_vars=self._task_vars
        )

    def _session(self) -> Session | None:
        """The connection in use, or None if it is not one of SSH; sudo would hide it.

        On the machine itself the variable is there as well, of whoever has logged in.
        """
        if self._connection.transport == "local":
            return None
        said = self._low_level_execute_command('echo "$SSH_CONNECTION"', sudoable=False, executable="/bin/sh")
        return next(filter(None, map(parse_session, said["stdout_lines"])), None)

    def _reaches_anew(self, old: Session, deadline: float) -> bool:
        """Whether a connection that did not exist before gets through; an old one would in any case."""
        while True:
            try:
                self._connection.reset()
                session = self._session()
            except AnsibleConnectionFailure:
                session = None
            if session and session.source != old.source:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(PAUSE_SECONDS)

    def _await_rollback(self, host: str, until: float) -> None:
        """Wait until the old rules are back, and fail."""
        time.sleep(max(0.0, until - time.monotonic()))
        problem = (
            f"With the new rules of the firewall no new SSH connection to {host} could be opened. "
            "They were taken back by the host itself, and nothing of them is left for its next start."
        )
        try:
            self._connection.reset()
            self._session()
        except AnsibleConnectionFailure as error:
            problem += f" But it still cannot be reached, so look at its console: {error}"
        raise AnsibleActionFail(problem)
