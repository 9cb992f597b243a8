"""The roles' papers agree with each other: specs, defaults, READMEs, and the collections' versions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BUNDLE

ROLES = sorted(path.name for path in (BUNDLE / "roles").iterdir())


def spec(role: str) -> dict[str, Any]:
    text = (BUNDLE / "roles" / role / "meta/argument_specs.yml").read_text()
    options: dict[str, Any] = yaml.safe_load(text)["argument_specs"]["main"]["options"]
    return options


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_specs_name_the_same_values(role: str) -> None:
    """A default that the spec lacks is undocumented; one that the defaults lack is not applied by Ansible."""
    path = BUNDLE / "roles" / role / "defaults/main.yml"
    defaults = yaml.safe_load(path.read_text()) if path.exists() else {}
    documented = {name: option["default"] for name, option in spec(role).items() if "default" in option}
    assert defaults == documented


@pytest.mark.parametrize("role", ROLES)
def test_private_variables_of_a_role_carry_its_name(role: str) -> None:
    path = BUNDLE / "roles" / role / "vars/main.yml"
    for name in yaml.safe_load(path.read_text()) if path.exists() else {}:
        assert name.startswith(f"__{role}_"), name


def test_readmes_are_what_the_specs_say() -> None:
    done = subprocess.run(
        [sys.executable, BUNDLE / "bin/docs", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_role_knows_the_example_application() -> None:
    for path in (BUNDLE / "roles").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert "campaigns" not in path.read_text(), path


def test_files_on_hosts_name_the_role_that_wrote_them() -> None:
    """The first lines lead whoever reads the file on a host back to this repository."""
    for path in [*(BUNDLE / "roles").glob("*/templates/*"), *(BUNDLE / "roles").glob("*/files/*")]:
        if path.is_dir() or path.name == "users.acl.j2" or "{#" in path.read_text()[:3]:
            continue
        role = path.parents[1].name
        assert f"roles/{role}" in "".join(path.read_text().splitlines()[:2]), path


def test_pinned_collections_are_those_of_the_locked_ansible() -> None:
    import ansible_collections

    root = Path(next(iter(ansible_collections.__path__)))
    for collection in yaml.safe_load((BUNDLE / "requirements.yml").read_text())["collections"]:
        manifest = json.loads((root / collection["name"].replace(".", "/") / "MANIFEST.json").read_text())
        assert collection["version"] == manifest["collection_info"]["version"], collection["name"]
