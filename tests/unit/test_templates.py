"""What the roles would write on the hosts of the shipped inventories, rendered by Ansible itself."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path

import bcrypt
import pytest
import yaml
from conftest import load_plugin, render, shipped

filters = load_plugin("filter/hothouse")


@cache
def rendered(inventory: str) -> dict[str, dict[str, str]]:
    """Host → path → text, for every file that is not secret."""
    return {host: files["rendered"] for host, files in shipped(inventory).items()}


def text(inventory: str, host: str, path: str) -> str:
    return rendered(inventory)[host][path]


@pytest.mark.parametrize(("inventory", "host"), [("local", "local1"), ("staging", "staging1")])
def test_one_host_with_everything_keeps_redis_and_flower_on_loopback(inventory: str, host: str) -> None:
    assert "\nbind 127.0.0.1\n" in text(inventory, host, "/etc/redis/redis.conf")
    assert 'address = "127.0.0.1"' in text(inventory, host, "/etc/hothouse/flowerconfig.py")
    assert "server 127.0.0.1:5555;" in text(inventory, host, "/etc/nginx/nginx.conf")
    assert not [path for path in rendered(inventory)[host] if "haproxy" in path]


def test_flower_and_the_monitoring_listen_on_loopback_and_talk_to_their_own_host() -> None:
    for inventory, host in (("local", "local1"), ("staging", "staging1"), ("prod", "flower1")):
        assert 'address = "127.0.0.1"' in text(inventory, host, "/etc/hothouse/flowerconfig.py")
        unit = text(inventory, host, "/etc/systemd/system/celery-flower.service")
        assert "IPAddressDeny=any\nIPAddressAllow=localhost\n" in unit
    for host, path in (
        ("worker1", "prometheus-node-exporter.service.d/node-exporter.conf"),
        ("redis2", "prometheus-redis-exporter.service.d/redis-exporter.conf"),
        ("nginx1", "prometheus-nginx-exporter.service.d/nginx-exporter.conf"),
    ):
        unit = text("prod", host, f"/etc/systemd/system/{path}")
        assert "--web.listen-address=127.0.0.1:" in unit
        assert "IPAddressDeny=any\nIPAddressAllow=localhost\n" in unit


def test_several_hosts_verify_each_other() -> None:
    assert "\nbind 198.51.100.11\n" in text("prod", "redis1", "/etc/redis/redis.conf")
    page = text("prod", "nginx1", "/etc/nginx/nginx.conf")
    assert "server 198.51.100.40:5555;" in page and "proxy_ssl_verify on;" in page
    assert "/etc/nginx/nginx.conf" not in rendered("prod")["worker1"]
    for upstream, name in (
        ("flower", "flower1"),
        ("198.51.100.60:9090", "monitor1"),
        ("198.51.100.60:9093", "monitor1"),
    ):
        assert f"proxy_pass https://{upstream};\n            proxy_ssl_name {name};" in page
    exporter = text(
        "prod", "redis3", "/etc/systemd/system/prometheus-redis-exporter.service.d/redis-exporter.conf"
    )
    assert "--redis.addr=rediss://198.51.100.13:6379" in exporter and "--tls-ca-cert-file" in exporter
    assert "proxy_ssl" not in text("local", "local1", "/etc/nginx/nginx.conf")


def test_a_service_is_offered_to_its_clients_on_other_hosts_alone() -> None:
    hostvars = {name: {"private_address": f"192.0.2.{number}"} for number, name in enumerate("abc", 1)}
    services = [
        {"name": "web", "port": "80", "hosts": ["a", "b"], "clients": ["a", "c"], "proxied": True},
        {"name": "own", "port": 81, "hosts": ["a"], "clients": ["a"]},
        {"name": "raw", "port": 82, "hosts": ["b"], "clients": ["a"]},
    ]
    assert filters.services_of(services, "a", hostvars) == [
        {"name": "web", "port": 80, "proxied": True, "clients": ["c"], "client_addresses": ["192.0.2.3"]}
    ]
    assert [
        (service["name"], service["proxied"], service["client_addresses"])
        for service in filters.services_of(services, "b", hostvars)
    ] == [("web", True, ["192.0.2.1", "192.0.2.3"]), ("raw", False, ["192.0.2.1"])]
    assert filters.services_of(services, "c", hostvars) == []


def test_prometheus_reads_its_own_host_plain_and_others_by_tls() -> None:
    hosts = [{"inventory_hostname": name, "private_address": f"192.0.2.{name[1]}"} for name in ("h1", "h2")]
    assert filters.scrape_targets(hosts, 9100, "h2") == [
        {"instance": "h1", "address": "192.0.2.1:9100", "scheme": "https"},
        {"instance": "h2", "address": "127.0.0.1:9100", "scheme": "http"},
    ]


def test_the_certificate_of_a_host_holds_its_name_and_its_address() -> None:
    hosts = [
        {"inventory_hostname": "worker-1.example.com", "private_address": "192.0.2.1"},
        {"inventory_hostname": "192.0.2.2", "private_address": "192.0.2.2"},
    ]
    first, second = filters.host_certificates(hosts)
    assert first == {
        "name": "host_worker-1.example.com",
        "common_name": "worker-1.example.com",
        "alt_names": ["worker-1.example.com", "192.0.2.1"],
        "client_auth": True,
    }
    assert second["alt_names"] == ["192.0.2.2"]


def test_the_development_listener_is_local_only() -> None:
    assert "listen 5556" in text("local", "local1", "/etc/nginx/nginx.conf")
    for inventory, host in (("staging", "staging1"), ("prod", "nginx1")):
        page = text(inventory, host, "/etc/nginx/nginx.conf")
        assert "5556" not in page and "Strict-Transport-Security" in page


def test_the_prefix_is_kept_by_nginx() -> None:
    for line in text("prod", "nginx1", "/etc/nginx/nginx.conf").splitlines():
        if line.strip().startswith("proxy_pass"):
            assert re.fullmatch(r"proxy_pass https://(flower|198\.51\.100\.60:909[03]);", line.strip())


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
    assert instances[0]["options"] == [
        "--queues=x,y", "--concurrency=3", "--pool=prefork", "--max-memory-per-child=10240",
    ]  # fmt: skip
    assert instances[2]["options"] == ["--queues=z", "--concurrency=2", "--pool=threads", "--time-limit=30"]
    hosts = [{"inventory_hostname": name, "worker_pools": pools} for name in ("w1", "w2")]
    assert list(filters.worker_queues(hosts)) == ["a-1@w1", "a-2@w1", "b-1@w1", "a-1@w2", "a-2@w2", "b-1@w2"]


def test_each_instance_has_its_options_and_its_limit_of_memory() -> None:
    pools = [
        {"name": "a", "queues": ["x"], "replicas": 2, "memory_max_mb": 300},
        {"name": "b", "queues": ["z"]},
    ]
    files = {
        entry["path"]: entry.get("content") for entry in filters.worker_files(filters.worker_instances(pools))
    }
    folder = "/etc/systemd/system/celery-worker@"
    assert [path for path, content in files.items() if content is None] == [
        f"{folder}{name}.service.d" for name in ("a-1", "a-2", "b-1")
    ]
    for name, limit in (("a-1", "300M"), ("a-2", "300M"), ("b-1", "infinity")):
        assert str(files[f"{folder}{name}.service.d/memory.conf"]).endswith(f"[Service]\nMemoryMax={limit}\n")
        assert f"/etc/hothouse/worker-{name}.env" in files
    # systemd puts a new limit in force for a worker that runs.
    for unit in filters.worker_units(filters.worker_instances(pools), ["/etc/hothouse/app.env"]):
        assert not [path for path in unit["restart_after"] if "memory" in path]


@pytest.mark.parametrize(
    ("redis", "mebibytes"),
    [("0", 0), ("256mb", 256), ("1GB", 1024), ("1g", 953), ("2097152", 2), ("2048k", 1), (" 512kb ", 0)],
)
def test_what_redis_and_workers_may_take_is_known_in_mebibytes(redis: str, mebibytes: int) -> None:
    pools = [{"name": "a", "memory_max_mb": 100, "replicas": 3}, {"name": "b"}]
    assert filters.memory_wanted([], redis) == mebibytes
    assert filters.memory_wanted(pools, redis) == mebibytes + 300


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(filters.AnsibleFilterError, match="redis_maxmemory: 'much' is no size such as 256mb"):
        filters.memory_wanted([], "much")


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
    assert jobs["redis"] == [f"198.51.100.{number}:9121" for number in (11, 12, 13)]
    assert jobs["flower"] == ["198.51.100.40:5555"] and len(jobs["haproxy"]) == 3
    assert len(jobs["node"]) == 8 and "127.0.0.1:9100" in jobs["node"]
    for job in config["scrape_configs"]:
        for static in job["static_configs"]:
            if static["labels"].get("__param_module") == "sentinel":
                assert static["targets"][0].endswith(":26379")
            elif any(target.startswith("198.") for target in static["targets"]):
                assert static["labels"]["__scheme__"] == "https", job["job_name"]
                assert set(job["tls_config"]) == {"ca_file", "cert_file", "key_file"}
    pages = ["https://ops.example.com/flower/", "https://ops.example.com/"]
    assert jobs["blackbox"] == [*pages, *(f"198.51.100.{number}:26379" for number in (11, 12, 13))]
    page = text("prod", "nginx1", "/etc/nginx/nginx.conf")
    assert "auth_basic_user_file" in page


@pytest.mark.parametrize(
    ("url", "names", "expected"),
    [
        ("https://ops.example.com/", ["ops.example.com"], "ops.example.com"),
        ("https://lb.example.com:8443/", ["ops.example.com"], "lb.example.com"),
        ("https://192.0.2.1/", ["ops.example.com"], "ops.example.com"),
        ("https://192.0.2.1:8443/", ["localhost", "192.0.2.1"], "192.0.2.1"),
        ("https://[2001:db8::1]/", ["localhost"], "localhost"),
        ("https://[2001:db8::1]/", ["localhost", "2001:DB8:0::1"], "2001:db8::1"),
    ],
)
def test_a_probe_asks_under_a_name_that_the_door_has(url: str, names: list[str], expected: str) -> None:
    assert filters.asked_name(url, names) == expected


def test_names_are_written_as_clients_write_them() -> None:
    names = [
        "Ops.Example.com.",
        "ops.example.com",
        "2001:DB8:0::1",
        "192.0.2.1",
        "b\u00fccher.example",
        "*.example.com",
    ]
    assert filters.host_names(names) == [
        "ops.example.com", "[2001:db8::1]", "192.0.2.1", "xn--bcher-kva.example", "*.example.com",
    ]  # fmt: skip
    home = ("localhost", "LOCALHOST.", "x.localhost", "127.0.0.1", "127.8.8.8", "::1")
    assert [name for name in home if not filters.leads_home(name)] == []
    assert [
        name
        for name in ("localhost.example.com", "192.0.2.1", "::2", "mylocalhost")
        if filters.leads_home(name)
    ] == []


def test_a_name_of_a_map_matches_itself_alone() -> None:
    for name in ("ops", 'o"p\\s', "a.b", "~^", "ops$", "default", "o#{;}"):
        key = filters.nginx_exactly(name)
        assert key[0] == key[-1] == '"'
        pattern = re.sub(r'\\([\\"])', r"\1", key[1:-1]).removeprefix("~").replace("\\z", "\\Z")
        assert re.search(pattern, name) and not re.search(pattern, f"{name}\n")
        assert not re.search(pattern, f"x{name}") and not re.search(pattern, name.swapcase() + "x")


@pytest.mark.parametrize(
    ("sources", "host", "url", "name"),
    [
        (["inventories/local"], "local1", "https://10.213.1.10/", "localhost"),
        (["inventories/prod"], "monitor1", "https://ops.example.com/", "ops.example.com"),
        # What bin/up --topology prod makes: its certificate has the address.
        (
            ["inventories/prod", "molecule/prod/inventory", "bin/lib/prod"],
            "monitor1",
            "https://10.213.2.16/",
            "10.213.2.16",
        ),
    ],
)
def test_the_probe_never_asks_its_own_host_for_another(
    sources: list[str], host: str, url: str, name: str
) -> None:
    options = [word for source in sources for word in ("-i", source)]
    files = (
        render(*options)[host]["rendered"] if len(sources) > 1 else rendered(sources[0].split("/")[1])[host]
    )
    module = yaml.safe_load(files["/etc/prometheus/hothouse/blackbox.yml"])["modules"]["public"]["http"]
    jobs = yaml.safe_load(files["/etc/prometheus/hothouse/prometheus.yml"])["scrape_configs"]
    [probe] = [job for job in jobs if job["job_name"] == "blackbox"]
    assert probe["static_configs"][0]["targets"] == [f"{url}flower/"]
    assert module["tls_config"]["server_name"] == name
    assert module.get("headers", {"Host": name}) == {"Host": name}


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


def test_one_redis_is_alone_and_plain() -> None:
    config = text("staging", "staging1", "/etc/redis/redis.conf")
    assert "\nport 6379\n" in config and "tls" not in config and "replica" not in config
    assert not [path for path in rendered("staging")["staging1"] if "sentinel" in path]
    assert json.loads(text("staging", "staging1", "/etc/hothouse/redis.json"))["nodes"] == {}
    assert "--tls" not in text("staging", "staging1", "/usr/local/bin/hothouse-redis-cli")


def test_three_redis_hosts_copy_the_primary_by_tls_and_agree_by_majority() -> None:
    for host, address in (("redis1", "198.51.100.11"), ("redis3", "198.51.100.13")):
        config = text("prod", host, "/etc/redis/redis.conf").splitlines()
        for line in (
            "port 0", "tls-port 6379", "tls-auth-clients yes", "tls-replication yes", "min-replicas-to-write 1",
            "min-replicas-max-lag 3", "masteruser replica", f"replica-announce-ip {address}",
        ):  # fmt: skip
            assert line in config, line
        # The same file on every node, whatever its role: that is kept elsewhere.
        assert not [line for line in config if line.startswith(("replicaof", "masterauth"))]
        sentinel = text("prod", host, "/etc/redis/sentinel.conf")
        assert f"\nbind {address}\n" in sentinel and "\nport 0\n" in sentinel
        assert "sentinel down-after-milliseconds hothouse 2000\n" in sentinel
        assert "monitor" not in sentinel
        settings = json.loads(text("prod", host, "/etc/hothouse/redis.json"))
        assert settings["address"] == address and settings["tls"] is True
        assert list(settings["nodes"]) == ["198.51.100.11", "198.51.100.12", "198.51.100.13"]
        assert (
            len(
                {
                    identity
                    for identity in settings["nodes"].values()
                    if re.fullmatch("[0-9a-f]{40}", identity)
                }
            )
            == 3
        )
