"""An inventory that is not ready ends in one message, what, where and how to mend it, before a host is contacted.

Each test takes a copy of one of the shipped inventories, breaks one thing and runs the real playbook.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BUNDLE, ENVIRONMENT


class Inventory:
    """A copy of inventories/NAME that a test may break."""

    def __init__(self, folder: Path, name: str = "staging") -> None:
        shutil.copytree(BUNDLE / "inventories", folder, ignore=shutil.ignore_patterns("credentials.yml", "ca.crt"),
                        symlinks=True)  # fmt: skip
        self.path = folder / name
        self.set(app_source=str(BUNDLE / "molecule/own-app/project"))

    def edit(self, file: str, **values: Any) -> None:
        path = self.path / file
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))

    def set(self, **values: Any) -> None:
        """Set variables in group_vars/all/main.yml."""
        self.edit("group_vars/all/main.yml", **values)

    def group(self, name: str, value: Any) -> None:
        """Replace a group in hosts.yml."""
        document = yaml.safe_load((self.path / "hosts.yml").read_text())
        document["all"]["children"][name] = value
        (self.path / "hosts.yml").write_text(yaml.safe_dump(document))

    def check(self, *words: str, playbook: str = "playbooks/check.yml") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ansible-playbook", "-i", self.path, playbook, *words],
            cwd=BUNDLE, env=ENVIRONMENT, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def refusal(self, *words: str, playbook: str = "playbooks/check.yml") -> str:
        """The message, in one line; the run has to fail before any host is contacted."""
        done = self.check(*words, playbook=playbook)
        assert done.returncode != 0, done.stdout
        assert "unreachable=0" in done.stdout and "Ask the host what it runs" not in done.stdout
        return " ".join(done.stdout.split())


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    return Inventory(tmp_path / "inventories")


@pytest.mark.parametrize("name", ["local", "staging", "prod"])
def test_the_shipped_inventories_are_ready(name: str) -> None:
    done = subprocess.run(
        ["ansible-playbook", "-i", BUNDLE / "inventories" / name, "playbooks/check.yml"],
        cwd=BUNDLE, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "failed=0" in done.stdout


def test_a_misspelled_variable_is_refused_and_the_right_one_named(inventory: Inventory) -> None:
    inventory.set(redis_maxmemroy="1gb")
    message = inventory.refusal()
    assert "`redis_maxmemroy` is no variable of the role `redis`" in message
    assert "main.yml:" in message and "did you mean `redis_maxmemory`?" in message


def test_a_misspelled_key_of_a_pool_is_refused(inventory: Inventory) -> None:
    inventory.set(worker_pools=[{"name": "default", "queues": ["default", "email_senders"], "concurency": 2}])
    message = inventory.refusal()
    assert "concurency" in message and "worker_pools" in message and "roles/worker/README.md" in message


def test_a_value_of_the_wrong_type_is_refused(inventory: Inventory) -> None:
    inventory.set(redis_appendfsync="sometimes")
    assert "value of redis_appendfsync must be one of: always, everysec" in inventory.refusal()


def test_a_host_in_no_group_is_refused(inventory: Inventory) -> None:
    inventory.edit("hosts.yml")
    document = yaml.safe_load((inventory.path / "hosts.yml").read_text())
    document["all"]["hosts"]["stray1"] = {"ansible_host": "192.0.2.99"}
    (inventory.path / "hosts.yml").write_text(yaml.safe_dump(document))
    message = inventory.refusal()
    assert "the host `stray1` is in no group of the stack" in message and "hosts.yml" in message


@pytest.mark.parametrize("group", ["redis", "flower", "nginx"])
def test_an_empty_group_that_the_stack_needs_is_refused(inventory: Inventory, group: str) -> None:
    inventory.group(group, {})
    assert f"the group `{group}` has no host" in inventory.refusal()


def test_two_hosts_of_what_runs_once_are_refused(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path / "inventories", "prod")
    inventory.group("flower", {"hosts": {"redis1": {}, "flower1": {}}})
    assert "the group `flower` has 2 hosts; it runs on one" in inventory.refusal()


@pytest.mark.parametrize(
    ("count", "reason"),
    [(2, "so none may fail, which is worse than one host"), (4, "so no more may fail than of 3")],
)
def test_redis_hosts_without_a_sensible_majority_are_refused(tmp_path: Path, count: int, reason: str) -> None:
    inventory = Inventory(tmp_path / "inventories", "prod")
    names = ["redis1", "redis2", "redis3", "worker1"][:count]
    inventory.group("redis", {"hosts": {name: {} for name in names}})
    message = inventory.refusal()
    assert f"the group `redis` has {count} hosts" in message and reason in message
    assert f"name {count - 1} or {count + 1} hosts under `redis:`" in message


def test_one_three_or_five_redis_hosts_are_fine(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path / "inventories", "prod")
    for names in (["redis1", "redis2", "redis3", "worker1", "worker2"], ["redis1"]):
        document = yaml.safe_load((inventory.path / "hosts.yml").read_text())
        for name in {"redis2", "redis3"} - set(names):
            del document["all"]["hosts"][name]
        (inventory.path / "hosts.yml").write_text(yaml.safe_dump(document))
        inventory.group("redis", {"hosts": {name: {} for name in names}})
        done = inventory.check()
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("address", "reason"), [("redis1.example.com", "is no IP address"), ("fe80::10%eth0", "has a zone")]
)
def test_an_address_that_services_cannot_bind_is_refused(tmp_path: Path, address: str, reason: str) -> None:
    inventory = Inventory(tmp_path / "inventories", "prod")
    document = yaml.safe_load((inventory.path / "hosts.yml").read_text())
    document["all"]["hosts"]["redis1"]["ansible_host"] = address
    (inventory.path / "hosts.yml").write_text(yaml.safe_dump(document))
    message = inventory.refusal()
    assert f"the private_address of `redis1` is {address}, which {reason}" in message
    assert "2. " not in message.partition("nothing was touched.")[2]


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("198.51.100.11", "which `redis1` has too"),
        ("127.0.0.1", "under which no other host reaches it"),
        ("0.0.0.0", "under which no other host reaches it"),
        ("::1", "under which no other host reaches it"),
        ("ff02::1", "under which no other host reaches it"),
        ("fe80::1", "which is good on one link only"),
        ("::192.0.2.1", "which is no address of a host"),
        ("::ffff:198.51.100.99", "which is an IPv4 address in the form of IPv6; write 198.51.100.99"),
        ("[2001:db8::1]", "which is in brackets"),
    ],
)
def test_an_address_that_is_not_the_hosts_alone_is_refused(tmp_path: Path, address: str, fault: str) -> None:
    inventory = Inventory(tmp_path / "inventories", "prod")
    document = yaml.safe_load((inventory.path / "hosts.yml").read_text())
    document["all"]["hosts"]["redis2"]["private_address"] = address
    (inventory.path / "hosts.yml").write_text(yaml.safe_dump(document))
    shown = {"::192.0.2.1": "::c000:201"}.get(address, address)
    assert f"the private_address of `redis2` is {shown}, {fault}" in inventory.refusal()


def prod_with(tmp_path: Path, **values: dict[str, Any]) -> Inventory:
    """inventories/prod with these variables of its hosts, and IPv6 addresses for all of them."""
    inventory = Inventory(tmp_path / "inventories", "prod")
    document = yaml.safe_load((inventory.path / "hosts.yml").read_text())
    for number, (name, host) in enumerate(document["all"]["hosts"].items(), 10):
        host["ansible_host"] = f"2001:db8::{number}"
        host.update(values.get(name, {}))
    (inventory.path / "hosts.yml").write_text(yaml.safe_dump(document))
    return inventory


def test_addresses_of_ipv6_are_fine_and_so_are_names_and_zones_for_ssh(tmp_path: Path) -> None:
    inventory = prod_with(
        tmp_path,
        redis1={"ansible_host": "redis1.example.com", "private_address": "2001:DB8:0::00a1"},
        redis2={"ansible_host": "fe80::2%eth0", "private_address": "2001:db8::a2"},
        redis3={"ansible_host": "198.51.100.13", "private_address": "2001:db8::a3"},
    )
    done = inventory.check()
    assert done.returncode == 0, done.stdout


def test_one_address_in_two_spellings_is_one(tmp_path: Path) -> None:
    message = prod_with(tmp_path, redis2={"ansible_host": "2001:0DB8:0:0::10"}).refusal()
    assert "the private_address of `redis2` is 2001:db8::10, which `redis1` has too" in message


def test_addresses_of_two_families_are_refused(tmp_path: Path) -> None:
    message = prod_with(tmp_path, worker1={"private_address": "198.51.100.21"}).refusal()
    assert "the private_address of `worker1` is IPv4, that of the other hosts IPv6" in message
    assert "2. " not in message.partition("nothing was touched.")[2]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("[2001:db8::5]", "is in brackets"),
        ("2001:db8::5::1", "is no IP address"),
        ("192.0.2.5:22", "is no IP address"),
    ],
)
def test_an_address_that_ssh_does_not_read_is_refused(
    inventory: Inventory, address: str, reason: str
) -> None:
    document = yaml.safe_load((inventory.path / "hosts.yml").read_text())
    document["all"]["hosts"]["staging1"]["ansible_host"] = address
    (inventory.path / "hosts.yml").write_text(yaml.safe_dump(document))
    message = inventory.refusal()
    assert f"the ansible_host of `staging1` is {address}, which SSH cannot reach: it {reason}" in message
    assert "hosts.yml:" in message and "ansible_port" in message


@pytest.mark.parametrize("name", ["ansible_host", "private_address"])
def test_an_address_that_yaml_takes_for_a_number_is_refused(tmp_path: Path, name: str) -> None:
    inventory = prod_with(tmp_path, redis2={name: "2001:10:20:30:40:50:1:2"})
    path = inventory.path / "hosts.yml"
    path.write_text(path.read_text().replace("'2001:10:20:30:40:50:1:2'", "2001:10:20:30:40:50:1:2"))
    message = inventory.refusal()
    assert f"the {name} of `redis2` is" in message and "in quotes" in message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nginx_server_name": "[2001:db8::1]"}, "nginx_server_name of `staging1`: [2001:db8::1] is in brackets"),
        ({"nginx_alternative_names": ["a", "fe80::1%eth0"]}, "`staging1`: fe80::1%eth0 has a zone"),
        ({"nginx_alternative_names": ["192.0.2.1:443"]}, "192.0.2.1:443 is no IP address"),
    ],
)  # fmt: skip
def test_an_address_of_nginx_that_is_none_is_refused(
    inventory: Inventory, values: dict[str, Any], said: str
) -> None:
    inventory.set(**values)
    assert said in inventory.refusal()


@pytest.mark.parametrize(
    ("group", "values", "said"),
    [
        ("nginx", {"nginx_server_name": "x.example.com"}, "'ops.example.com' for `redis1`, but 'x.example.com' for"),
        ("redis", {"redis_port": 6380}, "redis_port is 6380 for `redis1`, but 6379 for `worker1`"),
        ("app", {"app_visibility_timeout_seconds": 3600}, "is not set for `redis1`, but 3600 for `worker1`"),
    ],
)  # fmt: skip
def test_what_all_hosts_have_to_agree_on_is_not_set_for_one_group(
    tmp_path: Path, group: str, values: dict[str, Any], said: str
) -> None:
    inventory = Inventory(tmp_path / "inventories", "prod")
    (inventory.path / f"group_vars/{group}.yml").write_text(yaml.safe_dump(values))
    message = inventory.refusal()
    assert said in message and "set it once, in group_vars/all" in message


def test_a_worker_without_the_application_is_refused(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path / "inventories", "prod")
    inventory.group("app", {"hosts": {"worker1": {}}})
    inventory.group("worker", {"hosts": {"worker1": {}, "worker2": {}}})
    inventory.group("beat", {"hosts": {"worker1": {}}})
    message = inventory.refusal()
    assert "the host `worker2` is to run a worker or beat, but is not in the group `app`" in message
    assert "make `worker` and `beat` children of `app`" in message


def test_a_misspelled_group_is_worth_a_warning(inventory: Inventory) -> None:
    warning = "The group `moniter` means nothing here, and `monitor` has no host"
    inventory.group("moniter", {"hosts": {"staging1": {}}})
    done = inventory.check()
    assert done.returncode == 0 and warning in " ".join((done.stderr + done.stdout).split())
    inventory.group("monitor", {"hosts": {"staging1": {}}})
    assert "moniter" not in inventory.check().stderr + inventory.check().stdout


def test_a_misspelled_variable_of_the_environment_is_refused(inventory: Inventory) -> None:
    """It would turn off the demand for encrypted credentials in silence."""
    inventory.set(credentials_requires_vault=True)
    assert "did you mean `credentials_require_vault`?" in inventory.refusal()


def test_a_certificate_that_is_not_there_or_has_another_key_is_refused(
    inventory: Inventory, tmp_path: Path
) -> None:
    for name in ("one", "other"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
             "-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.crt"],
            check=True, capture_output=True,
        )  # fmt: skip
    files = {"nginx_certificate_file": str(tmp_path / "one.crt"), "nginx_tls": "provided"}
    inventory.set(**files)
    assert "nginx_certificate_key_file (not set) is no file on the controller" in inventory.refusal()
    inventory.set(**files, nginx_certificate_key_file=str(tmp_path / "other.key"))
    assert "is not the key of the certificate" in inventory.refusal()
    inventory.set(**files, nginx_certificate_key_file=str(tmp_path / "one.key"))
    assert inventory.check().returncode == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nginx_server_name": "localhost"}, "for localhost: it means every machine to itself"),
        ({"nginx_alternative_names": ["192.0.2.10"]}, "for 192.0.2.10: it is an address"),
        ({"nginx_alternative_names": ["2001:db8::10"]}, "for 2001:db8::10: it is an address"),
        ({"nginx_alternative_names": ["*.example.com"]}, "for *.example.com: it has a wildcard"),
        ({"nginx_server_name": "flower"}, "for flower: it is no name of DNS with a dot in it"),
        ({"nginx_acme_directory": "http://ca.example.com/dir"}, "is no https:// address"),
        ({"nginx_acme_ca_file": "/nowhere/ca.pem"}, "nginx_acme_ca_file (/nowhere/ca.pem) is no file"),
    ],
)
def test_what_no_acme_server_could_certify_is_refused(
    inventory: Inventory, values: dict[str, Any], said: str
) -> None:
    inventory.set(nginx_tls="acme")
    assert inventory.check().returncode == 0
    inventory.set(**values)
    message = inventory.refusal()
    assert said in message and "nginx_" in message and "mend:" in message


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["viewer", "b:c"], "'b:c' cannot be a login"),
        ([""], "'' cannot be a login"),
        (["a,b"], "'a,b' cannot be a login"),
        (["two words"], "'two words' cannot be a login"),
        (["#comment"], "'#comment' cannot be a login"),
        (["j\u00fcrgen"], "'j\u00fcrgen' cannot be a login"),
        (["-x"], "'-x' cannot be a login"),
        (["line\n"], "cannot be a login"),
        (["x" * 65], "1 to 64 ASCII letters"),
        (["viewer", "viewer"], "'viewer' is one already"),
        (["Viewer", "viewer"], "'Viewer' is one already"),
    ],
)
def test_a_name_of_a_reader_that_can_be_no_login_is_refused(
    inventory: Inventory, names: list[str], said: str
) -> None:
    inventory.set(flower_readers=names)
    message = inventory.refusal()
    assert said in message and "where:" in message and "flower_readers" in message


def test_a_reader_that_is_called_as_the_operator_or_has_a_weak_password_is_refused(
    inventory: Inventory,
) -> None:
    inventory.set(flower_readers=["Ops", "anna.berg@example.com"], flower_user="ops")
    assert "None may be called as flower_user is" in inventory.refusal(playbook="site.yml")


def test_two_hosts_that_obtain_a_certificate_for_one_name_are_refused(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path / "inventories", "prod")
    inventory.set(nginx_tls="acme")
    inventory.group("nginx", {"hosts": {"nginx1": {}, "flower1": {}}})
    assert "ops.example.com: it is also one of `flower1`" in inventory.refusal()


def test_certificates_may_lie_beside_the_hosts(inventory: Inventory) -> None:
    for name in ("certificate.pem", "certificate.key", "chain.crt", "notes.md"):
        (inventory.path / name).write_text("no inventory\n")
    assert inventory.check().returncode == 0


def test_a_checkout_without_the_credentials_of_its_authority_is_refused(inventory: Inventory) -> None:
    certificate = (Path(__file__).parent / "data/certificate.pem").read_text()
    (inventory.path / "ca.crt").write_text(certificate)
    message = inventory.refusal()
    assert "credentials.yml is missing, but" in message and "playbooks/recover.yml" in message
    assert inventory.check("-e", "credentials_replace=true").returncode == 0


def test_a_value_of_several_lines_in_the_environment_is_refused(inventory: Inventory) -> None:
    inventory.set(app_environment={"KEY": "one\ntwo"})
    assert "the value of KEY has several lines" in inventory.refusal()


def test_a_relative_path_to_the_application_is_refused(inventory: Inventory) -> None:
    inventory.set(app_source="app")
    assert "app_source (app) is a relative path" in inventory.refusal()


def test_a_queue_that_no_pool_consumes_is_refused(inventory: Inventory) -> None:
    inventory.set(app_task_routes={"some.task": {"queue": "reports"}})
    message = inventory.refusal()
    assert "routed to the queue `reports`, but no worker pool consumes it" in message
    assert "add `reports` to the queues of a pool in worker_pools" in message


def test_a_pool_of_a_queue_that_nobody_publishes_to_is_refused(inventory: Inventory) -> None:
    inventory.set(app_task_routes={})
    message = inventory.refusal()
    assert "`email_senders` consumes the queue `email_senders`, to which nobody publishes" in message
    assert "app_extra_queues" in message


def test_a_queue_that_the_code_publishes_to_by_name_is_accepted(inventory: Inventory) -> None:
    inventory.set(app_task_routes={}, app_extra_queues=["email_senders"])
    assert inventory.check().returncode == 0


def test_names_that_no_queue_can_have_are_refused_where_they_are_set(inventory: Inventory) -> None:
    inventory.set(
        worker_pools=[{"name": "default", "queues": ["default", "a,b", "unacked", "{{ 'unknown' }}-task"]}],
        app_default_queue="",
        app_task_routes={"some.task": {"queue": "two words"}, "other.task": {"queue": 5}},
        app_extra_queues=["bell\a", "celeryev.x"],
    )
    message = inventory.refusal()
    for variable, name, reason in (
        ("worker_pools", "'a,b'", "it contains a comma"),
        ("worker_pools", "'unacked'", "it is reserved"),
        ("worker_pools", "'unknown-task'", "it is reserved"),
        ("app_default_queue", "''", "it is empty"),
        ("app_task_routes", "'two words'", "it contains a space"),
        ("app_task_routes", "5", "it is no text"),
        ("app_extra_queues", r"'bell\x07'", "it contains the control character U+0007"),
        ("app_extra_queues", "'celeryev.x'", "it is reserved"),
    ):
        assert re.search(
            rf"no queue can be called {re.escape(name)}: {re.escape(reason)}[^`]* where: {variable} ", message
        ), name
    assert "put it in quotes" in message and "give the queue another name" in message


def test_names_beyond_ascii_are_fine(inventory: Inventory) -> None:
    odd = """it's"$\\x%{ü"""
    inventory.set(
        worker_pools=[{"name": "x", "queues": ["почта-ü", odd, "-x"]}],
        app_default_queue="почта-ü", app_task_routes={"some.täsk": {"queue": odd}}, app_extra_queues=["-x"],
    )  # fmt: skip
    done = inventory.check()
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["Default", "with-dash", "a b", ""])
def test_a_pool_name_that_is_no_name_for_a_unit_is_refused(inventory: Inventory, name: str) -> None:
    inventory.set(worker_pools=[{"name": name, "queues": ["default", "email_senders"]}])
    assert "is no name for a unit" in inventory.refusal()


