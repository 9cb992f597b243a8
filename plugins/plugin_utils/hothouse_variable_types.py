"""Every variable has the type that its specification says, wherever its value comes from.

`-e name=value`, INI inventories, AWX and look-ups in the environment give strings. A string is no number in JSON, and
the string `false` counts as true. Neither a role nor a fact could mend that, for extra variables beat them all. So
values are converted where Ansible puts the variables of a host together: behind every task, template, condition and
`hostvars`. See docs/decisions/0021-variables-have-the-types-of-their-specification.md.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from ansible._internal._templating._jinja_common import UndecryptableVaultError  # there is no public one
from ansible.module_utils.common.validation import (
    check_type_bool,
    check_type_dict,
    check_type_float,
)
from ansible.parsing.vault import AnsibleVaultError, AnsibleVaultFormatError
from ansible.template import trust_as_template
from ansible.vars.manager import VariableManager

sys.path.append(str(Path(__file__).parent))
import hothouse_addresses as addresses  # found by the line above

ROLES = Path(__file__).parents[2] / "roles"

# Before the name of a variable: its template, whose place is taken by one that converts.
GIVEN = "__given_"

# How to mend that something encrypted cannot be read.
UNLOCK = "name the file of the vault password: --vault-password-file, or ANSIBLE_VAULT_PASSWORD_FILE"

# Variables of the whole environment, which belong to no role.
ENVIRONMENT = {
    "credentials_ca_file": {"type": "str"},
    "credentials_file": {"type": "str"},
    "credentials_replace": {"type": "bool"},
    "credentials_require_vault": {"type": "bool"},
    "environment_folder": {"type": "str"},
    "private_address": {"type": "str", "address": True},
    "private_ca_certificates": {"type": "str"},
    "private_certificate": {"type": "str"},
    "private_key": {"type": "str"},
    "private_services": {"type": "list", "elements": "dict"},
    "private_tls": {"type": "bool"},
}


@functools.cache
def specifications() -> dict[str, dict[str, Any]]:
    """The options of every role: role → name → option, from its meta/argument_specs.yml."""
    return {
        path.parents[1].name: yaml.load(path.read_text(), yaml.CSafeLoader)["argument_specs"]["main"][
            "options"
        ]
        for path in sorted(ROLES.glob("*/meta/argument_specs.yml"))
    }


@functools.cache
def options() -> dict[str, dict[str, Any]]:
    """Every variable that has a type: name → option; where roles share one, that of the role that it is named after."""
    found: dict[str, dict[str, Any]] = dict(ENVIRONMENT)
    for role, names in specifications().items():
        for name, option in names.items():
            if name not in found or name.startswith(f"{role}_"):
                found[name] = option
    return found


def given_name(name: str, variables: Mapping[str, Any]) -> str:
    """The name under which the variables of a host keep what was given as this variable."""
    return GIVEN + name if GIVEN + name in variables else name


def source_folders(sources: Iterable[str]) -> list[Path]:
    """The folders of the sources of an inventory (paths, as they were given), each once; lists of hosts have none."""
    paths = [Path(source) for source in sources if "," not in source]
    return list(dict.fromkeys(path if path.is_dir() else path.parent for path in paths))


def is_locked(error: BaseException | None) -> bool:
    """Whether an error comes from something encrypted for which no password fits."""
    while error:
        if isinstance(error, AnsibleVaultError | AnsibleVaultFormatError | UndecryptableVaultError):
            return True
        error = error.__cause__
    return False


class WrongType(ValueError):
    """A value that cannot be converted; says what was expected."""


def _float(value: Any) -> float:
    """A whole number stays one: 95 is printed as 95."""
    if isinstance(value, bool):
        raise TypeError
    number = value
    if not isinstance(value, int | float):
        try:
            number = int(value)
        except ValueError:
            number = check_type_float(value)
    if number - number:  # infinite, or no number
        raise TypeError
    return number


def _int(value: Any) -> int:
    number = _float(value)
    if number != int(number):
        raise TypeError
    return int(number) if isinstance(number, float) else number


def _str(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise TypeError  # of `no` and 1.10 nobody knows how they were written


def _literal(text: str, kind: type | tuple[type, ...]) -> Any:
    """What a text in brackets holds: JSON, Python or YAML, which differ in quotes and in `true`."""
    for parse in (json.loads, ast.literal_eval, yaml.safe_load):
        with suppress(ValueError, SyntaxError, yaml.YAMLError, MemoryError, RecursionError):
            if isinstance(value := parse(text), kind):
                return value
    raise TypeError


def _list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str):
        raise TypeError
    text = value.strip()
    if text.startswith("{"):  # of commas in a mapping nobody knows what they separate
        raise TypeError
    if text.startswith(("[", "(", "- ")):
        return list(_literal(text, (list, tuple)))
    return [item.strip() for item in re.split(r"[,\n]", text) if item.strip()]


def _dict(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise TypeError
    if value.strip().startswith("{"):
        return _literal(value.strip(), dict)
    return check_type_dict(value) if value.strip() else {}


CONVERT: dict[str, Callable[[Any], Any]] = {
    "bool": check_type_bool,
    "dict": _dict,
    "float": _float,
    "int": _int,
    "list": _list,
    "str": _str,
}
EXPECTED = {
    "bool": "true or false",
    "dict": "a mapping, such as {name: value}",
    "float": "a number",
    "int": "a whole number",
    "list": "a list, such as [a, b] or a,b",
    "str": "a text; put it in quotes",
}


def convert(value: Any, option: Mapping[str, Any]) -> Any:
    """The value in the type of the option, with all that its elements and sub-options say. Raises WrongType.

    A value that has this type already is given back itself.
    """
    kind = option.get("type", "str")
    try:
        converted = CONVERT[kind](value)
    except (TypeError, ValueError):
        if value is None:
            raise WrongType(f"nothing (null) is not {EXPECTED[kind].partition(';')[0]}") from None
        said = repr(value)
        raise WrongType(f"{said if len(said) <= 200 else said[:200] + '…'} is not {EXPECTED[kind]}") from None
    if option.get("address"):  # one form of each, to be compared with what Redis and the kernel say
        return addresses.canonical(converted)
    parts: dict[Any, Mapping[str, Any]] = {}
    if kind == "list" and option.get("elements"):
        element = {**option, "type": option["elements"], "elements": None}
        parts = {number: element for number in range(len(converted))}
    if kind == "dict":
        parts = {name: part for name, part in (option.get("options") or {}).items() if name in converted}
    changed = {}
    for key, part in parts.items():
        if (item := convert(converted[key], part)) is not converted[key]:
            changed[key] = item
    if changed and kind == "list":
        return [changed.get(number, item) for number, item in enumerate(converted)]
    return {**converted, **changed} if changed else converted


def is_template(value: Any) -> bool:
    """Whether Ansible has to work the value out first: a template, something encrypted, or a container of such."""
    if isinstance(value, str):
        return "{{" in value or "{%" in value or "{#" in value
    if isinstance(value, Mapping):
        return any(is_template(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(is_template(item) for item in value)
    return not isinstance(value, bool | int | float | None)


@functools.cache
def _wrapper(name: str) -> Any:
    """What takes the place of a template: it converts what the template gives. See the filter `as_specified`."""
    return trust_as_template(f"{{{{ {GIVEN}{name} | as_specified('{name}') }}}}")


def apply_types(variables: dict[str, Any]) -> None:
    """Give the variables of a host their types. What cannot be converted stays, for the preflight to refuse."""
    for name in options().keys() & variables.keys():
        value, option = variables[name], options()[name]
        as_is = option.get("type", "str") == "str" and not option.get("address")
        if as_is and (isinstance(value, str) or is_template(value)):
            continue  # of a template too: a number that it gives is printed like its text
        if is_template(value):
            variables[GIVEN + name] = value
            variables[name] = _wrapper(name)
        else:
            with suppress(WrongType):
                variables[name] = convert(value, option)


def complaint(name: str, error: WrongType) -> str:
    """What is wrong with a variable; nothing of its value if that is a secret."""
    option = options()[name]
    return (
        f"`{name}` is not {EXPECTED[option.get('type', 'str')]}"
        if option.get("no_log")
        else f"`{name}`: {error}"
    )


def is_installed() -> bool:
    """Whether Ansible converts variables."""
    return hasattr(VariableManager.get_vars, "__wrapped__")


def install() -> None:
    """Let Ansible convert variables. It offers no place for this, so the one method that all go through is extended."""
    if is_installed():
        return
    original = VariableManager.get_vars
    options()  # read once, for all processes that Ansible makes of this one

    @functools.wraps(original)
    def get_vars(self: VariableManager, *args: Any, **kwargs: Any) -> dict[str, Any]:
        variables = original(self, *args, **kwargs)
        apply_types(variables)
        return variables

    VariableManager.get_vars = get_vars
