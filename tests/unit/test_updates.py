"""When hosts upgrade, and what they are told about it."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from conftest import BUNDLE, load_plugin

filters = load_plugin("filter/hothouse")
TEMPLATES = BUNDLE / "roles/prepare/templates"


def rendered(name: str, **variables: Any) -> str:
    environment = jinja2.Environment(
        trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["upgrade_time"] = filters.upgrade_time
    return environment.from_string((TEMPLATES / name).read_text()).render(**variables)


def test_hosts_of_a_whole_day_have_times_of_their_own() -> None:
    times = [filters.upgrade_time(slot) for slot in range(72)]
    assert times[:3] == ["02:00", "02:20", "02:40"] and len(set(times)) == 72
    assert filters.upgrade_time(72) == times[0]


@pytest.mark.parametrize("on", [True, False])
def test_only_security_updates_are_installed_if_any(on: bool) -> None:
    text = rendered("52hothouse.j2", prepare_security_updates=on)
    assert f'APT::Periodic::Unattended-Upgrade "{int(on)}";' in text
    assert ("#clear Unattended-Upgrade::Origins-Pattern;" in text) == on
    assert text.count("label=Debian-Security") == (2 if on else 0)
    # The configuration of the roles stays, also in an upgrade by hand.
    assert "--force-confold" in text


def test_the_timer_keeps_to_its_time() -> None:
    text = rendered("apt-daily-upgrade.timer.conf.j2", prepare_security_updates_slot=4)
    assert (
        "OnCalendar=\nOnCalendar=*-*-* 03:20\nRandomizedDelaySec=0\n" in text and "Persistent=false" in text
    )
