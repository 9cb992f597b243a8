"""Lets one run at a time at an environment. Documented in the module of this name."""

from __future__ import annotations

import contextlib
import getpass
import os
import select
import shlex
import signal
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible import context
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase

ARGUMENTS: dict[str, dict[str, Any]] = {
    "path": {"type": "path", "default": "/run/hothouse-run"},
    "lease_seconds": {"type": "int", "default": 60},
}
RENEWALS = 4  # within a lease

# The file has two lines: which run holds the lock, and what is said of it. Its time is the run's last sign of life.
# A file that is empty or gone is a lock that no run holds.
READ = """
exec 9>>{path} && flock 9 || exit
holder= text=
{{ read -r holder; read -r text; }} <{path}
age=$(($(date +%s) - $(stat --format %Y {path})))
"""
TAKE = """
if [ "$holder" = {run} ] && [ "$age" -le {lease} ]; then echo ours
elif [ -z "$holder" ] || [ "$age" -gt {lease} ] || [ "$holder" = {ended} ]; then
  printf '%s\\n' {run} {text} >{path} && echo taken
else printf '%s\\n' held "$holder" "$age" "$text"
fi
"""
RENEW = '[ "$holder" = {run} ] && touch {path} && echo ours'
RELEASE = 'if [ "$holder" = {run} ]; then : >{path}; fi'


def process(pid: int) -> str:
    """The name of a process of this machine that no other has, here or elsewhere, or an empty string."""
    try:
        # The name of the program, in brackets, may hold spaces; the start is the 20th word after it.
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{machine()}/{pid}/{started}"


def machine() -> str:
    """What names of processes are good for: this boot, and this container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def has_ended(name: str) -> bool:
    """Whether this was a process of this machine and is no more."""
    own, _, rest = name.rpartition("/")[0].rpartition("/")
    return own == machine() and rest.isdigit() and process(int(rest)) != name


def inheritable() -> Iterator[int]:
    """What the caller of ansible-playbook had open, such as the lock of a script."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):  # that of the folder itself
            if int(entry.name) > 2 and os.get_inheritable(int(entry.name)):
                yield int(entry.name)


class ActionModule(ActionBase):
    """The `hothouse_lock` action."""

    _requires_connection = True
    _supports_check_mode = True
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Takes the lock. Raises AnsibleActionFail, with who has it, if another run does."""
        super().run(tmp, task_vars)
        _, options = self.validate_argument_spec(ARGUMENTS)
        if self._task.check_mode:
            return {"changed": False}
        host = self._task.delegate_to or (task_vars or {})["inventory_hostname"]
        self._words = {
            "path": shlex.quote(options["path"]),
            "lease": options["lease_seconds"],
            "run": process(os.getppid()),
            "text": shlex.quote(self._description()),
            "ended": "''",
        }
        try:
            answer = self._take()
        except AnsibleConnectionFailure:
            return {"changed": False, "warnings": [f"{host} does not answer, so it keeps no other run away."]}
        if answer[0] == "held":
            _, _holder, age, text = answer
            raise AnsibleActionFail(
                f"Another run is at work on this environment: {text}; its last sign of life was {age} s ago. This run "
                "has changed nothing on the hosts. Wait until the other one has ended. One that died is out of the way "
                f"{options['lease_seconds']} s after its last sign of life. If one hangs, end its process. The lock is "
                f"the file {options['path']} on {host}; to break it without ending that run, remove the file."
            )
        if answer[0] == "taken":
            self._hold(os.getppid(), options["lease_seconds"] / RENEWALS)
        return {"changed": False}

    @staticmethod
    def _description() -> str:
        """Who runs what since when, in one line."""
        arguments = context.CLIARGS
        limit = f" --limit {arguments['subset']}" if arguments.get("subset") else ""
        what = " ".join(str(word) for word in arguments.get("args", ())) + limit
        who = f"{getpass.getuser()}@{socket.gethostname()} (process {os.getppid()})"
        text = f"{what} by {who}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        return "".join(letter if letter.isprintable() else "?" for letter in text)

    def _take(self) -> list[str]:
        """Takes the lock, from a run of this machine that has ended as well. What TAKE printed."""
        answer = self._ask(TAKE)
        if answer[:1] == ["held"] and has_ended(answer[1]):
            self._words["ended"] = shlex.quote(answer[1])
            answer = self._ask(TAKE)
        if not answer or answer[0] not in ("ours", "taken", "held"):
            raise AnsibleActionFail(f"the lock {self._words['path']} cannot be taken: {self._said.strip()}")
        return answer

    def _ask(self, command: str) -> list[str]:
        script = READ.format(**self._words) + command.format(**self._words)
        done = self._low_level_execute_command(script, executable="/bin/sh")
        self._said = done["stderr"] or done["stdout"]
        lines = [line.strip() for line in done["stdout"].splitlines()]
        # A greeting may stand before the answer.
        first = next((number for number, line in enumerate(lines) if line in ("ours", "taken", "held")), 0)
        return lines[first:]

    def _hold(self, run: int, seconds: float) -> None:
        """Starts a process that renews the lock until the run has ended, however it did, and then gives it back."""
        if os.fork():
            return
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            for file in inheritable():
                os.close(file)
            self._display.verbosity = 0  # there is no run any more that could show something
            waiting = select.poll()
            waiting.register(os.pidfd_open(run), select.POLLIN)
            lost = False
            while not waiting.poll(seconds * 1000) and not lost:
                with contextlib.suppress(AnsibleConnectionFailure):  # the lease outlives some of these
                    lost = "ours" not in self._ask(RENEW)
            if not lost:
                self._ask(RELEASE)
        finally:
            os._exit(0)
