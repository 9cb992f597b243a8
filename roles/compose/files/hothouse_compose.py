"""What systemd does for the services on hosts, for those in containers; roles/compose puts it beside hothouse_celery.

`start FILE COMMAND…`   reads the login of Flower from an .env file, hands it over as credentials, and becomes COMMAND
`check WHAT [VALUE]`    exits with 0 if the service in this container does its work:
                        beat, flower PREFIX, mail, worker NAME
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import smtplib
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

FLOWER_PORT = 5555
MAIL_PORT = 1025
SHORTEST_PASSWORD = 12
CHECK_SECONDS = 9  # after which a check is killed: a client may try for ever to reach a broker that is gone
CONFIGURATION_ERROR = 78  # EX_CONFIG of sysexits.h


class LoginError(Exception):
    """What is wrong with the login in .env, and how to mend it; never the password itself."""


def read_env(text: str) -> dict[str, str]:
    """The variables of an .env file as Compose writes them: NAME=value, in quotes or not."""
    variables = {}
    for line in text.splitlines():
        match = re.fullmatch(r"\s*(?:export\s+)?(\w+)\s*=\s*(.*?)\s*", line)
        if match:
            value = match[2]
            if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
                value = value[1:-1]
            variables[match[1]] = value
    return variables


def read_login(text: str) -> tuple[str, str]:
    """FLOWER_USER and FLOWER_PASSWORD of an .env file. Raises LoginError for what Flower would misread or is weak."""
    variables = read_env(text)
    user, password = variables.get("FLOWER_USER", ""), variables.get("FLOWER_PASSWORD", "")
    if not re.fullmatch(r"[!-~]+", user) or set(user) & set(":,"):
        raise LoginError("FLOWER_USER has to be printable ASCII without blanks, `:` and `,`")
    if len(password) < SHORTEST_PASSWORD:
        raise LoginError(f"FLOWER_PASSWORD has to have at least {SHORTEST_PASSWORD} characters")
    if not re.fullmatch(r"[!-~]+", password) or "," in password:
        raise LoginError("FLOWER_PASSWORD has to be printable ASCII without blanks and `,`")
    if user == password:
        raise LoginError("FLOWER_PASSWORD must not be FLOWER_USER")
    return user, password


def start(file: Path, command: list[str]) -> None:
    """Write the login into $CREDENTIALS_DIRECTORY, which is memory, and run the command in this process."""
    try:
        login = read_login(file.read_text())
    except PermissionError:
        raise LoginError(
            f"the user {os.getuid()} of this container may not read it; run the playbook again"
        ) from None
    except OSError as error:
        raise LoginError(f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LoginError("it is not UTF-8") from None
    for name, value in zip(("user", "password"), login, strict=True):
        path = Path(os.environ["CREDENTIALS_DIRECTORY"]) / name
        path.unlink(missing_ok=True)
        path.touch(0o400)
        path.chmod(0o600)
        path.write_text(value)
        path.chmod(0o400)
    os.execvp(command[0], command)


def check_flower(prefix: str) -> bool:
    """Flower lets its login in and reaches the broker: the lengths of the queues come from there."""
    folder = Path(os.environ["CREDENTIALS_DIRECTORY"])
    login = base64.b64encode(
        f"{(folder / 'user').read_text()}:{(folder / 'password').read_text()}".encode()
    ).decode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{FLOWER_PORT}{prefix}/api/queues/length",
        headers={"Authorization": f"Basic {login}"},
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        return "active_queues" in json.load(answer)


def check_worker(name: str) -> bool:
    """The worker of this name answers a ping that goes through the broker."""
    os.environ.pop("HOTHOUSE_APP", None)  # the application itself is not needed to ask
    from hothouse_celery import app

    return bool(app.control.ping(destination=[name], timeout=5, limit=1))


def check_beat(_: str) -> bool:
    """Some beat holds the lock, and no scheduled task is later than the lock's time."""
    from redis import Redis

    settings = json.loads(Path(os.environ["HOTHOUSE_SETTINGS"]).read_text())
    prefix, patience = settings["redbeat_key_prefix"], settings["redbeat_lock_timeout"]
    url = (Path(os.environ["CREDENTIALS_DIRECTORY"]) / "broker_url").read_text().strip()
    with Redis.from_url(url, socket_timeout=5) as redis:
        due = redis.zrange(f"{prefix}:schedule", 0, 0, withscores=True)
        return bool(redis.exists(f"{prefix}:lock")) and (not due or time.time() - due[0][1] < patience)


def check_mail(_: str) -> bool:
    """The mail server greets and answers."""
    with smtplib.SMTP("127.0.0.1", MAIL_PORT, timeout=5) as connection:
        return connection.noop()[0] == 250


CHECKS: dict[str, Callable[[str], bool]] = {
    "beat": check_beat,
    "flower": check_flower,
    "mail": check_mail,
    "worker": check_worker,
}


def main() -> int:
    """Exit codes: 78 for a login that does not do, 1 for a service that does not work."""
    match sys.argv[1:]:
        case ["start", file, *command] if command:
            try:
                start(Path(file), command)
            except LoginError as error:
                print(
                    f"Flower does not start, because of its login in .env: {error}. Mend the file that is mounted at "
                    f"{file}, then run: docker-compose restart flower",
                    file=sys.stderr,
                )
                return CONFIGURATION_ERROR
        case ["check", what, *value] if what in CHECKS:
            signal.alarm(CHECK_SECONDS)
            return 0 if CHECKS[what](value[0] if value else "") else 1
    print(__doc__, file=sys.stderr)
    return 64


if __name__ == "__main__":
    sys.exit(main())
