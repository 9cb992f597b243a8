"""Ends a run that did not read the bundle's ansible.cfg, and says where to run it.

Such a run would find no inventory, take the string `false` for true, and leave handlers out. Ansible finds this file,
the roles and the plugins by the links in playbooks/, whatever its settings.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.plugins.callback import CallbackBase

sys.path.append(str(Path(__file__).parents[1] / "plugin_utils"))
import hothouse_variable_types as types  # found by the line above

DOCUMENTATION = r"""
name: hothouse
type: aggregate
short_description: Say where to run a playbook
description:
  - Ends a run that did not read the bundle's ansible.cfg, before the first task.
author: Hothouse
"""

SETTINGS = Path(__file__).resolve().parents[2] / "ansible.cfg"


def obstacle() -> tuple[str, str]:
    """Why the settings do not hold, and what to do about it."""
    if (folder := SETTINGS.parent) != Path.cwd():
        return f"the run is in {Path.cwd()}", f"cd {folder}"
    if folder.stat().st_mode & 0o002:
        return f"everybody may write to {folder}, so Ansible does not trust it", f"chmod o-w {folder}"
    overrides = [name for name in ("ANSIBLE_CONFIG", "ANSIBLE_INVENTORY_ENABLED") if name in os.environ]
    if not overrides:
        return f"enable_plugins in {constants.CONFIG_FILE}", "set it to hothouse"
    return f"{' and '.join(overrides)} in the environment", f"unset {' '.join(overrides)}"


class CallbackModule(CallbackBase):
    """The `hothouse` callback plugin."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "hothouse"

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Ends the program: an error that a callback raises would be a warning."""
        if types.is_installed():
            return
        where, mend = obstacle()
        self._display.error(
            f"This run does not go by the settings in {SETTINGS}. Nothing was touched.\n"
            f"    where: {where}\n    mend:  {mend}\n"
        )
        sys.exit(4)