def test_two_pools_of_one_name_are_refused(inventory: Inventory) -> None:
    inventory.set(
        worker_pools=[{"name": "x", "queues": ["default"]}, {"name": "x", "queues": ["email_senders"]}]
    )
    assert "are called `x`" in inventory.refusal()


def test_a_visibility_timeout_below_the_longest_task_is_refused(inventory: Inventory) -> None:
    inventory.set(app_visibility_timeout_seconds=300)
    message = inventory.refusal()
    assert (
        "app_visibility_timeout_seconds (300) is not above the longest time limit of a task (600)" in message
    )


def test_a_stop_timeout_below_the_soft_shutdown_is_refused(inventory: Inventory) -> None:
    inventory.set(app_soft_shutdown_seconds=60)
    assert "worker_stop_timeout_seconds (30) is below 75" in inventory.refusal()


@pytest.mark.parametrize(
    ("pool", "need"),
    [
        ({"memory_max_mb": 95}, "is 95, but a worker of it needs 96: 48 and 24 for each of 2 processes"),
        ({"memory_max_mb": 0, "concurrency": 1}, "is 0, but a worker of it needs 72"),
        ({"memory_max_mb": 400, "concurrency": 16}, "needs 432: 48 and 24 for each of 16 processes"),
        ({"memory_max_mb": 300, "max_memory_per_child_mb": 400}, "of which one may grow to 400"),
        ({"memory_max_mb": 63, "pool": "threads"}, "needs 64: it would be ended before its first task"),
        ({"memory_max_mb": 10, "pool": "solo"}, "needs 64"),
    ],
)  # fmt: skip
def test_a_limit_of_memory_that_no_worker_could_keep_is_refused(
    inventory: Inventory, pool: dict[str, Any], need: str
) -> None:
    inventory.set(worker_pools=[{"name": "default", "queues": ["default", "email_senders"], **pool}])
    message = inventory.refusal()
    assert "memory_max_mb of the worker pool `default`" in message and need in message
    assert "main.yml:" in message and "set it to at least" in message


