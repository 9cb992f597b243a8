"""Which names a queue can have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hothouse_transport import names
from hothouse_transport.names import unusable


@pytest.mark.parametrize(
    "name",
    [
        "default",
        "a.b:c/d-e",
        "Grüße",
        "очередь",
        "列",
        "📮",
        "👩\u200d🔧",
        "x" * 255,
        "unacked2",
        "my.deliveries",
    ],
)
def test_any_other_name_can_be_a_queue(name: str) -> None:
    assert unusable(name) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        (None, "no text"),
        (5, "no text"),
        (b"default", "no text"),
        (["default"], "no text"),
        ("a b", "a space (U+0020)"),
        ("a\u00a0b", "a space (U+00A0)"),
        ("a\u2028b", "a space (U+2028)"),
        ("a,b", "comma"),
        ("a\nb", "control character U+000A"),
        ("default\x06\x163", "control character U+0006"),
        ("a\x7f", "control character U+007F"),
        ("a\ud800", "control character U+D800"),
        ("a\u202eb", "control character U+202E"),
        ("é" * 128, "longer than 255 bytes"),
        *((name, "reserved") for name in sorted(names.RESERVED | names.INTERNAL)),
        ("_kombu.binding.default", "reserved"),
        ("flower.unacked_index", "reserved"),
        ("celeryev.9f", "reserved"),
        ("worker@host.celery.pidbox", "reserved"),
        ("9f.reply.celery.pidbox", "reserved"),
    ],
)
def test_what_cannot_be_a_queue_is_told_with_its_reason(name: object, reason: str) -> None:
    assert reason in str(unusable(name))


def test_it_can_be_asked_without_anything_installed() -> None:
    code = "import names; assert names.unusable('a b') and not names.unusable('a')"
    folder = Path(names.__file__).parent
    subprocess.run([sys.executable, "-S", "-c", code], cwd=folder, check=True)
