"""Asks a host something with one plain command, and how far its clock is off. Documented in the module of this name."""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase

READ_CLOCK = "date +'hothouse-clock %s.%N'"
PRECISE_SECONDS = 0.25
MOST_READINGS = 5


class Bounds(NamedTuple):
    """How many seconds a host's clock is at least and at most ahead of the controller's."""

    least: float
    most: float

    def narrowed(self, other: Bounds) -> Bounds:
        """What both say; the newer one if they contradict each other, because a clock was set in between."""
        both = Bounds(max(self.least, other.least), min(self.most, other.most))
        return both if both.least <= both.most else other


def bounds(before: float, after: float, readings: list[float]) -> Bounds:
    """What the host's clock said, between two moments of the controller's clock.

    The first reading was taken after `before`, the last one before `after`; what the host did between the two readings
    does not blur the result.
    """
    return Bounds(readings[-1] - after, readings[0] - before)


class ActionModule(ActionBase):
    """The `hothouse_ask` action."""

    _requires_connection = True
    _supports_check_mode = True
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask. Raises AnsibleActionFail if the host does not answer with its time."""
        super().run(tmp, task_vars)
        self._host = (task_vars or {})["inventory_hostname"]
        _, arguments = self.validate_argument_spec({"command": {"type": "str", "required": True}})
        clock, lines = self._ask(f"{READ_CLOCK}; {arguments['command']}; {READ_CLOCK}")
        for _ in range(MOST_READINGS):
            if clock.most - clock.least <= PRECISE_SECONDS:
                break
            clock = clock.narrowed(self._ask(READ_CLOCK)[0])
        return {"changed": False, "stdout_lines": lines, "clock": [round(value, 3) for value in clock]}

    def _way_out(self, error: str) -> str:
        """What to do about a host that cannot be reached."""
        without = f"go on without it: repeat the command with --limit '!{self._host}'."
        if "IDENTIFICATION HAS CHANGED" not in error:
            return f"If {self._host} is down, {without}"
        address, port = (self._connection.get_option(option) for option in ("host", "port"))
        known = address if port in (None, 22) else f"'[{address}]:{port}'"
        return (
            f"{self._host} shows another SSH key than before. If it was installed anew, forget the old key and log in "
            f"once, see docs/operations.md: ssh-keygen -R {known}. If not, something else answers there; {without}"
        )

    def _ask(self, command: str) -> tuple[Bounds, list[str]]:
        before = time.time()
        try:
            done = self._low_level_execute_command(command, executable="/bin/sh")
        except AnsibleConnectionFailure as error:
            raise AnsibleConnectionFailure(
                f"{error}\n{self._way_out(str(error))} What the host misses it gets from a later run for all hosts."
            ) from None
        after = time.time()
        lines = [line.strip() for line in done["stdout"].splitlines()]
        matches = [re.fullmatch(r"hothouse-clock (\d+\.\d+)", line) for line in lines]
        readings = [float(match[1]) for match in matches if match]
        if not readings:
            said = (done["stderr"] or done["stdout"]).strip()
            raise AnsibleActionFail(f"the host did not answer as a Debian with a POSIX shell does: {said}")
        rest = [line for line, match in zip(lines, matches, strict=True) if not match]
        return bounds(before, after, readings), rest
