"""What playbooks/compose.yml renders, from the shipped inventories, and the script that starts and checks services."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from conftest import BUNDLE, Play

ROLE = BUNDLE / "roles/compose"
FILES = ("docker-compose.yml", "docker-compose.prod.yml")


def run_playbook(folder: Path, inventory: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Render into a folder; releases are built elsewhere, so their tasks find the archives in place."""
    return subprocess.run(
        [
            "ansible-playbook", "-i", BUNDLE / "inventories" / inventory, "-e", f"compose_directory={folder}",
            "-e", "{__compose_released: []}", BUNDLE / "playbooks/compose.yml", *words,
        ],
        cwd=BUNDLE,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "FLOWER_"))},
            "ANSIBLE_CONFIG": str(BUNDLE / "ansible.cfg"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


GREETING = 'it\'s a "$quoted" value, with spaces, ü & more'
QUEUE = 'it\'s-"$quoted"-\\ü'
EXTRA = [
    "-e",
    json.dumps(
        {
            "app_environment": {"GREETING": GREETING, "SMTP_URL": "{{ app_smtp_url }}"},
            "app_extra_queues": [QUEUE],
            "worker_pools": [
                {"name": "default", "queues": ["default", QUEUE]},
                {"name": "email_senders", "queues": ["email_senders"], "pool": "threads"},
            ],
        }
    ),
]


@pytest.fixture(scope="module", params=["local", "prod"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / ".env").write_text("# mine\nFLOWER_USER=me\nOTHER=1\n")
    done = run_playbook(folder, request.param, *EXTRA)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return folder


def compose(project: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((project / name).read_text())
    return document


def test_a_rerun_changes_nothing(project: Path) -> None:
    done = run_playbook(project, re.sub(r"\d+$", "", project.name), *EXTRA)
    assert re.search(r"\bchanged=0\b", done.stdout), done.stdout[-2000:]


def test_what_is_in_env_is_kept_and_what_is_missing_is_added(project: Path) -> None:
    lines = (project / ".env").read_text().splitlines()
    assert lines[:3] == ["# mine", "FLOWER_USER=me", "OTHER=1"]
    assert re.fullmatch(r"FLOWER_PASSWORD=\w{40}", lines[3]) and len(lines) == 4
    assert stat.S_IMODE((project / ".env").stat().st_mode) == 0o600


def test_every_mounted_file_is_there(project: Path) -> None:
    found = 0
    for name in FILES:
        for service in compose(project, name)["services"].values():
            for volume in service["volumes"]:
                if volume.startswith("."):
                    assert (project / volume.split(":")[0]).exists(), volume
                    found += 1
            build = service["build"]
            assert (project / build["context"] / build["dockerfile"]).is_file()
    assert found > 20


def test_secrets_are_for_the_containers_user_alone(project: Path) -> None:
    credentials = yaml.safe_load((project / ".hothouse/compose/credentials.yml").read_text())["credentials"]
    secrets = [
        max(value.splitlines(), key=len) for name, value in credentials.items()
        if name not in ("flower_user", "ca_certificate", "nginx_certificate")
    ]  # fmt: skip
    env = project / ".env"
    holding = [
        path for path in project.rglob("*")
        if path.is_file() and any(secret in path.read_text() for secret in secrets)
    ]  # fmt: skip
    assert {env.name, "worker_broker_url", "hothouse.key", "redis_admin"} <= {path.name for path in holding}
    for path in holding:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        if path.name != "credentials.yml":
            assert path.stat().st_uid == env.stat().st_uid != 0, path


def test_the_credentials_are_not_those_of_the_environment(project: Path) -> None:
    own = BUNDLE / "inventories/local/group_vars/all/credentials.yml"
    text = (project / ".hothouse/compose/root/etc/hothouse/credentials/redis_admin").read_text().strip()
    assert len(text) == 40
    assert not own.exists() or text not in own.read_text()


def test_containers_are_locked_down(project: Path) -> None:
    owner = (project / ".env").stat()
    for name in FILES:
        document = compose(project, name)
        assert "version" not in document
        for service, settings in document["services"].items():
            assert settings["user"] == f"{owner.st_uid}:{owner.st_gid}", service
            assert settings["read_only"] is True and settings["cap_drop"] == ["ALL"], service
            assert settings["security_opt"] == ["no-new-privileges:true"], service
            assert settings["healthcheck"]["test"], service
            assert "env_file" not in settings, service


def test_services_run_the_commands_of_the_units(project: Path) -> None:
    """What the units start on hosts, with another name for the host; options that only a container needs are more."""
    root = project / ".hothouse/compose/root/etc/systemd/system"
    for name in FILES:
        for service, settings in compose(project, name)["services"].items():
            noun, _, instance = service.partition("-")
            if noun not in ("worker", "beat", "flower"):
                continue
            unit = (root / f"celery-{noun}{'@' if instance else ''}.service").read_text()
            start = re.search(r"^ExecStart=(?:.*?\\\n)*.*$", unit, re.M)
            assert start
            command = start[0].replace("\\\n", " ").split()[1:]
            options = re.search(r"WORKER_OPTIONS=(.*)", (root.parents[1] / f"hothouse/worker-{instance}.env").read_text()) if instance else None  # noqa: E501  # fmt: skip
            expected: list[str] = []
            for word in command:
                if word == "$WORKER_OPTIONS" and options:
                    # systemd unquotes as it reads the file, and again as it splits.
                    expected += shlex.split(re.sub(r"\\(.)", r"\1", options[1]))
                elif word.startswith("%i@"):
                    expected.append(f"{instance}@compose")
                else:
                    expected.append(word)
            command = [word.replace("$$", "$") for word in settings["command"]]
            assert not [word for word in expected if word not in command], service
            assert service != "worker-default-1" or f"--queues=default,{QUEUE}" in command


def test_flower_brings_what_it_needs(project: Path) -> None:
    for name, more in zip(FILES, (set(), {"nginx"}), strict=True):
        services = compose(project, name)["services"]
        workers = {service for service in services if service.startswith("worker-")}
        assert workers
        assert set(services["flower"]["depends_on"]) == {"redis"} | workers | more
        assert "ports" not in services["redis"]
    assert "ports" not in compose(project, FILES[1])["services"]["flower"]


def test_mail_goes_nowhere_but_to_the_container(project: Path) -> None:
    """Whatever app_smtp_url is in the inventory."""
    for name in FILES:
        for service, settings in compose(project, name)["services"].items():
            if service.startswith(("worker-", "beat")):
                assert settings["environment"]["SMTP_URL"] == "smtp://mail:1025", service


def test_the_packages_are_those_of_the_hosts(project: Path) -> None:
    wanted = yaml.safe_load((BUNDLE / "roles/prepare/vars/main.yml").read_text())["__prepare_packages"]
    services = compose(project, FILES[1])["services"]
    for noun in ("redis", "nginx", "mail"):
        assert services[noun]["build"]["args"]["PACKAGES"].split() == wanted[noun]


def test_values_of_the_environment_keep_their_dollars(project: Path) -> None:
    for name in FILES:
        environment = compose(project, name)["services"]["beat"]["environment"]
        assert environment["GREETING"] == GREETING.replace("$", "$$")


# --- the options of our modules that make it possible


def test_below_a_root_everything_is_relocated_and_nothing_is_validated(
    play: Callable[..., Play], tmp_path: Path
) -> None:
    owner = f"{os.getuid()}:{os.getgid()}"
    (tmp_path / "etc").mkdir(mode=0o700)
    task = {
        "hothouse_files": {
            "files": [
                {"path": "/etc/x/y/secret", "content": "s\n", "mode": "0640", "secret": True, "group": "nobody-such"},
                {"path": "/etc/x/y/plain", "content": "p\n", "validate": "false %s", "notify": ["Never"]},
                {"path": "/etc/x", "state": "directory", "mode": "0750"},
                {"path": "/etc/gone/away", "state": "absent"},
            ],
        }
    }  # fmt: skip
    redirected = [
        {
            "block": [task],
            "module_defaults": {"hothouse_files": {"root": str(tmp_path), "root_owner": owner}},
        }
    ]  # fmt: skip
    done = play(redirected)
    assert done.code == 0, done.output
    modes = {
        path.relative_to(tmp_path).as_posix(): f"{stat.S_IMODE(path.stat().st_mode):o}"
        for path in (tmp_path / "etc", *(tmp_path / "etc").rglob("*"))
    }
    assert modes == {
        "etc": "700", "etc/x": "750", "etc/x/y": "755", "etc/x/y/secret": "600", "etc/x/y/plain": "644"
    }  # fmt: skip
    assert play(redirected).results[0]["changed"] is False


def test_a_root_needs_an_owner_in_numbers(play: Callable[..., Play], tmp_path: Path) -> None:
    files = [{"path": "/x", "content": "x"}]
    for owner in ({}, {"root_owner": "me"}):
        done = play([{"hothouse_files": {"files": files, "root": str(tmp_path), **owner}}])
        assert done.code != 0 and "root_owner must be two numbers" in done.output
    assert not (tmp_path / "x").exists()


def test_an_archive_is_built_for_a_debian_that_is_not_there(
    play: Callable[..., Play], tmp_path: Path
) -> None:
    source = BUNDLE / "tests/unit/data/greeter"
    options = {
        "source": str(source), "path": "/nowhere", "cache": str(tmp_path / "cache"),
        "archive": str(tmp_path / "release.zip"), "account": "nobody", "target": {"python": "3.13.5", "glibc": "2.41"},
    }  # fmt: skip
    done = play([{"hothouse_release": options}])
    assert done.code == 0, done.output
    first = done.results[0]
    assert first["changed"] is True and (tmp_path / "release.zip").stat().st_size > 1000
    assert play([{"hothouse_release": options}]).results[0]["changed"] is False
    options["target"] = {"python": "3.11.2", "glibc": "2.36"}
    assert play([{"hothouse_release": options}], "--check").results[0]["changed"] is True


# --- the script in the containers


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hothouse_compose", ROLE / "files/hothouse_compose.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)  # a role is no place for it
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "text",
    [
        "FLOWER_USER=ops\nFLOWER_PASSWORD=with=equals&colon:\n",
        "# note\r\nFLOWER_USER=ops\r\nFLOWER_PASSWORD=with=equals&colon:\r\n",
        "export FLOWER_USER='ops'\nFLOWER_PASSWORD = \"with=equals&colon:\"\nOTHER=1",
        "FLOWER_PASSWORD=first-that-loses\nFLOWER_USER=ops\nFLOWER_PASSWORD=with=equals&colon:",
    ],
)
def test_a_login_is_read_as_compose_reads_it(script: ModuleType, text: str) -> None:
    assert script.read_login(text) == ("ops", "with=equals&colon:")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "FLOWER_USER has to be"),
        ("FLOWER_USER=\nFLOWER_PASSWORD=long-enough-password", "FLOWER_USER has to be"),
        ("FLOWER_USER=a:b\nFLOWER_PASSWORD=long-enough-password", "FLOWER_USER has to be"),
        ("FLOWER_USER=a,b\nFLOWER_PASSWORD=long-enough-password", "FLOWER_USER has to be"),
        ("FLOWER_USER=admin\nFLOWER_PASSWORD=admin", "at least 12 characters"),
        ("FLOWER_USER=ops", "at least 12 characters"),
        ("FLOWER_USER=ops\nFLOWER_PASSWORD=eleven-char", "at least 12 characters"),
        ("FLOWER_USER=ops\nFLOWER_PASSWORD=with-a,comma-in-it", "without blanks and `,`"),
        ("FLOWER_USER=ops\nFLOWER_PASSWORD=with-a-comment # here", "without blanks and `,`"),
        ("FLOWER_USER=ops\nFLOWER_PASSWORD=mit-Umläuten-darin", "without blanks and `,`"),
        ("FLOWER_USER=the-same-twice\nFLOWER_PASSWORD=the-same-twice", "must not be FLOWER_USER"),
    ],
)
def test_a_login_that_does_not_do_is_refused_without_being_shown(
    script: ModuleType, text: str, reason: str
) -> None:
    with pytest.raises(script.LoginError) as error:
        script.read_login(text)
    assert reason in str(error.value)
    password = text.partition("FLOWER_PASSWORD=")[2]
    assert not password or password not in str(error.value)


