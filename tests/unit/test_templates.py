"""What the roles would write on the hosts of the shipped inventories, rendered by Ansible itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import bcrypt
import pytest
import yaml
from conftest import BUNDLE, load_plugin

filters = load_plugin("filter/hothouse")
SECRET = re.compile(r"\w+-secret")


@cache
def rendered(inventory: str) -> dict[str, dict[str, str]]:
    """Host → path → text, for every file that is not secret."""
    done = subprocess.run(
        ["ansible-playbook", "-i", BUNDLE / "inventories" / inventory, BUNDLE / "tests/unit/data/render.yml"],
        cwd=BUNDLE,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
            "ANSIBLE_CONFIG": str(BUNDLE / "ansible.cfg"),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            "ANSIBLE_ROLES_PATH": str(BUNDLE / "roles"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert not SECRET.search(done.stdout), "a secret is in a file that is not marked as one"
    files: dict[str, dict[str, str]] = {}
    for task in json.loads(done.stdout)["plays"][0]["tasks"]:
        for host, result in task["hosts"].items():
            files.setdefault(host, {}).update(result.get("rendered", {}))
    return files


def text(inventory: str, host: str, path: str) -> str:
    return rendered(inventory)[host][path]


@pytest.mark.parametrize(("inventory", "host"), [("local", "local1"), ("staging", "staging1")])
def test_one_host_with_everything_keeps_redis_and_flower_on_loopback(inventory: str, host: str) -> None:
    assert "\nbind 127.0.0.1\n" in text(inventory, host, "/etc/redis/redis.conf")
    assert 'address = "127.0.0.1"' in text(inventory, host, "/etc/hothouse/flowerconfig.py")
    assert "server 127.0.0.1:5555;" in text(inventory, host, "/etc/nginx/nginx.conf")
    assert "IPAddressDeny" not in text(inventory, host, "/etc/systemd/system/celery-flower.service")


def test_several_hosts_reach_each_other_and_nobody_else() -> None:
    assert "\nbind 127.0.0.1 198.51.100.10\n" in text("prod", "redis1", "/etc/redis/redis.conf")
    assert 'address = "198.51.100.40"' in text("prod", "flower1", "/etc/hothouse/flowerconfig.py")
    unit = text("prod", "flower1", "/etc/systemd/system/celery-flower.service")
    assert (
        "IPAddressDeny=any\nIPAddressAllow=localhost 198.51.100.40 198.51.100.50 198.51.100.60 198.51.100.10\n"
        in unit
    )
    assert "server 198.51.100.40:5555;" in text("prod", "nginx1", "/etc/nginx/nginx.conf")
    assert "/etc/nginx/nginx.conf" not in rendered("prod")["worker1"]


def test_the_development_listener_is_local_only() -> None:
    assert "listen 5556" in text("local", "local1", "/etc/nginx/nginx.conf")
    for inventory, host in (("staging", "staging1"), ("prod", "nginx1")):
        page = text(inventory, host, "/etc/nginx/nginx.conf")
        assert "5556" not in page and "Strict-Transport-Security" in page


def test_the_prefix_is_kept_by_nginx() -> None:
    for line in text("prod", "nginx1", "/etc/nginx/nginx.conf").splitlines():
        if line.strip().startswith("proxy_pass"):
            assert re.fullmatch(r"proxy_pass http://(flower|198\.51\.100\.60:909[03]);", line.strip())


def test_flowerconfig_is_python_and_shows_the_columns_of_the_guide() -> None:
    source = text("prod", "flower1", "/etc/hothouse/flowerconfig.py")
    names: dict[str, object] = {}
    code = compile(source, "flowerconfig.py", "exec")
    assert code.co_names.count("basic_auth") == 1
    for line in source.splitlines():
        if re.match(r"\w+ = [\"\d]", line):
            exec(line, names)
    assert names["tasks_columns"] == "name,uuid,state,received,started,runtime,args,worker"
    assert (names["url_prefix"], names["max_tasks"], names["state_save_interval"]) == ("flower", 5000, 60000)


def test_the_wrapper_is_sound_shell(tmp_path: Path) -> None:
    script = tmp_path / "hothouse-run"
    script.write_text(text("prod", "worker1", "/usr/local/bin/hothouse-run"))
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    usage = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert usage.returncode == 64 and "usage: hothouse-run" in usage.stderr


def test_celery_settings_are_those_that_lose_nothing() -> None:
    settings = json.loads(text("prod", "worker1", "/etc/hothouse/celery.json"))
    assert settings["task_acks_late"] is True
    assert settings["broker_channel_error_retry"] is True
    assert settings["task_publish_retry_policy"]["max_retries"] >= 100
    timeouts = {
        settings["visibility_timeout"],
        settings["broker_transport_options"]["visibility_timeout"],
        settings["result_backend_transport_options"]["visibility_timeout"],
    }
    assert timeouts == {900}
    assert settings["task_routes"] == {"campaigns.tasks.send_batch": {"queue": "email_senders"}}


def test_instances_are_pools_times_replicas() -> None:
    pools = [
        {"name": "a", "queues": ["x", "y"], "replicas": 2, "concurrency": 3, "max_memory_per_child_mb": 10},
        {"name": "b", "queues": ["z"], "pool": "threads", "time_limit": 30},
    ]
    instances = filters.worker_instances(pools)
    assert [instance["name"] for instance in instances] == ["a-1", "a-2", "b-1"]
    assert (
        instances[0]["options"] == "--queues=x,y --concurrency=3 --pool=prefork --max-memory-per-child=10240"
    )
    assert instances[2]["options"] == "--queues=z --concurrency=2 --pool=threads --time-limit=30"
    hosts = [{"inventory_hostname": name, "worker_pools": pools} for name in ("w1", "w2")]
    assert filters.worker_names(hosts) == ["a-1@w1", "a-2@w1", "b-1@w1", "a-1@w2", "a-2@w2", "b-1@w2"]


def test_a_login_has_one_hash_which_only_its_password_opens() -> None:
    text = filters.bcrypt_hash("secret", "ops", 4)
    assert text == filters.bcrypt_hash("secret", "ops", 4) != filters.bcrypt_hash("secret", "monitor", 4)
    assert bcrypt.checkpw(b"secret", text.encode()) and not bcrypt.checkpw(b"secreT", text.encode())


def test_prometheus_reads_every_host_and_nginx_serves_it() -> None:
    config = yaml.safe_load(text("prod", "monitor1", "/etc/prometheus/hothouse/prometheus.yml"))
    jobs = {
        job["job_name"]: [target for static in job["static_configs"] for target in static["targets"]]
        for job in config["scrape_configs"]
    }
    assert jobs["redis"] == ["198.51.100.10:9121"] and jobs["flower"] == ["198.51.100.40:5555"]
    assert len(jobs["node"]) == 7 and "127.0.0.1:9100" in jobs["node"]
    assert jobs["blackbox"] == ["https://ops.example.com/flower/", "https://ops.example.com/"]
    page = text("prod", "nginx1", "/etc/nginx/nginx.conf")
    assert "proxy_pass http://198.51.100.60:9090;" in page and "auth_basic_user_file" in page
    unit = text(
        "prod", "worker1", "/etc/systemd/system/prometheus-node-exporter.service.d/node-exporter.conf"
    )
    assert "--web.listen-address=198.51.100.21:9100" in unit
    assert "IPAddressDeny=any\nIPAddressAllow=localhost 198.51.100.60\n" in unit


def test_without_a_monitoring_host_nothing_of_it_is_written() -> None:
    assert not [path for path in rendered("staging")["staging1"] if "prometheus" in path or "lua" in path]
    page = text("staging", "staging1", "/etc/nginx/nginx.conf")
    assert (
        "/prometheus" not in page.replace("(flower|prometheus|alertmanager)", "")
        and "stub_status" not in page
    )
    assert json.loads(text("staging", "staging1", "/opt/hothouse/overview/config.json"))["prometheus"] is None


def test_the_page_and_the_alerts_read_the_same_limits() -> None:
    page = json.loads(text("prod", "nginx1", "/opt/hothouse/overview/config.json"))
    rules = yaml.safe_load(text("prod", "monitor1", "/etc/prometheus/hothouse/records.yml"))
    limits = {
        rule["labels"]["name"]: float(rule["expr"].removeprefix("vector(").removesuffix(")"))
        for group in rules["groups"]
        for rule in group["rules"]
        if rule.get("record") == "hothouse_threshold"
    }
    shown = {name: value for name, value in page["thresholds"].items() if name != "runtime_seconds"}
    assert shown and {name: limits[name] for name in shown} == shown


def test_credential_files_are_roots_alone() -> None:
    assert filters.credential_files({"b": "2", "a": "1"}, "worker") == [
        {
            "path": f"/etc/hothouse/credentials/worker_{name}",
            "content": f"{value}\n",
            "mode": "0600",
            "secret": True,
        }
        for name, value in (("a", "1"), ("b", "2"))
    ]
