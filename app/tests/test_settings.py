from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import forget_settings

from campaigns import settings
from campaigns.settings import SettingsError


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CAMPAIGNS_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    forget_settings()


def test_importing_the_app_needs_no_settings() -> None:
    subprocess.run(
        [sys.executable, "-c", "import campaigns.tasks, campaigns.cli; from campaigns.celery import app"],
        env={},
        check=True,
    )


def test_every_missing_setting_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"redis_url.*CREDENTIALS_DIRECTORY"):
        settings.redis_url()
    with pytest.raises(SettingsError, match="CAMPAIGNS_SMTP_URL is not set"):
        settings.smtp()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with pytest.raises(SettingsError, match="redis_url"):
        settings.redis_url()
    monkeypatch.setenv("CAMPAIGNS_SMTP_URL", "smtps://ada@mail.example.com")
    with pytest.raises(SettingsError, match="smtp_password"):
        settings.smtp()
    (tmp_path / "smtp_password").write_text("\n")
    with pytest.raises(SettingsError, match="smtp_password is empty"):
        settings.smtp()


@pytest.mark.parametrize(
    ("url", "security", "port"),
    [
        ("smtp://mail.example.com", "smtp", 25),
        ("smtp+starttls://mail.example.com", "smtp+starttls", 587),
        ("smtps://mail.example.com", "smtps", 465),
        ("smtp://mail.example.com:2525", "smtp", 2525),
    ],
)
def test_the_scheme_decides_on_security_and_port(
    url: str, security: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMPAIGNS_SMTP_URL", url)
    assert (settings.smtp().security, settings.smtp().port) == (security, port)


def test_the_user_is_decoded_and_gets_the_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smtp_password").write_text("pass word\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("CAMPAIGNS_SMTP_URL", "smtps://ada%40example.com@mail.example.com")
    assert (settings.smtp().user, settings.smtp().password) == ("ada@example.com", "pass word")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mail.example.com:25", "is not usable"),
        ("http://mail.example.com", "is not usable"),
        ("smtp://mail.example.com:99999", "[Pp]ort"),
        ("smtps://ada:secret@mail.example.com", "holds a password"),
        ("smtp://ada@mail.example.com", "without TLS"),
    ],
)
def test_a_bad_smtp_url_is_refused(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMPAIGNS_SMTP_URL", url)
    with pytest.raises(SettingsError, match=f"CAMPAIGNS_SMTP_URL.*{message}") as error:
        settings.smtp()
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "86401"])
def test_a_bad_number_is_refused_by_name(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMPAIGNS_CHECK_SECONDS", value)
    with pytest.raises(SettingsError, match="CAMPAIGNS_CHECK_SECONDS must be a whole number of seconds"):
        settings.check_seconds()


@pytest.mark.parametrize("value", ["-1", "11", "all"])
def test_a_bad_number_of_replicas_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.confirm_replicas() == 0
    monkeypatch.setenv("CAMPAIGNS_CONFIRM_REPLICAS", value)
    with pytest.raises(SettingsError, match="CAMPAIGNS_CONFIRM_REPLICAS must be a whole number from 0 to 10"):
        settings.confirm_replicas()


def test_only_the_settings_module_reads_the_environment() -> None:
    source = Path(settings.__file__).parent
    readers = {path.name for path in source.glob("*.py") if "environ" in path.read_text()}
    assert readers == {"settings.py"}
