"""No secret of the credentials file is anywhere but where it belongs."""

from __future__ import annotations

import base64
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Stack


def spellings(stack: Stack) -> list[str]:
    """What a leak would show: each secret, of a key its middle lines."""
    found = []
    for name, value in stack.secrets.items():
        if name == "__user":
            continue  # a name is no secret: nginx logs who asked
        lines = [line for line in value.splitlines() if line and not line.startswith("-----")]
        found += [max(lines, key=len)]
    logins = (stack.login, f"monitor:{stack.secrets['monitor']}")
    found += [base64.b64encode(login.encode()).decode() for login in logins]
    own = stack.credentials_file.parent / "tally_key"
    found += [own.read_text().strip()] if own.exists() else []
    assert len(found) >= 9 and all(len(text) > 8 for text in found)
    return found


def grep(stack: Stack, host: str, command: str) -> str:
    """Names of what holds a secret; the secrets go to grep through standard input of the remote shell."""
    patterns = "\n".join(spellings(stack))
    done = stack.host(host).run(
        f"cat > /run/patterns <<'END'\n{patterns}\nEND\nchmod 600 /run/patterns; {command}"
    )
    stack.host(host).run("rm /run/patterns")
    return done.stdout


def test_no_secret_is_in_an_environment_or_a_command_line(stack: Stack) -> None:
    # Not the processes of the search itself: a shell whose command line holds the patterns.
    for name in stack.variables:
        hits = grep(
            stack, name,
            "for p in /proc/[0-9]*; do c=$(tr '\\0' ' ' < $p/cmdline 2>/dev/null); "
            "case \"$c\" in *run/patterns*) continue;; esac; "
            "grep -aFqf /run/patterns $p/environ 2>/dev/null && echo environ: $c; "
            "printf %s \"$c\" | grep -aFqf /run/patterns && echo cmdline: $p; done; true",
        )  # fmt: skip
        assert hits == "", name


def test_no_secret_is_in_the_journal(stack: Stack) -> None:
    for name in stack.variables:
        assert (
            grep(stack, name, "journalctl --no-pager -o export | grep -aFf /run/patterns | cut -c1-60") == ""
        ), name


def test_no_secret_is_in_what_systemd_shows(stack: Stack) -> None:
    for name in stack.variables:
        assert grep(stack, name, "systemctl show '*' --all | grep -aFf /run/patterns | cut -c1-60") == "", (
            name
        )


def test_no_secret_is_in_a_file_that_others_may_read(stack: Stack) -> None:
    for name in stack.variables:
        hits = grep(
            stack, name,
            "find /etc /home /opt /root /run /srv /tmp /usr/local /var -xdev -type f -perm -004 -size -8M -print0 "
            "| xargs -0 grep -alFf /run/patterns; true",
        )  # fmt: skip
        assert hits == "", name


def test_flower_shows_no_secret_to_those_who_are_logged_in(stack: Stack) -> None:
    """Neither the settings of the workers, which it asks them for, nor the arguments of tasks."""
    for path in ("/flower/api/workers?refresh=1", "/flower/api/tasks", "/flower/broker"):
        answer = stack.request(path, stack.login)
        assert answer.status == 200
        for text in spellings(stack):
            assert text not in answer.body, path


# The one has every file of several hosts, the other secrets of an application.
@pytest.mark.scenarios("prod", "own-app")
def test_ansible_prints_no_secret_however_verbose(stack: Stack, wait: Callable[..., Any]) -> None:
    """A run that writes every secret again, with -vvv and --diff; and it heals what was removed."""
    for name in stack.variables:
        stack.host(name).run(
            "rm -f /etc/hothouse/credentials/* /etc/redis/users.acl /etc/nginx/hothouse.key "
            "/etc/nginx/hothouse.htpasswd /etc/nginx/hothouse-logins.conf /etc/nginx/hothouse-monitor.conf "
            "/etc/prometheus/hothouse/web.yml /etc/prometheus/hothouse/alertmanager.yml"
        )
    done = stack.playbook("-vvv", "--diff", "site.yml")
    for text in spellings(stack):
        assert text not in done.stdout + done.stderr
    assert "[hidden]" in done.stdout
    # That run restarted Redis, too: check mode would predict the start of what systemd is about to start again.
    units = [(stack.host(name), unit) for name in stack.variables for unit in stack.units(name)]
    wait(lambda: all(host.service(unit).is_running for host, unit in units), "every service")
    again = stack.playbook("--check", "--diff", "site.yml")
    changes = [block for block in again.stdout.split("\nTASK ") if "\nchanged: " in block]
    assert changes == []
    for text in spellings(stack):
        assert text not in again.stdout + again.stderr


def test_the_credentials_file_is_for_its_owner_only_and_encrypted_with_a_vault_password(stack: Stack) -> None:
    path = stack.credentials_file
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("$ANSIBLE_VAULT;1.1;AES256")


def test_git_ignores_what_is_generated(stack: Stack) -> None:
    root = Path(__file__).resolve().parents[3]
    for name in (
        "inventories/local/group_vars/all/credentials.yml",
        ".hothouse/ssh/id_ed25519",
    ):
        assert subprocess.run(["git", "-C", root, "check-ignore", "-q", name], check=False).returncode == 0, (
            name
        )
