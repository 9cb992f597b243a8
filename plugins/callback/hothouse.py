"""Ends a run that did not read the bundle's ansible.cfg, or would leave out what it names or its checks.

A run without these settings would find no inventory, take the string `false` for true, and leave handlers out. Ansible
finds this file, the roles and the plugins by the links in playbooks/, whatever its settings. It takes any tag, and runs
nothing where no play has it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from ansible import constants, context
from ansible.plugins.callback import CallbackBase

sys.path.append(str(Path(__file__).parents[1] / "plugin_utils"))
import hothouse_variable_types as types  # found by the line above

DOCUMENTATION = r"""
name: hothouse
type: aggregate
short_description: Say where to run a playbook, and by which tags
description:
  - Ends a run that did not read the bundle's ansible.cfg, before the first task.
  - Ends a run with a tag that is none of a noun, and one that would leave out the checks.
author: Hothouse
"""

# Molecule gives these to --skip-tags of its runs.
OF_MOLECULE = {"molecule-notest", "notest", "molecule-idempotence-notest"}
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


def nouns() -> list[str]:
    """The tags that parts of a run have: those of the nouns, each of which has a playbook and a role."""
    playbooks, roles = (
        {path.stem for path in SETTINGS.parent.glob(files)} for files in ("playbooks/*.yml", "roles/*")
    )
    return sorted(playbooks & roles - {"compose"})  # for no host


def misuse(playbook: Any) -> tuple[str, str] | None:
    """What in the options would not do what it seems to, and what to do about it.

    A playbook of the user's own, which may import these, has tags of its own.
    """
    file = Path(playbook._file_name).resolve()
    if file != SETTINGS.parent / "site.yml" and file.parent != SETTINGS.parent / "playbooks":
        return None
    part = (
        "for a part of site.yml: --tags NOUN, --skip-tags NOUN, or playbooks/NOUN.yml; the checks always run"
    )
    if context.CLIARGS.get("start_at_task"):
        return "--start-at-task leaves out the checks and the credentials", part
    only = set(context.CLIARGS.get("tags") or []) - {"all"}
    without = set(context.CLIARGS.get("skip_tags") or []) - OF_MOLECULE
    if (only or without) and not any(play.tags for play in playbook.get_plays()):
        return (
            f"{playbook._file_name} has no tags, so it runs whole or not at all",
            "leave --tags and --skip-tags out",
        )
    if without & {"all", "always", "tagged"}:
        return "--skip-tags would leave out the checks and the credentials", part
    if unknown := sorted((only - {"always"} | without) - {*nouns()}):
        return f"no part of a run has the tag {', '.join(unknown)}", f"name some of {', '.join(nouns())}"
    return None


class CallbackModule(CallbackBase):
    """The `hothouse` callback plugin."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "hothouse"

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Ends the program: an error that a callback raises would be a warning."""
        if not types.is_installed():
            where, mend = obstacle()
            self._refuse(f"This run does not go by the settings in {SETTINGS}", f"    where: {where}\n", mend)
        elif fault := misuse(playbook):
            self._refuse(f"This run would not do what it says: {fault[0]}", "", fault[1])

    def _refuse(self, what: str, where: str, mend: str) -> NoReturn:
        self._display.error(f"{what}. Nothing was touched.\n{where}    mend:  {mend}\n")
        sys.exit(4)
