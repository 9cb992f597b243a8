"""What a deployment does to a running stack: little if little changes, nothing if the change is bad."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Stack

pytestmark = pytest.mark.scenarios("local")

# Executions of modules on a host that carries every noun, when nothing is to be done: they are what a rerun costs.
MOST_MODULES = 20
# Where there are readers, nginx checks the logins.
BOTH_PROGRAMS = ("playbooks/flower.yml", "playbooks/nginx.yml")


def started(stack: Stack) -> dict[str, str]:
    """When each service last started, and which release is current."""
    host = stack.first("app")
    units = ["redis-server.service", "nginx.service", *stack.units("local1")]
    times = host.check_output(
        f"systemctl show --value -p InactiveExitTimestampMonotonic {' '.join(units)}"
    ).split()
    release = host.check_output("readlink /opt/hothouse/app/current")
    return dict(zip(units, times, strict=True)) | {"release": release}


def test_a_changed_key_of_a_host_is_told_with_what_to_type(stack: Stack, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-f", tmp_path / "key"], check=True)
    port = stack.variables["local1"]["ansible_port"]
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {(tmp_path / 'key.pub').read_text()}")
    options = f"-o UserKnownHostsFile={known} -o GlobalKnownHostsFile=/dev/null -o ControlPath=none"
    done = stack.playbook("site.yml", "--check", "-e", f"ansible_ssh_common_args='{options}'", check=False)
    assert done.returncode != 0
    assert f"ssh-keygen -R '[127.0.0.1]:{port}'" in " ".join(done.stdout.split())


def test_a_rerun_changes_nothing_and_takes_few_round_trips(stack: Stack) -> None:
    before = started(stack)
    done = stack.playbook("-vvv", "site.yml")
    assert all("changed=0" in line for line in done.stdout.splitlines() if " ok=" in line)
    commands = [line for line in (done.stdout + done.stderr).splitlines() if "<127.0.0.1> SSH: EXEC" in line]
    modules = [line for line in commands if "/usr/bin/python3 && sleep 0" in line]
    assert 5 < len(modules) <= MOST_MODULES, len(modules)
    # What is no module costs a tenth, and is no licence either.
    assert len(commands) <= 2 * MOST_MODULES, len(commands)
    assert started(stack) == before


def test_check_mode_on_a_converged_host_predicts_nothing(stack: Stack) -> None:
    done = stack.playbook("--check", "--diff", "site.yml")
    assert all("changed=0" in line for line in done.stdout.splitlines() if " ok=" in line)


def test_values_that_are_all_strings_change_nothing(stack: Stack) -> None:
    """As -e name=value, AWX and INI inventories give them: every variable of a role whose type is not a text."""
    specs = [
        yaml.safe_load(path.read_text())["argument_specs"]["main"]["options"]
        for path in sorted(REPOSITORY.glob("roles/*/meta/argument_specs.yml"))
    ]
    names = sorted(
        # Secrets are not shown, so they could not be given either.
        {
            name
            for spec in specs
            for name, option in spec.items()
            if option.get("type", "str") != "str" and not option.get("no_log")
        }
    )
    found = {
        name: option["default"] for spec in specs for name, option in spec.items() if "default" in option
    }
    found |= {name: value for name, value in stack.values(names)["local1"].items() if value is not None}
    texts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in found.items()
        if name in names and not name.startswith("compose_")
    }
    assert len(texts) > 80
    extra = Path(stack.credentials_file.parent / "texts.json")
    extra.write_text(json.dumps(texts))
    try:
        done = stack.playbook("--check", "--diff", "site.yml", "-e", f"@{extra}")
    finally:
        extra.unlink()
    assert all("changed=0" in line for line in done.stdout.splitlines() if " ok=" in line)


@pytest.mark.parametrize(
    "celery", ["campaigns.nowhere:app", "campaigns.celery:nothing", "no_such_package:app"]
)
def test_an_application_that_does_not_import_is_refused_and_the_old_one_runs_on(
    stack: Stack, celery: str
) -> None:
    before = started(stack)
    done = stack.playbook(
        "site.yml", "-e", f"app_celery={celery}", "-e", "app_source=" + changed_copy(stack), check=False
    )
    assert done.returncode != 0
    message = " ".join(done.stdout.split())
    assert (
        celery.partition(":")[2 if "nothing" in celery else 0].partition(".")[2] in message
        or celery in message
    )
    assert "was not touched" in message or "keeps running" in message
    assert started(stack) == before
    assert stack.ping("default")


def changed_copy(stack: Stack) -> str:
    """A release that is not on the host yet: the example application with another file."""
    folder = stack.credentials_file.parent / "changed-app"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        REPOSITORY / "app", folder, ignore=shutil.ignore_patterns(".venv", "__pycache__", ".*_cache")
    )
    (folder / "src/campaigns/changed.py").write_text('"""Nothing."""\n')
    return str(folder)


def test_a_release_is_installed_beside_the_old_one_and_only_its_services_restart(stack: Stack) -> None:
    before = started(stack)
    stack.playbook("site.yml", "-e", "app_source=" + changed_copy(stack))
    after = started(stack)
    assert after["release"] != before["release"]
    for unit, time in after.items():
        if unit.startswith(("celery-worker", "celery-beat")):
            assert time != before[unit], unit
        elif unit != "release":
            assert time == before[unit], unit
    assert (
        stack.first("app")
        .file(f"/opt/hothouse/app/{before['release'].removeprefix('/opt/hothouse/app/')}")
        .exists
    )
    stack.playbook("site.yml")
    assert started(stack)["release"] == before["release"]


@pytest.fixture
def restored_login(stack: Stack) -> Iterator[None]:
    yield
    stack.playbook(*BOTH_PROGRAMS)


@pytest.mark.parametrize("way", ["environment", "variable"])
def test_another_login_restarts_flower_and_nothing_else(stack: Stack, restored_login: None, way: str) -> None:
    before = started(stack)
    login = f"somebody:a-{way}-of-their-own"
    user, _, password = login.partition(":")
    if way == "environment":
        stack.playbook(*BOTH_PROGRAMS, FLOWER_USER=user, FLOWER_PASSWORD=password)
    else:
        stack.playbook(*BOTH_PROGRAMS, "-e", f"flower_user={user}", "-e", f"flower_password={password}")
    assert stack.request("/flower/api/workers", login).status == 200
    assert stack.request("/flower/api/workers", stack.login).status in (401, 429)
    after = started(stack)
    assert {unit for unit in after if after[unit] != before[unit]} == {"celery-flower.service"}


def test_a_pool_that_is_taken_out_of_the_inventory_is_stopped(stack: Stack, wait: Callable[..., Any]) -> None:
    queues = stack.variables["local1"]["app_queues"]
    pools = [{"name": "only", "queues": queues, "pool": "threads", "concurrency": 4}]
    extra = Path(stack.credentials_file.parent / "pools.yml")
    extra.write_text(json.dumps({"worker_pools": pools}))
    try:
        stack.playbook("playbooks/worker.yml", "-e", f"@{extra}")
        units = (
            stack.first("worker")
            .check_output("systemctl list-units --plain --no-legend 'celery-worker@*'")
            .split("\n")
        )
        assert [line.split()[0] for line in units] == ["celery-worker@only-1.service"]
        assert stack.ping("email_senders")
    finally:
        extra.unlink()
        stack.playbook("playbooks/worker.yml")
    assert stack.ping("email_senders")


def test_a_new_limit_of_memory_is_in_force_without_a_restart(stack: Stack) -> None:
    """For the pool that it is for, and for no other."""

    def limits() -> dict[str, str]:
        units = [unit for unit in stack.units("local1") if unit.startswith("celery-worker@")]
        shown = stack.first("worker").check_output(f"systemctl show --value -p MemoryMax {' '.join(units)}")
        return dict(zip(units, shown.split(), strict=True))

    before, old = started(stack), limits()
    first, *others = stack.variables["local1"]["worker_pools"]
    extra = Path(stack.credentials_file.parent / "pools.yml")
    extra.write_text(json.dumps({"worker_pools": [{**first, "memory_max_mb": 777}, *others]}))
    try:
        stack.playbook("playbooks/worker.yml", "-e", f"@{extra}")
        changed = {unit: limit for unit, limit in limits().items() if limit != old[unit]}
    finally:
        extra.unlink()
        stack.playbook("playbooks/worker.yml")
    assert changed == {f"celery-worker@{first['name']}-1.service": str(777 * 1024**2)}
    assert limits() == old
    assert started(stack) == before


def test_limits_of_memory_above_what_the_host_has_are_told(stack: Stack) -> None:
    done = stack.playbook("--check", "playbooks/prepare.yml", "-e", "prepare_memory_mb=99999999")
    message = " ".join(done.stdout.split())
    assert "but Redis and the workers that have a limit may take 99999999 together" in message
    assert "local1 has 0 MiB" not in message and "changed=0" in message


def test_redis_comes_back_and_the_workers_with_it(stack: Stack, wait: Callable[..., Any]) -> None:
    assert stack.redis("ACL", "LOG") in ("", "(empty array)"), "a restart would forget it"
    stack.first("redis").check_output("systemctl kill --signal=KILL redis-server.service")
    wait(lambda: stack.redis("PING") == "PONG", "Redis", 30)
    for queue in ("default", "email_senders"):
        assert stack.ping(queue)
    stack.first("redis").check_output("systemctl restart redis-server.service")
    # Services that had met a closed door have counted a restart, which other tests read: begin anew.
    host = stack.first("app")
    host.check_output("systemctl stop celery.target && systemctl start celery.target")
    wait(lambda: all(host.service(unit).is_running for unit in stack.units("local1")), "every service", 60)


def test_an_unsupported_distribution_is_refused_before_anything_changes(stack: Stack) -> None:
    host = stack.first("app")
    before = started(stack)
    host.check_output("sed --in-place=.kept 's/^VERSION_ID=.*/VERSION_ID=\"11\"/' /usr/lib/os-release")
    try:
        done = stack.playbook("site.yml", check=False)
    finally:
        host.check_output("mv /usr/lib/os-release.kept /usr/lib/os-release")
    message = " ".join(done.stdout.split())
    assert done.returncode != 0
    assert "The host local1 runs debian 11; Hothouse is tested on debian 12 and debian 13 only." in message
    assert "changed=0" in message
    assert started(stack) == before