def test_limits_of_memory_below_what_services_need_are_refused_at_once(inventory: Inventory) -> None:
    """Flower's need follows from what it keeps."""
    inventory.group("monitor", {"hosts": {"staging1": {}}})
    inventory.set(flower_max_tasks=100000, beat_memory_max_mb=95, monitor_prometheus_memory_max_mb=127)
    message = inventory.refusal()
    assert faults(message) == 3, message
    assert (
        "flower_memory_max_mb is 512, but it needs 1728: 128, and 16 for each 1,000 of flower_max_tasks (100000)"
        in message
    )
    assert "beat_memory_max_mb is 95, but it needs 96" in message
    assert "monitor_prometheus_memory_max_mb is 127, but it needs 128" in message


def test_limits_of_memory_that_services_can_keep_are_fine(inventory: Inventory) -> None:
    pools = [
        {"name": "a", "queues": ["default"], "memory_max_mb": 96},
        {
            "name": "b",
            "queues": ["email_senders"],
            "pool": "threads",
            "concurrency": 50,
            "memory_max_mb": "64",
        },
    ]
    inventory.set(worker_pools=pools, beat_memory_max_mb=96, flower_memory_max_mb=208)
    assert inventory.check().returncode == 0


def test_an_application_without_a_lock_file_is_refused(inventory: Inventory, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(BUNDLE / "molecule/own-app/project", project)
    (project / "uv.lock").unlink()
    inventory.set(app_source=str(project))
    message = inventory.refusal()
    assert "has no uv.lock" in message and "run `uv lock` in it" in message and "main.yml:" in message


def test_an_application_that_is_not_there_is_refused(inventory: Inventory) -> None:
    inventory.set(app_source="/nonexistent")
    assert "the application's folder /nonexistent has no pyproject.toml" in inventory.refusal()


def test_an_application_without_redbeat_is_refused(inventory: Inventory, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(BUNDLE / "molecule/own-app/project", project)
    lock = (project / "uv.lock").read_text()
    (project / "uv.lock").write_text(lock.replace('name = "celery-redbeat"', 'name = "celery-redbeet"'))
    inventory.set(app_source=str(project))
    message = inventory.refusal()
    assert "does not depend on `celery-redbeat`" in message and "uv add celery-redbeat" in message


def test_an_undefined_reference_names_the_variable(inventory: Inventory) -> None:
    inventory.set(nginx_server_name="{{ no_such_thing }}")
    assert "`nginx_server_name` cannot be worked out: 'no_such_thing' is undefined" in inventory.refusal()


def faults(message: str) -> int:
    """How many things a message, which Ansible prints in two forms, says are wrong."""
    return message.partition("fatal: ")[2].count(" where: ")


# In each set no mistake follows from another, so each is told once.
MISTAKES: list[dict[str, tuple[Any, str]]] = [
    {
        "redis_port": (None, "`redis_port`: nothing (null) is not a whole number"),
        "nginx_server_name": (None, "`nginx_server_name`: nothing (null) is not a text"),
        "app_extra_queues": (None, "`app_extra_queues`: nothing (null) is not a list"),
        "worker_pools": ([None], "`worker_pools`: nothing (null) is not a mapping"),
        "flower_port": (70000, "flower_port: 70000 is no port"),
        "beat_lock_seconds": ("-1", "beat_lock_seconds: a number is below 0"),
        "monitor_scrape_seconds": ("15s", "`monitor_scrape_seconds`: '15s' is not a whole number"),
        "app_credentials": ("secret", "`app_credentials` is not a mapping"),
    },
    {
        "redis_port": ("{{ 1 / 0 }}", "`redis_port` cannot be worked out"),
        "flower_port": ("{{ flower_port }}", "`flower_port` cannot be worked out: Recursive loop"),
        "app_extra_queues": (
            ["{{ unknown }}"],
            "`app_extra_queues` cannot be worked out: 'unknown' is undefined",
        ),
        "worker_pools": (
            [{"name": "a", "queues": ["default", None]}],
            "`worker_pools`: nothing (null) is not a text",
        ),
        "beat_loop_seconds": ("Infinity", "`beat_loop_seconds`: 'Infinity' is not a whole number"),
        "nginx_https_port": ("0", "nginx_https_port: 0 is no port"),
    },
    {
        "redis_port": ("{{ own }}", "`redis_port`: 'none' is not a whole number"),
        "flower_port": (
            "{{ lookup('ansible.builtin.pipe', 'exit 3') }}",
            "`flower_port` cannot be worked out",
        ),
        "nginx_server_name": (
            "{{ 1 + }}",
            "`nginx_server_name` cannot be worked out: Syntax error in template",
        ),
        "worker_pools": ("{name: a, queues: b}", "`worker_pools`: '{name: a, queues: b}' is not a list"),
    },
]


@pytest.mark.parametrize("mistakes", MISTAKES)
def test_a_mistake_is_told_once_and_where_it_is(
    inventory: Inventory, mistakes: dict[str, tuple[Any, str]]
) -> None:
    """Whatever else follows from it, and however many roles have the variable."""
    inventory.group("monitor", {"hosts": {"staging1": {}}})
    inventory.set(own="none", **{name: value for name, (value, _) in mistakes.items()})
    message = inventory.refusal()
    assert faults(message) == len(mistakes), message
    lines = (inventory.path / "group_vars/all/main.yml").read_text().splitlines()
    for name, (_, said) in mistakes.items():
        assert said in message, message
        line = next(number for number, text in enumerate(lines, 1) if text.startswith(f"{name}:"))
        assert f"where: {inventory.path}/group_vars/all/main.yml:{line} mend:" in message


def test_a_mistake_of_many_hosts_is_told_once(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path / "inventories", "prod")
    message = inventory.refusal("-e", "redis_port=none")
    assert "`redis_port`: 'none' is not a whole number (every host)" in message and faults(message) == 1
    inventory.set(worker_pools=None)
    message = inventory.refusal()
    assert "is not a list, such as [a, b] or a,b (hosts `worker1`, `worker2`)" in message
    assert faults(message) == 1


def test_two_variables_that_refer_to_each_other_are_both_named(inventory: Inventory) -> None:
    inventory.set(redis_port="{{ flower_port }}", flower_port="{{ redis_port }}")
    message = inventory.refusal()
    assert "`redis_port` cannot" in message and "`flower_port` cannot" in message and faults(message) == 2


def test_the_value_of_one_host_is_refused_where_that_host_has_it(inventory: Inventory) -> None:
    inventory.set(flower_max_tasks=5)
    document = yaml.safe_load((inventory.path / "hosts.yml").read_text())
    document["all"]["hosts"]["staging1"]["flower_max_tasks"] = "many"
    text = yaml.safe_dump(document)
    (inventory.path / "hosts.yml").write_text(text)
    line = text[: text.index("flower_max_tasks")].count("\n") + 1
    assert f"where: {inventory.path}/hosts.yml:{line} mend:" in inventory.refusal()


@pytest.mark.parametrize("name", ["redis_port", "app_smtp_password"])
def test_a_value_that_cannot_be_decrypted_is_named_with_the_way_to_decrypt_it(
    inventory: Inventory, name: str
) -> None:
    (inventory.path / "group_vars/all/vault.yml").write_text(f"{name}: !vault |\n{LOCKED}\n")
    message = inventory.refusal()
    assert f"`{name}` cannot be worked out" in message and faults(message) == 1
    assert "vault.yml:1 mend: name the file of the vault password" in message


LOCKED = "  $ANSIBLE_VAULT;1.1;AES256\n  3333"


def test_a_secret_that_the_credentials_will_hold_may_be_unknown(inventory: Inventory) -> None:
    inventory.set(app_credentials={"key": "{{ credentials.own }}"})
    (inventory.path / "group_vars/all/credentials.yml").write_text("credentials: {redis_admin: abcdefgh}\n")
    done = inventory.check()
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "rest"),
    [
        ("app_extra_queues=more, other", "other"),
        ("redis_port", "redis_port"),
        ('worker_pools=[{"name": "a"}]', '"a"}]'),
    ],
)
def test_what_extra_variables_would_lose_is_refused(inventory: Inventory, words: str, rest: str) -> None:
    assert f"`{rest}` is no NAME=VALUE, so it would be passed over" in inventory.refusal("-e", words)