def start(folder: Path, file: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROLE / "files/hothouse_compose.py", "start", file, *command],
        env={"CREDENTIALS_DIRECTORY": str(folder), "PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_login_is_handed_over_as_credentials_whenever_the_service_starts(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    for password in ("first-of-the-passwords", "second-of-the-passwords"):
        env.write_text(f"FLOWER_USER=ops\nFLOWER_PASSWORD={password}\n")
        done = start(tmp_path, env, "sh", "-c", f"cat {tmp_path}/user {tmp_path}/password")
        assert (done.returncode, done.stdout) == (0, f"ops{password}")
        assert stat.S_IMODE((tmp_path / "password").stat().st_mode) == 0o400


def test_nothing_starts_with_a_login_that_does_not_do(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("FLOWER_USER=admin\nFLOWER_PASSWORD=admin\n")
    done = start(tmp_path, env, "touch", str(tmp_path / "started"))
    assert done.returncode == 78 and "restart flower" in done.stderr
    done = start(tmp_path, tmp_path / "missing", "touch", str(tmp_path / "started"))
    assert done.returncode == 78 and "cannot be read" in done.stderr
    assert not (tmp_path / "started").exists()


def test_an_unknown_command_explains_the_known_ones(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROLE / "files/hothouse_compose.py", "check", "everything"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 64 and "worker NAME" in done.stderr
