"""A controller that was lost: what the hosts know comes back with one command, and no run replaces it before."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import Stack

pytestmark = pytest.mark.scenarios("local", "prod")


@pytest.fixture
def fresh(stack: Stack, tmp_path: Path) -> list[str]:
    """Options of ansible-playbook for a checkout without credentials."""
    return [
        *("-e", f"credentials_file={tmp_path}/credentials.yml"),
        *("-e", f"credentials_ca_file={tmp_path}/ca.crt"),
    ]


def read(stack: Stack, path: Path) -> dict[str, str]:
    text = path.read_text()
    if text.startswith("$ANSIBLE_VAULT"):
        text = subprocess.run(
            ["ansible-vault", "view", path], env=stack.environment, capture_output=True, text=True, check=True
        ).stdout
    return dict(yaml.safe_load(text)["credentials"])


def test_a_run_without_the_credentials_of_its_hosts_is_refused(
    stack: Stack, fresh: list[str], tmp_path: Path
) -> None:
    (tmp_path / "credentials.yml").write_text('credentials:\n  own: "kept"\n')
    before = (tmp_path / "credentials.yml").read_text()
    done = stack.playbook("playbooks/prepare.yml", *fresh, check=False)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0 and "playbooks/recover.yml" in said and "credentials_replace=true" in said
    assert "changed=0" in done.stdout and "Ask the host what it runs" not in done.stdout
    assert (tmp_path / "credentials.yml").read_text() == before
    assert not (tmp_path / "ca.crt").exists()
    # With the certificate of the authority no host has to be asked.
    (tmp_path / "ca.crt").write_text((stack.credentials_file.parent / "ca.crt").read_text())
    for words in (["playbooks/check.yml"], ["playbooks/prepare.yml", "--check"]):
        done = stack.playbook(*words, *fresh, check=False)
        said = " ".join((done.stdout + done.stderr).split())
        assert done.returncode != 0 and "playbooks/recover.yml" in said and "credentials_replace=true" in said
        assert "Ask for credentials" not in done.stdout
    assert (tmp_path / "credentials.yml").read_text() == before


def test_a_host_of_another_environment_is_refused(stack: Stack) -> None:
    name = list(stack.variables)[-1]
    host, file, kept = stack.host(name), "/etc/hothouse/ca.crt", "/run/hothouse-test-ca.crt"
    issue = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=stranger"
    host.check_output(f"cp --archive {file} {kept}; {issue} -keyout /dev/null -out {file} 2>/dev/null")
    try:
        done = stack.playbook("playbooks/prepare.yml", "--limit", name, check=False)
        said = " ".join((done.stdout + done.stderr).split())
        assert done.returncode != 0 and f"The host {name} trusts another authority" in said
        assert "changed=0" in done.stdout
        assert "stranger" in host.check_output(f"openssl x509 -noout -subject -in {file}")
    finally:
        host.check_output(f"mv {kept} {file}")


def test_the_hosts_know_every_credential_but_the_key_of_the_authority(
    stack: Stack, fresh: list[str], tmp_path: Path
) -> None:
    done = stack.playbook("playbooks/recover.yml", *fresh, "--diff", "-vvv")
    found, real = read(stack, tmp_path / "credentials.yml"), read(stack, stack.credentials_file)
    unused = set() if len(stack.variables) > 1 else {"redis_replica", "redis_sentinel", "redis_haproxy"}
    # Of these the hosts have hashes.
    readers = {name for name in real if name.startswith("flower_reader_")}
    assert found == {
        name: value
        for name, value in real.items()
        if name not in {"ca_key", "ca_replaced", *unused, *readers}
    }
    assert (tmp_path / "ca.crt").read_text() == real["ca_certificate"]
    text = (tmp_path / "credentials.yml").read_text()
    assert (
        text.startswith("$ANSIBLE_VAULT") and (tmp_path / "credentials.yml").stat().st_mode & 0o777 == 0o600
    )
    for name, value in real.items():
        if name != "flower_user" and not name.endswith("_certificate"):
            assert not [line for line in value.splitlines() if line in done.stdout and "-----" not in line], (
                name
            )
    # What the hosts have is what the inventory gives them, without the authority's key too; the unused are generated.
    playbooks = ["playbooks/app.yml", "playbooks/redis.yml"]
    if not readers:  # nginx gets hashes of their new passwords
        playbooks.append("playbooks/nginx.yml")
    done = stack.playbook(*playbooks, *fresh, "--check")
    changes = [word for word in done.stdout.split() if word.startswith("changed=")]
    assert changes and set(changes) == {"changed=1" if unused else "changed=0"}