def test_a_name_that_is_misspelled_before_its_underscore_is_refused_too(inventory: Inventory) -> None:
    known = {
        "workr_pools": "worker_pools",
        "ngnix_server_name": "nginx_server_name",
        "rediss_port": "redis_port",
        "worker_pool": "worker_pools",
        "apps_source": "app_source",
    }
    inventory.set(**dict.fromkeys(known, "x"))
    message = inventory.refusal()
    assert faults(message) == len(known)
    for name, near in known.items():
        assert re.search(rf"`{name}` is no variable of [^`]*(`worker`)?[^`]*did you mean `{near}`\?", message)


def test_variables_of_ones_own_may_have_any_other_name(inventory: Inventory) -> None:
    inventory.set(flower_purge_offline_workers_seconds="{{ own }}", own="60")
    inventory.set(smtp_port=25, port=1, source="y", shop_queues=["a"], hosts_name="z", __redis_ports=1)
    assert inventory.check().returncode == 0


@pytest.mark.parametrize("name", ["redis[1:3]", "redis9"])
def test_a_host_without_an_address_is_named(inventory: Inventory, name: str) -> None:
    inventory.group("redis", {"hosts": {name: {}}})
    message = inventory.refusal()
    for host in ("redis1", "redis2", "redis3") if ":" in name else (name,):
        assert f"the host `{host}` has no address" in message and f"set ansible_host of `{host}`" in message


