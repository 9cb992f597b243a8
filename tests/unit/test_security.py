"""docs/security.md, the roles and the account file agree, as far as that shows without a host."""

from __future__ import annotations

import re

import pytest
import yaml
from conftest import BUNDLE, shipped

TEXT = (BUNDLE / "docs/security.md").read_text()
VARIABLES = yaml.safe_load((BUNDLE / "roles/prepare/vars/main.yml").read_text())
ACCOUNTS = (BUNDLE / "roles/prepare/files/hothouse.conf").read_text()


def lines(heading: str, first: str) -> list[list[str]]:
    """The cells of each line of a table."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = section.partition(f"| {first} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


PROCESSES = lines("Every process", "process") + lines("What runs for a moment", "unit")


def test_every_account_is_created_without_a_shell_and_a_home() -> None:
    created = re.findall(r'^u (\S+) - ".+" - -$', ACCOUNTS, re.M)
    assert created == VARIABLES["__prepare_accounts"]
    assert all(line.startswith(("#", "u ")) for line in ACCOUNTS.splitlines())


def test_every_line_is_for_a_noun_that_some_scenario_has() -> None:
    """A line that no host ever has would be compared with nothing."""
    nouns = {cells[1].strip("`") for cells in PROCESSES}
    known = {*VARIABLES["__prepare_packages"], "beat", "worker", "every host"}
    assert nouns <= known, nouns - known
    # The application is none of its own, and its commands are there.
    assert known - nouns == set()


@pytest.mark.parametrize("inventory", ["local", "staging", "prod"])
def test_every_unit_of_ours_is_in_the_list_with_its_account(inventory: str) -> None:
    listed: dict[str, str] = {
        re.findall(r"`([^`]+)`", cells[0])[0]: cells[2].strip("`") for cells in PROCESSES
    }
    seen = 0
    for files in shipped(inventory).values():
        for path, text in files["rendered"].items():
            match = re.fullmatch(r"/etc/systemd/system/([\w@-]+\.service)", path)
            if match:
                account = re.search(r"^User=(\S+)$", text, re.M)
                unit = match[1].replace("@.", "@*.")
                assert unit in listed, unit
                if account:
                    assert listed[unit] == account[1], unit
                    seen += 1
    assert seen >= 3


def test_the_client_of_acme_has_the_rights_that_the_list_says() -> None:
    """No scenario has it from the beginning, so no test of hosts sees its line."""
    unit = (BUNDLE / "roles/nginx/files/nginx-acme.service").read_text()
    (line,) = [cells for cells in PROCESSES if cells[0] == "`nginx-acme.service`"]
    paths = re.findall(r"^ReadWritePaths=(.+)$", unit, re.M)
    paths += [f"/var/lib/{name}" for name in re.findall(r"^StateDirectory=(.+)$", unit, re.M)]
    assert set(re.findall(r"`([^`]+)`", line[4])) == set(paths)
    assert line[2] == "one of its own" and "\nDynamicUser=yes\n" in unit
    assert line[3] == "none" and "\nCapabilityBoundingSet=\n" in unit and "\nNoNewPrivileges=yes\n" in unit


def test_no_two_services_of_celery_share_an_account() -> None:
    files = {path: text for files in shipped("prod").values() for path, text in files["rendered"].items()}
    accounts = [
        re.findall(r"^(?:User|Group)=(\S+)$", files[f"/etc/systemd/system/celery-{name}.service"], re.M)
        for name in ("worker@", "beat", "flower")
    ]
    assert accounts == [[f"hothouse-{name}"] * 2 for name in ("worker", "beat", "flower")]
