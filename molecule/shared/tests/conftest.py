"""What the tests know of the scenario they verify: its inventory, its credentials, and ways to reach its hosts."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shlex
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import testinfra
import yaml
from testinfra.host import Host

REPOSITORY = Path(__file__).resolve().parents[3]
SCENARIO = os.environ["MOLECULE_SCENARIO_NAME"]


@dataclass
class Answer:
    """An HTTP answer: status, headers with lower-case names, body."""

    status: int
    headers: dict[str, str]
    body: str

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Stack:
    """The hosts of one scenario, as the inventory describes them."""

    directory: Path = REPOSITORY / "molecule" / SCENARIO
    environment: dict[str, str] = field(
        default_factory=lambda: {
            **os.environ,
            "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
            "ANSIBLE_VAULT_PASSWORD_FILE": str(REPOSITORY / "molecule/shared/vault-password"),
            "ANSIBLE_FORCE_COLOR": "0",
        }
    )

    @cached_property
    def inventory_options(self) -> list[str]:
        """What Molecule gave to ansible-playbook, from the scenario's settings or the shared ones."""
        for path in (self.directory / "molecule.yml", REPOSITORY / ".config/molecule/config.yml"):
            executor = yaml.safe_load(path.read_text()).get("ansible", {}).get("executor")
            if executor:
                known = {
                    "MOLECULE_PROJECT_DIRECTORY": str(REPOSITORY),
                    "MOLECULE_SCENARIO_NAME": SCENARIO,
                    "MOLECULE_SCENARIO_DIRECTORY": str(self.directory),
                }
                words = executor["args"]["ansible_playbook"]
                for name, value in known.items():
                    words = [word.replace(f"${{{name}}}", value) for word in words]
                return words
        raise AssertionError("no inventory is named in molecule.yml")

    @cached_property
    def variables(self) -> dict[str, dict[str, Any]]:
        """The variables of each host that tests ask for, templated."""
        names = (
            "private_address", "private_services",
            "group_names", "worker_pools", "app_queues", "app_celery", "nginx_server_name",
            "nginx_tls", "credentials_file", "container_name", "redis_listen_address", "redis_replicated",
            "nginx_development_port", "mail_listen_address", "ansible_port", "monitor_parts", "private_tls",
            "haproxy_redis_nodes", "haproxy_services", "prepare_nouns",
        )  # fmt: skip
        return self.values(names)

    def values(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The values of these variables by host, templated; None where one is not set."""
        listed = ", ".join(f"'{name}': {name} | default(none)" for name in names)
        # As a text, in which mappings keep their order.
        message = f"{{{{ {{{listed}}} | to_json }}}}"
        done = subprocess.run(
            ["ansible", *self.inventory_options, "all", "-m", "ansible.builtin.debug", "-a", f"msg={message}"],
            env=self.environment
            | {"ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json", "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        hosts = json.loads(done.stdout)["plays"][0]["tasks"][0]["hosts"]
        return {name: json.loads(result["msg"]) for name, result in hosts.items()}

    @cached_property
    def secrets(self) -> dict[str, str]:
        """Every generated credential that must never show: name → value."""
        path = self.credentials_file
        text = path.read_text()
        if text.startswith("$ANSIBLE_VAULT"):
            text = subprocess.run(
                ["ansible-vault", "view", path],
                env=self.environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        values = yaml.safe_load(text)["credentials"]
        return {
            name: value
            for name, value in values.items()
            if name not in ("flower_user", "ca_replaced") and not name.endswith("_certificate")
        } | {"__user": values["flower_user"]}

    @property
    def login(self) -> str:
        return f"{self.secrets['__user']}:{self.secrets['flower_password']}"

    @property
    def credentials_file(self) -> Path:
        return Path(next(iter(self.variables.values()))["credentials_file"])

    def group(self, noun: str) -> list[str]:
        """Names of the hosts of a group."""
        return [name for name, values in self.variables.items() if noun in values["group_names"]]

    def address(self, host: str) -> str:
        return self.variables[host]["private_address"]

    def place(self, host: str, port: int | str) -> str:
        """Address and port of a host as they stand in a URL and in what ss prints."""
        return place(self.address(host), port)

    def addresses(self, host: str) -> list[str]:
        """Every address of a host in its network, as this machine reaches it: those of one link with its end of it."""
        route = subprocess.run(
            ["ip", "-json", "route", "get", self.address(host)], capture_output=True, text=True, check=True
        ).stdout
        device = json.loads(route)[0]["dev"]
        shown = json.loads(self.host(host).check_output("ip -json address show dev eth0"))[0]
        return [
            entry["local"] + (f"%{device}" if entry["local"].startswith("fe80:") else "")
            for entry in shown["addr_info"]
        ]

    @cached_property
    def _hosts(self) -> dict[str, Host]:
        config = REPOSITORY / f".hothouse/ssh/hothouse-molecule-{SCENARIO}.yml"
        return {
            host.backend.host: host
            for host in testinfra.get_hosts(["ansible://all"], ansible_inventory=str(config))
        }

    def host(self, name: str) -> Host:
        """The testinfra host of this name."""
        return self._hosts[name]

    def first(self, noun: str) -> Host:
        """The first host of a group."""
        return self.host(self.group(noun)[0])

    @cached_property
    def workers(self) -> list[str]:
        """Names under which the workers appear in Celery: pools x replicas x hosts."""
        return [
            f"{pool['name']}-{replica}@{host}"
            for host in self.group("worker")
            for pool in self.variables[host]["worker_pools"]
            for replica in range(1, pool.get("replicas", 1) + 1)
        ]

    def units(self, host: str) -> list[str]:
        """The units of ours on a host."""
        groups = self.variables[host]["group_names"]
        units = [
            f"celery-worker@{name.split('@')[0]}.service"
            for name in self.workers
            if name.endswith(f"@{host}")
        ]
        for noun, unit in (("beat", "celery-beat"), ("flower", "celery-flower"), ("mail", "mail")):
            units += [f"{unit}.service"] if noun in groups else []
        units += ["haproxy.service"] if self.has_haproxy(host) else []
        return units + self.monitoring(host)

    def has_haproxy(self, host: str) -> bool:
        """Whether a host offers something to others, or has Redis clients and other hosts beside it."""
        return bool(self.variables[host]["haproxy_services"] or self.variables[host]["haproxy_redis_nodes"])

    def monitoring(self, host: str) -> list[str]:
        """The units of the monitoring on a host."""
        names = {
            "node": ["prometheus-node-exporter"],
            "redis": ["prometheus-redis-exporter"],
            "nginx": ["prometheus-nginx-exporter"],
            "server": ["prometheus", "prometheus-alertmanager", "prometheus-blackbox-exporter"],
        }
        return [f"{name}.service" for part in self.variables[host]["monitor_parts"] for name in names[part]]

    def playbook(
        self, *words: str, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run ansible-playbook from the repository's root as a user would."""
        done = subprocess.run(
            ["ansible-playbook", *self.inventory_options, *words],
            cwd=REPOSITORY, env=self.environment | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        return done

    def redis(
        self, *command: str, user: str = "admin", password: str | None = None, node: str | None = None
    ) -> str:
        """What the present primary, or the node on this host, answers to a user.

        The password goes through the environment of redis-cli.
        """
        secret = password if password is not None else self.secrets[f"redis_{user}"]
        words = " ".join(f"'{word}'" for word in command)
        options = f"{'' if node else '--primary '}--user {user}"
        host = self.host(node) if node else self.first("redis")
        return host.run(f"REDISCLI_AUTH={secret} hothouse-redis-cli {options} {words}").stdout.strip()

    def primary(self) -> str:
        """The name of the host whose Redis is the primary now."""
        address = self.first("redis").check_output("/opt/hothouse/lib/hothouse_redis.py primary")
        names = [name for name in self.group("redis") if self.address(name) == address]
        return names[0] if names else self.group("redis")[0]

    def refusals(self) -> list[str]:
        """What Redis refused, on whichever node, since this was last asked."""
        command = "hothouse-redis-cli ACL LOG && hothouse-redis-cli ACL LOG RESET >&2"
        logs = [self.host(name).check_output(command).strip() for name in self.group("redis")]
        return [log for log in logs if log not in ("", "(empty array)")]

    def request(
        self, path: str, login: str | None = None, method: str = "GET", headers: dict[str, str] | None = None,
        name: str | None = None, body: str | None = None, address: str | None = None,
    ) -> Answer:  # fmt: skip
        """What nginx answers over TLS, its certificate checked as a user would. `address`: its private_address."""
        nginx = self.group("nginx")[0]
        name = name or self.variables[nginx]["nginx_server_name"]
        context = ssl.create_default_context(cafile=str(self.ca_file))
        connection = http.client.HTTPSConnection(name)
        plain = socket.create_connection((address or self.address(nginx), 443), timeout=30)
        connection.sock = context.wrap_socket(plain, server_hostname=name)
        return exchange(connection, path, login, method, headers or {}, body)

    @property
    def ca_file(self) -> Path:
        if self.variables[self.group("nginx")[0]]["nginx_tls"] == "provided":
            return self.credentials_file.parent / "provided.crt"
        return self.credentials_file.parent / "ca.crt"

    def ping(self, queue: str) -> str:
        """Send a task through a queue with the application's own settings; the name of the host that ran it."""
        done = self.first("app").run(f"hothouse-run python -m hothouse_celery ping {shlex.quote(queue)}")
        assert done.rc == 0, done.stderr
        return json.loads(done.stdout)[queue]


def place(address: str, port: int | str) -> str:
    """Address and port as they stand in a URL and in what ss prints."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def exchange(
    connection: http.client.HTTPConnection, path: str, login: str | None, method: str, headers: dict[str, str],
    body: str | None = None,
) -> Answer:  # fmt: skip
    """One request; the path goes out letter by letter."""
    if login is not None:
        headers = headers | {"Authorization": basic(login)}
    connection.request(method, path, body=body, headers=headers)
    response = connection.getresponse()
    try:
        return Answer(
            response.status,
            {key.lower(): value for key, value in response.getheaders()},
            response.read().decode(),
        )
    finally:
        connection.close()


def basic(login: str) -> str:
    """The header Authorization of USER:PASSWORD."""
    return "Basic " + base64.b64encode(login.encode()).decode()


class Door(http.client.HTTPSConnection):
    """One connection to nginx for many requests, whose paths go out letter by letter."""

    def __init__(self, stack: Stack, login: str) -> None:
        nginx = stack.group("nginx")[0]
        super().__init__(stack.variables[nginx]["nginx_server_name"], timeout=30)
        self.address = (stack.address(nginx), 443)
        self.tls = ssl.create_default_context(cafile=str(stack.ca_file))
        self.login = basic(login)

    def connect(self) -> None:
        self.sock = self.tls.wrap_socket(
            socket.create_connection(self.address, 30), server_hostname=self.host
        )

    def ask(self, method: str, path: str, **headers: str) -> tuple[int, str]:
        """Status and body."""
        self.request(method, path, headers={"Authorization": self.login} | headers)
        answer = self.getresponse()
        return answer.status, answer.read().decode(errors="replace")


# What disturbs nothing comes first, so that the last of these finds a time without an alert behind it.
CALM = ("test_hosts.py", "test_addresses.py", "test_grafana.py", "test_flower.py", "test_monitor.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only what is for this scenario: a module or a test that is not for each says so with the marker `scenarios`."""
    known = {path.parent.name for path in REPOSITORY.glob("molecule/*/molecule.yml")}
    for item in items:
        for marker in item.iter_markers("scenarios"):
            assert set(marker.args) <= known, f"{item.nodeid} is for scenarios that are not there"
    here = [
        item
        for item in items
        if not (marker := item.get_closest_marker("scenarios")) or SCENARIO in marker.args
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in here])
    items[:] = sorted(here, key=lambda item: (*CALM, item.path.name).index(item.path.name))


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The scenario's hosts. After all tests Redis must have refused nobody whom a test did not send to be refused."""
    found = Stack()
    yield found
    assert found.refusals() == []


@pytest.fixture
def wait() -> Iterator[Callable[..., Any]]:
    """Wait for a condition: `wait(lambda: …, "what", seconds)` returns its first true value."""

    def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{what} did not come true in {seconds:g} s"
            time.sleep(0.5)
        return value

    yield until