def test_variables_that_no_host_reads_are_worth_a_warning(inventory: Inventory) -> None:
    strays = {
        "group_vars/workers.yml": "there is no group `workers`. Did you mean `worker`?",
        "group_vars/ngnix/main.yml": "there is no group `ngnix`. Did you mean `nginx`?",
        "host_vars/stagin1.yaml": "there is no host `stagin1`. Did you mean `staging1`?",
        "host_vars/gone": "there is no host `gone`.",
    }
    others = ("group_vars/monitor.yml", "group_vars/mail/x.yml", "group_vars/notes.md", "host_vars/staging1")
    for file in (*strays, *others):
        path = inventory.path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("own: 1\n")
    done = inventory.check()
    warnings = " ".join(done.stderr.split())
    assert done.returncode == 0 and warnings.count("are for no one") == len(strays), warnings
    for said in strays.values():
        assert said in warnings


def test_several_mistakes_are_told_at_once(inventory: Inventory) -> None:
    inventory.set(redis_maxmemroy="1gb", flower_prot=5555)
    inventory.group("nginx", {})
    message = inventory.refusal()
    assert (
        "redis_maxmemroy" in message
        and "flower_prot" in message
        and "the group `nginx` has no host" in message
    )


def test_prod_without_a_vault_password_is_refused_before_a_host_is_contacted(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path / "inventories", "prod")
    message = inventory.refusal(playbook="site.yml")
    assert "credentials_require_vault" in message and "vault" in message.lower()
    assert not (inventory.path / "group_vars/all/credentials.yml").exists()


