"""Reads an inventory of any kind with the plugin of Ansible that is made for it, and says in one message what is wrong.

With several plugins enabled, Ansible tries one after the other, and prints what each of them has against a misspelled
file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from ansible import context
from ansible.errors import AnsibleError
from ansible.inventory.manager import IGNORED
from ansible.plugins.inventory import BaseInventoryPlugin
from ansible.plugins.loader import inventory_loader
from ansible.utils.vars import load_extra_vars

sys.path.append(str(Path(__file__).parents[1] / "plugin_utils"))
import hothouse_variable_types as types  # found by the line above

DOCUMENTATION = r"""
name: hothouse
short_description: Read an inventory of any kind
description:
  - Reads YAML, JSON, TOML, INI, the output of scripts, lists of hosts and what other inventory plugins provide.
  - Ends the run with one message if a source cannot be read or if no source names a host.
  - Gives every variable of a role the type that the role's argument specification says.
options: {}
author: Hothouse
"""

# Here, because Ansible reads the inventory before it asks for a variable of a host.
types.install()

KINDS = {
    "auto": "the settings of an inventory plugin",
    "host_list": "a list of hosts",
    "ini": "INI",
    "script": "the output of a script",
    "toml": "TOML",
    "yaml": "YAML",
}


def kind_of(path: str, loader: Any) -> str:
    """The name of Ansible's plugin that reads this source."""
    if "," in path:
        return "host_list"
    suffix = Path(path).suffix.lower()
    if suffix in (".yml", ".yaml"):
        document = loader.load_from_file(path, cache="none")
        return "auto" if isinstance(document, dict) and "plugin" in document else "yaml"
    if suffix in (".json", ".toml"):
        return {".json": "yaml", ".toml": "toml"}[suffix]
    if os.access(path, os.X_OK) or Path(path).read_bytes().startswith(b"#!"):
        return "script"
    return "ini"


def mend(kind: str, path: str, error: Exception) -> str:
    """What to do about a source that cannot be read."""
    if types.is_locked(error):
        return types.UNLOCK
    if kind == "script":
        return f"run `{path} --list`; it has to print an inventory in JSON and to exit with 0"
    if kind == "auto":
        return f"see `ansible-inventory -i {path} --list -vvv`"
    return (
        "correct it, or take what is no inventory out of the folder. Its name says what a file is: .yml, .yaml, .json "
        "and .toml; one that can be executed is a script, any other INI"
    )


def files_of(source: Path) -> list[Path]:
    """The files of a source in the order in which Ansible reads them."""
    if not source.is_dir():
        return [source]
    found = sorted(path for path in source.iterdir() if not IGNORED.search(os.fsencode(path.name)))
    return [file for path in found for file in files_of(path)]


class InventoryModule(BaseInventoryPlugin):
    """The `hothouse` inventory plugin."""

    NAME = "hothouse"

    def verify_file(self, path: str) -> bool:
        """Everything; what cannot be read is for `parse` to say."""
        return True

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        """Read one source. Ends the program if that fails: Ansible would print a warning and an error, or go on."""
        if "," not in path and not Path(path).exists():
            self._refuse(
                f"The inventory {path} does not exist", "name an environment, such as -i inventories/prod"
            )
        try:
            load_extra_vars(loader)
        except Exception as error:  # one that its loader does not foresee, too
            self._refuse(
                f"-e or --extra-vars cannot be read: {' '.join(str(error).split())}",
                types.UNLOCK
                if types.is_locked(error)
                else "give NAME=VALUE, JSON, or @ and a file with YAML or JSON",
            )
        kind = ""
        try:
            kind = kind_of(path, loader)
            plugin = inventory_loader.get(f"ansible.builtin.{kind}")
            # As the plugin `auto` does it: the plugin that reads says whether its values may be templates.
            inventory._target_plugin = plugin
            plugin.parse(inventory, loader, path, cache=cache)
        except Exception as error:  # whatever somebody's script or plugin raises
            place = str(getattr(error, "obj", "") or "")
            self._refuse(
                f"The inventory {place if place.startswith(path) else path} cannot be read as "
                f"{KINDS.get(kind, 'YAML')}: {' '.join(str(error).split())}",
                mend(kind, path, error),
            )
        # Earlier sources may hold groups alone.
        sources = context.CLIARGS.get("inventory") or [path]
        last = (
            sources[-1] if "," in sources[-1] else str([Path(sources[-1]), *files_of(Path(sources[-1]))][-1])
        )
        if not inventory.hosts and path == last:
            self._refuse(
                f"The inventory names no host: {', '.join(sources)}",
                "name the hosts of each group, as inventories/prod/hosts.yml does",
            )
        # What only lists parts of a run needs no variables, and may not have the password for them.
        listings = ("syntax", "listhosts", "listtasks", "listtags")
        if path == last and "syntax" in context.CLIARGS and not any(map(context.CLIARGS.get, listings)):
            self._read_variables(inventory, loader, sources)

    def _read_variables(self, inventory: Any, loader: Any, sources: list[str]) -> None:
        """Say which file of variables cannot be read. Ansible, which reads them later, does not always."""
        names = {"group_vars": inventory.groups, "host_vars": inventory.hosts}
        for folder in types.source_folders(sources):
            for kind in names:
                for name in names[kind]:
                    for file in loader.find_vars_files(str(folder / kind), name):
                        self._read_file(loader, os.fsdecode(file))

    def _read_file(self, loader: Any, file: str) -> None:
        try:
            found = loader.load_from_file(file, cache="all", unsafe=False, trusted_as_template=True)
            if not isinstance(found or {}, dict):
                raise AnsibleError("it is no mapping, such as {name: value}")
        except AnsibleError as error:
            place = str(getattr(error, "obj", "") or "")
            self._refuse(
                f"The variables in {place if place.startswith(file) else file} cannot be read: "
                f"{' '.join(str(error).split())}",
                types.UNLOCK if types.is_locked(error) else "correct the file",
            )

    def _refuse(self, what: str, mend: str) -> NoReturn:
        self.display.error(f"{what}\n    mend:  {mend}\nNothing was touched.")
        sys.exit(4)
