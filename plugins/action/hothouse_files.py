"""All files of a role in one module execution: the half that runs on the controller.

It checks the entries, renders templates, reads sources, hands everything to the module in one piece, and
turns the changed paths into notifications. Options are documented in the module of the same name.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ansible.errors import (
    AnsibleActionFail,
    AnsibleError,
    AnsibleTemplateSyntaxError,
    AnsibleUndefinedVariable,
)
from ansible.module_utils.common.text.converters import to_bytes
from ansible.parsing.vault import VaultLib, VaultSecretsContext
from ansible.plugins.action import ActionBase
from ansible.template import Templar, trust_as_template

# Modules are no package that could be imported by name.
_spec = importlib.util.spec_from_file_location(
    "hothouse_files_module", Path(__file__).parents[1] / "modules" / "hothouse_files.py"
)
assert _spec and _spec.loader
module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(module)

Entry = dict[str, Any]
VAULT_HEADER = b"$ANSIBLE_VAULT;"


class ActionModule(ActionBase):
    """The `hothouse_files` action."""

    _requires_connection = True
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Render, send, notify. Raises AnsibleActionFail for what is wrong before the host is asked."""
        super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _, args = self.validate_argument_spec(module.ARGUMENT_SPEC)
        entries = args["files"]
        try:
            module.check_entries(entries)
        except module.FilesError as error:
            raise AnsibleActionFail(str(error)) from None

        self._templars: dict[str, Templar] = {}
        contents = [self._content(entry, task_vars) for entry in entries]
        module_args = {
            "files": [_for_host(entry) for entry in entries],
            "contents": module.pack(contents),
            **{name: args[name] for name in ("root", "root_owner") if args[name] is not None},
        }
        result = self._execute_module(
            module_name="hothouse_files", module_args=module_args, task_vars=task_vars
        )
        self._notify(entries, result)
        return result

    def _content(self, entry: Entry, task_vars: dict[str, Any]) -> bytes | None:
        if entry["state"] != "file":
            return None
        if entry["template"] is not None:
            return self._render(entry, task_vars)
        if entry["source"] is not None:
            return self._read(entry)
        return to_bytes(str(entry["content"]))

    def _read(self, entry: Entry) -> bytes:
        path = Path(self._find(entry, "files", entry["source"]))
        if not path.is_file():
            raise AnsibleActionFail(f"{entry['path']}: source {entry['source']!r} is not a file: {path}")
        if not _is_vaulted(path):
            return path.read_bytes()
        entry["secret"] = True
        # In memory: a file with what was decrypted would outlive a run that is killed.
        secrets = VaultSecretsContext.current().secrets or []
        try:
            return bytes(VaultLib(secrets).decrypt(path.read_bytes()))
        except AnsibleError as error:
            raise AnsibleActionFail(f"{entry['path']}: source {entry['source']!r}: {error}") from None

    def _render(self, entry: Entry, task_vars: dict[str, Any]) -> bytes:
        """Do what ansible.builtin.template does, except for its template_* variables."""
        name = entry["template"]
        source = self._find(entry, "templates", name)
        entry["secret"] = entry["secret"] or _is_vaulted(Path(source))
        text = trust_as_template(self._loader.get_text_file_contents(source))
        templar = self._templar_for(str(Path(source).parent), task_vars)
        where = f"{entry['path']}: template {name!r}"
        try:
            rendered = templar.template(text, escape_backslashes=False, overrides={"trim_blocks": True})
        except AnsibleError as error:
            if isinstance(error, AnsibleTemplateSyntaxError):
                where += f", line {getattr(error.__cause__, 'lineno', '?')}"
            # These two quote the template. What a filter or a lookup says may hold the value it choked on.
            elif entry["secret"] and not isinstance(error, AnsibleUndefinedVariable):
                kind = type(error.__cause__ or error).__name__
                raise AnsibleActionFail(f"{where}: {kind}, of which no more is shown: secret") from None
            raise AnsibleActionFail(where, obj=error.obj) from error
        return b"" if rendered is None else to_bytes(rendered, errors="surrogate_or_strict")

    def _templar_for(self, folder: str, task_vars: dict[str, Any]) -> Templar:
        """Return a templar whose `include` and `import` look where ansible.builtin.template's do."""
        if folder not in self._templars:
            roots = [*task_vars.get("ansible_search_path", []), self._loader.get_basedir(), folder]
            paths = [path for root in roots for path in (str(Path(root, "templates")), root)]
            self._templars[folder] = self._templar.copy_with_new_env(
                searchpath=paths, available_variables=task_vars
            )
        return self._templars[folder]

    def _find(self, entry: Entry, folder: str, name: str) -> str:
        try:
            return self._find_needle(folder, name)
        except AnsibleError as error:
            raise AnsibleActionFail(f"{entry['path']}: {error}") from None

    def _notify(self, entries: list[Entry], result: dict[str, Any]) -> None:
        """Add the handlers of changed entries to the task's own, which Ansible puts into the result."""
        changed = set(result.get("files", ()))
        names = list(self._task.notify or [])
        for entry in entries:
            if entry["path"] in changed:
                names += entry["notify"] or []
        self._task.notify = list(dict.fromkeys(names)) or None


def _is_vaulted(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(VAULT_HEADER)) == VAULT_HEADER


def _for_host(entry: Entry) -> dict[str, Any]:
    here = ("template", "source", "content", "notify")
    return {key: value for key, value in entry.items() if key not in here}