@pytest.mark.parametrize(
    ("user", "password"),
    [
        ("admin", "admin"),
        ("ops", "short"),
        ("ops", "with,comma,and,long,enough"),
        ("o:ps", "x" * 20),
        ("ops", "ü" * 20),
        ("ops", "x" * 20 + "\n"),
    ],
)
def test_a_login_that_is_weak_or_that_flower_would_misread_is_refused(
    inventory: Inventory, user: str, password: str
) -> None:
    login = json.dumps({"flower_user": user, "flower_password": password})
    message = inventory.refusal("-e", login, playbook="site.yml")
    assert "flower_password" in message and "FLOWER_PASSWORD" in message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"monitor_smtp_url": "mail.example.com"},
            "monitor_smtp_url (mail.example.com) is no address of a mail server",
        ),
        (
            {"monitor_smtp_url": "smtps://ops@mail.example.com:587", "monitor_mail_to": ["a@example.com"]},
            "Alertmanager speaks TLS from the start on port 465, and there only",
        ),
        ({"monitor_smtp_url": "smtp://ops@mail.example.com"}, "names a user without TLS"),
        ({"monitor_smtp_url": "smtp://[2001:db8::25]:1025"}, "has an IPv6 address"),
        ({"monitor_smtp_url": "smtps://ops:secret@mail.example.com"}, "holds a password"),
        ({"monitor_probe_url": "https://ops.example.com"}, "is no https:// address with a / at its end"),
        ({"nginx_overview": False}, "nginx_overview is off for `staging1`"),
        ({"monitor_rule_files": ["/a/x.yml", "/b/x.yml"]}, "two of monitor_rule_files are called x.yml"),
        ({"monitor_rule_files": ["/nowhere/rules.yml"]}, "the rule file /nowhere/rules.yml is no file"),
        ({"monitor_success_percent": 950}, "monitor_success_percent is 950, which is no share of a hundred"),
        ({"monitor_runtime_seconds": {"a.task": "10s"}}, "the limit of a.task is '10s', which is no number"),
        (
            {"monitor_unacked_seconds": 60, "app_visibility_timeout_seconds": 900},
            "monitor_unacked_seconds (60) is below",
        ),
        (
            {"monitor_scrape_seconds": 90},
            "monitor_patience_seconds (120) is below twice monitor_scrape_seconds (90)",
        ),
        ({"monitor_sucess_percent": 95}, "did you mean `monitor_success_percent`?"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_limits_and_addresses_of_the_monitoring_have_to_make_sense(
    inventory: Inventory, values: dict[str, Any], expected: str
) -> None:
    inventory.group("monitor", {"hosts": {"staging1": {}}})
    inventory.set(**values)
    message = inventory.refusal()
    assert expected in message and ("main.yml:" in message or "common.yml:" in message)


def test_the_monitoring_runs_on_one_host(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path / "inventories", "prod")
    inventory.group("monitor", {"hosts": {"beat1": {}, "nginx1": {}}})
    assert "the group `monitor` has 2 hosts; it runs on one" in inventory.refusal()


def test_alerts_that_reach_nobody_are_worth_a_warning(inventory: Inventory) -> None:
    inventory.group("monitor", {"hosts": {"staging1": {}}})
    warning = "Alerts of the host staging1 reach nobody"
    assert warning not in inventory.check().stderr + inventory.check().stdout
    inventory.set(monitor_mail_to=[])
    done = inventory.check()
    assert done.returncode == 0 and warning in " ".join((done.stderr + done.stdout).split())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prepare_ssh_addresses": ["fe80::1%eth0"]}, "prepare_ssh_addresses: fe80::1%eth0 has a zone"),
        ({"prepare_ssh_addresses": ["[2001:db8::1]"]}, "prepare_ssh_addresses: [2001:db8::1] is in brackets"),
        ({"prepare_ssh_addresses": ["::ffff:192.0.2.1"]}, "an IPv4 address in the form of IPv6; write 192.0.2.1"),
        ({"prepare_ssh_addresses": ["office.example.com"]}, "office.example.com is no IP address and no network"),
        ({"prepare_firewall_rules": [{"port": "8125", "from": ["10.0.0.0/33"]}]}, "10.0.0.0/33 is no IP address"),
        ({"prepare_firewall_rules": [{"port": "70000"}]}, "prepare_firewall_rules: 70000 is no port"),
        ({"prepare_firewall_rules": [{"port": "20-10"}]}, "prepare_firewall_rules: 20-10 is no port"),
        ({"prepare_firewall_rules": [{"port": "53", "protocol": "icmp"}]}, "must be one of: tcp, udp"),
        ({"prepare_firewall_rules": [{"port": "53", "form": ["10.0.0.1"]}]}, "form"),
        ({"prepare_firewall_rules": [{"port": "53", "from": []}]}, "the rule for port 53 is from nobody"),
        ({"prepare_ssh_port": 0}, "prepare_ssh_port: 0 is no port"),
        ({"prepare_ntp_servers": ["ntp1.example.com iburst"]}, "is no name or address of a time server"),
        ({"prepare_firewall_rollback_seconds": 1}, "leaves no time for a connection"),
    ],
)  # fmt: skip
def test_what_the_firewall_could_not_be_made_of_is_refused(
    inventory: Inventory, values: dict[str, Any], said: str
) -> None:
    inventory.set(**values)
    message = inventory.refusal()
    assert said in message and "prepare_" in message and "mend:" in message


