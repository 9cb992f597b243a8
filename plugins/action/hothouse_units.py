"""The half of hothouse_units that runs on the controller: it asks systemd itself whether anything is to be done.

Most runs change nothing, and starting a module costs several times what a few plain commands do. What is to be done
is worked out by the module's own code; the module is executed only if that is not nothing.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

# Modules are no package that could be imported by name.
_spec = importlib.util.spec_from_file_location(
    "hothouse_units_module", Path(__file__).parents[1] / "modules" / "hothouse_units.py"
)
assert _spec and _spec.loader
module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = module  # where its dataclasses look for it
_spec.loader.exec_module(module)


class Remote(module.Systemd):  # type: ignore[name-defined, misc]  # a module loaded by its path
    """The host's service manager, asked over Ansible's connection and never told anything."""

    def __init__(self, action: ActionBase) -> None:
        self._action = action

    def _run(self, argv: list[str], check: bool = False) -> str:
        done = self._action._low_level_execute_command(f"LC_ALL=C {shlex.join(argv)}", executable="/bin/sh")
        if check and done["rc"]:
            raise module.UnitsError(f"{argv[0]} exited with {done['rc']}: {done['stderr'].strip()}")
        return str(done["stdout"]).replace("\r\n", "\n")

    def links(self, globs: list[str]) -> set[str]:
        folder = "/etc/systemd/system"
        kinds = ["-path", f"{folder}/*.wants/*", "-o", "-path", f"{folder}/*.requires/*", "-o", "-path"]
        found = self._run(["find", folder, *kinds, f"{folder}/*.upholds/*"], check=True)
        return module.match((Path(line).name for line in found.splitlines()), globs)

    def changed(self, paths: list[str]) -> dict[str, float]:
        found = self._run(["stat", "--format=%.9Z %n", "--", *paths])
        lines = [line.partition(" ") for line in found.splitlines()]
        return {path: float(time) for time, _, path in lines if path in paths}


class ActionModule(ActionBase):
    """The `hothouse_units` action."""

    _requires_connection = True
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return at once if nothing is to be done; what is wrong is for the module to say."""
        super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(module.ARGUMENT_SPEC)
        try:
            predicted = module.run(arguments, check=True, diff=False, systemd=Remote(self))
        except module.UnitsError:
            predicted = None
        if predicted is not None and not predicted["actions"]:
            return {"changed": False, "actions": []}
        return self._execute_module(module_args=self._task.args, task_vars=task_vars)
