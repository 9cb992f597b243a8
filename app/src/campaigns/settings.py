"""What the deployment decides. Only this module reads the environment and credentials, when asked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

SMTP_SCHEMES = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
SMTP_FORM = "give smtp://, smtp+starttls:// or smtps://[USER@]HOST[:PORT]"
POLICIES = ("hold", "resend")
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class SettingsError(Exception):
    """A setting is missing or unusable; the message names it and says how to mend it."""


@dataclass(frozen=True)
class Smtp:
    """How to reach the mail server."""

    security: str  # a key of SMTP_SCHEMES
    host: str
    port: int
    user: str | None
    password: str | None
    ca_file: str | None
    reply_seconds: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.security}://{host}:{self.port}"


def check_seconds() -> int:
    """How often beat looks for work, in seconds."""
    return _seconds("CAMPAIGNS_CHECK_SECONDS", 60)


def confirm_replicas() -> int:
    """How many replicas of Redis must know that a mail leaves before it does. 0 where there are none."""
    return _number("CAMPAIGNS_CONFIRM_REPLICAS", 0, least=0, most=10)


def ambiguous() -> str:
    """What becomes of a recipient in doubt, hold or resend; a campaign keeps what it was created with."""
    value = os.environ.get("CAMPAIGNS_AMBIGUOUS") or POLICIES[0]
    if value not in POLICIES:
        raise SettingsError(f"CAMPAIGNS_AMBIGUOUS must be {' or '.join(POLICIES)}, not {value!r}")
    return value


def batch_size() -> int:
    """Recipients per batch; a campaign keeps the size that it was created with."""
    return _number("CAMPAIGNS_BATCH_SIZE", 100)


def retry_seconds() -> int:
    """The pause after a recipient's first temporary failure, in seconds; every further one doubles it."""
    return _seconds("CAMPAIGNS_RETRY_SECONDS", 60)


def claim_seconds() -> int:
    """How long a worker may take from claiming a recipient to DATA, in seconds; then the claim is given back.

    More than two replies of the server may take (smtp.COMMAND_SECONDS).
    """
    return _seconds("CAMPAIGNS_CLAIM_SECONDS", 180)


def requeue_seconds() -> int:
    """After how many seconds a batch that no worker has finished is put into the queue once more."""
    return _seconds("CAMPAIGNS_REQUEUE_SECONDS", 300)


def reply_seconds() -> int:
    """How long to wait for the reply to a mail's final dot, in seconds.

    RFC 5321, 4.5.3.2.6, asks for 10 minutes: whoever leaves earlier does not know the mail's fate.
    """
    return _seconds("CAMPAIGNS_REPLY_SECONDS", 600)


@cache
def redis_url() -> str:
    """The URL of the Redis database that holds the campaigns."""
    return _credential("redis_url")


@cache
def smtp() -> Smtp:
    """How to reach the mail server, from CAMPAIGNS_SMTP_URL and, when that names a user, `smtp_password`."""
    value = os.environ.get("CAMPAIGNS_SMTP_URL", "")
    if not value:
        raise SettingsError(f"CAMPAIGNS_SMTP_URL is not set: {SMTP_FORM}")
    url = urlsplit(value)
    try:
        port = url.port
    except ValueError as error:
        raise SettingsError(f"CAMPAIGNS_SMTP_URL: {error}") from error
    if url.scheme not in SMTP_SCHEMES or not url.hostname:
        raise SettingsError(f"CAMPAIGNS_SMTP_URL is not usable: {SMTP_FORM}")
    if url.password is not None:
        raise SettingsError("CAMPAIGNS_SMTP_URL holds a password: put it into the credential smtp_password")
    if url.username and url.scheme == "smtp" and url.hostname not in LOOPBACK:
        raise SettingsError(
            "CAMPAIGNS_SMTP_URL names a user without TLS, which would send the password in the clear: "
            "use smtp+starttls:// or smtps://"
        )
    return Smtp(
        security=url.scheme,
        host=url.hostname,
        port=port or SMTP_SCHEMES[url.scheme],
        user=unquote(url.username) if url.username else None,
        password=_credential("smtp_password") if url.username else None,
        ca_file=os.environ.get("CAMPAIGNS_SMTP_CA_FILE") or None,
        reply_seconds=reply_seconds(),
    )


def _credential(name: str) -> str:
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise SettingsError(
            f"the credential {name} cannot be read: CREDENTIALS_DIRECTORY is not set, "
            "systemd sets it for units with LoadCredential="
        )
    try:
        value = (Path(folder) / name).read_text().strip()
    except OSError as error:
        raise SettingsError(f"the credential {name} cannot be read: {error}") from error
    if not value:
        raise SettingsError(f"the credential {name} is empty")
    return value


def _number(name: str, default: int, unit: str = "number", least: int = 1, most: int = 86_400) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or not least <= int(value) <= most:
        raise SettingsError(f"{name} must be a whole {unit} from {least} to {most}, not {value!r}")
    return int(value)


def _seconds(name: str, default: int) -> int:
    return _number(name, default, "number of seconds")