def test_settings_that_the_transport_cannot_serve_are_told_and_another_is_used(inventory: Inventory) -> None:
    said = "taken from Redis by kombu's own transport, because app_celery_settings: "
    priorities = {"broker_transport_options": {"priority_steps": [0, 5], "queue_order_strategy": "priority"}}
    inventory.set(app_celery_settings=priorities)
    done = inventory.check()
    assert done.returncode == 0
    assert f"{said}broker_transport_options.priority_steps" in " ".join(
        f"{done.stdout} {done.stderr}".split()
    )
    inventory.set(app_transport="redis")
    done = inventory.check()
    assert said not in " ".join(f"{done.stdout} {done.stderr}".split())
    inventory.set(app_celery_settings={}, app_transport="amqp")
    assert "value of app_transport must be one of: hothouse, redis" in inventory.refusal()


def overlay(inventory: Inventory, **values: Any) -> Path:
    """Another source of the inventory, which alone knows a second worker host, with these variables of it."""
    folder = inventory.path.parent / "overlay"
    folder.mkdir()
    hosts = {"worker2": {"ansible_host": "192.0.2.11", **values}}
    document = {"all": {"children": {"worker": {"hosts": hosts}, "app": {"children": {"worker": {}}}}}}
    (folder / "hosts.yml").write_text(yaml.safe_dump(document))
    return folder


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_a_host_that_only_an_overlay_knows_has_the_paths_of_the_environment(
    inventory: Inventory, first: bool
) -> None:
    folder = overlay(inventory)
    sources = [str(folder), str(inventory.path)] if first else [str(inventory.path), str(folder)]
    (inventory.path / "group_vars/all/main.yml").write_text(
        (BUNDLE / "inventories/staging/group_vars/all/main.yml").read_text()
    )
    message = "{{ credentials_file }} {{ credentials_ca_file }} {{ app_source }}"
    done = subprocess.run(
        ["ansible", "-i", sources[0], "-i", sources[1], "all", "-m", "debug", "-a", f"msg='{message}'"],
        cwd=BUNDLE, env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    own = inventory.path
    expected = f"{own}/group_vars/all/credentials.yml {own}/ca.crt {own}/../../app"
    assert " ".join(done.stdout.split()).count(expected) == 2, done.stdout


def test_hosts_of_different_applications_are_refused(inventory: Inventory) -> None:
    folder = overlay(inventory, app_source="{{ inventory_dir }}/shop")
    message = inventory.refusal("-i", str(folder))
    assert (
        f"app_source is '{BUNDLE}/molecule/own-app/project' for `staging1`, but '{folder}/shop' for `worker2`"
        in message
    )
    assert "begin a path with {{ environment_folder }}" in message


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"app_environment": {"NOTE": "one\ntwo"}}, "the value of NOTE has several lines"),
        ({"app_time_limit_seconds": 900}, "not above the longest time limit of a task (900)"),
        ({"app_celery": "shop.celery:app"}, "all hosts have to agree on it"),
        ({"credentials_file": "/tmp/other.yml"}, "all hosts have to agree on it"),
    ],
)
def test_the_values_of_every_host_are_looked_at(
    inventory: Inventory, values: dict[str, Any], reason: str
) -> None:
    message = inventory.refusal("-i", str(overlay(inventory, **values)))
    assert reason in message
