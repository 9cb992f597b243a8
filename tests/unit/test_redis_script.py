"""What the exporter reads in Redis: the script of roles/monitor, run by real servers with the exporter's rights.

redis-server and redis-cli have to be in the PATH (Debian: package redis-tools has both, under names of its own).
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from conftest import BUNDLE
from test_preflight import Inventory
from test_templates import rendered, text

SCRIPT = "/etc/hothouse/hothouse.lua"
GAUGE = "app:campaigns:ambiguous"


def rights() -> list[str]:
    """The words of the exporter's rule, as the role writes them for the example's inventory."""
    variables = yaml.safe_load((BUNDLE / "roles/redis/vars/main.yml").read_text())
    users = [user for value in variables.values() if isinstance(value, list) for user in value]
    rules = next(user["rules"] for user in users if user.get("name") == "exporter")
    assert "redis_exporter_keys" in rules
    return [*re.sub(r"{{.*?}}", "", rules).split(), f"%R~{GAUGE}"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Node:
    """A server on loopback, and what the script finds in it."""

    def __init__(self, folder: Path, *options: str, inventory: str = "local") -> None:
        self.port = free_port()
        self.script = text(inventory, "local1", SCRIPT)  # takes Ansible some seconds
        folder.mkdir()
        self.log = (folder / "log").open("w")
        words = [
            "redis-server",
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(folder),
            *options,
        ]
        self.process = subprocess.Popen([*words, "--save", ""], stdout=self.log, stderr=subprocess.STDOUT)
        wait(lambda: self("PING") == "PONG")
        self("ACL", "SETUSER", "exporter", "on", "nopass", *rights())

    def __call__(self, *words: str) -> str:
        done = subprocess.run(
            ["redis-cli", "-p", str(self.port), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    def send(self, words: list[bytes]) -> None:
        """A command of any bytes."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(
                b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
            )
            assert connection.recv(100).startswith(b":")

    def write(self, *words: str) -> int:
        """Write something; the number of replicas that have it. WAIT counts what its own connection wrote."""
        commands = f"{shlex.join(words)}\nWAIT 2 5000\n"
        done = subprocess.run(
            ["redis-cli", "-p", str(self.port)], input=commands, capture_output=True, text=True, check=True
        )
        return int(done.stdout.split()[-1])

    def figures(self) -> dict[str, float]:
        """Name/label → value, as the exporter gets them."""
        answer = self(
            "--user", "exporter", "--pass", "any", "--no-auth-warning", "--json", "EVAL", self.script, "0"
        )
        found = json.loads(answer)
        return dict(zip(found[::2], map(float, found[1::2]), strict=True))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def agreed(port: int, primary: Node) -> bool:
    """Whether the Sentinel on this port takes the node for the primary, and is done with the failover."""
    words = ["redis-cli", "-p", str(port), "SENTINEL", "MASTER", "hothouse"]
    lines = subprocess.run(words, capture_output=True, text=True, check=False).stdout.splitlines()
    said = dict(zip(lines[::2], lines[1::2], strict=False))
    return (said.get("port"), said.get("flags")) == (str(primary.port), "master")


def leads(node: Node, ports: list[int]) -> bool:
    """Whether a node is the primary of the other one, and all Sentinels, on these ports, are done making it that."""
    return node.figures().get("replicas/") == 1 and all(agreed(port, node) for port in ports)


def wait(condition: Callable[[], Any], seconds: float = 15) -> Any:
    """The first true value of a condition."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Makes a server by name; all of them are killed afterwards."""
    nodes: list[Node] = []

    def make(name: str, *options: str, **inventory: str) -> Node:
        nodes.append(Node(tmp_path / name, *options, **inventory))
        return nodes[-1]

    yield make
    for one in nodes:
        one.stop()


def test_a_single_server_says_everything(node: Callable[..., Node]) -> None:
    single = node("single")
    now = int(single("TIME").split()[0])
    single("LPUSH", "q:default", json.dumps({"headers": {"published": now - 100}}))
    single("LPUSH", "q:email_senders", "not JSON")
    single("HSET", "q:unacked", "tag", "{}")
    single("ZADD", "q:unacked_index", str(now - 50), "tag")
    single("LPUSH", "q:dead-letter", "{}", "{}")
    single("ZADD", "redbeat:schedulers", str(now - 60), "gone", str(now), "here")
    single("ZADD", "redbeat::schedule", str(now - 30), "check")
    single("ZADD", GAUGE, "1", "a/1", "2", "a/2", "3", "b/1")
    found = single.figures()
    exact = {
        "queue_messages/default": 1, "queue_messages/email_senders": 1, "unacked_messages/": 1, "dead_letters/": 2,
        "schedulers/": 1, "app/ambiguous_recipients": 3, "replicas/": 0, "sentinels/": 0, "acl_denials/": 0,
    }  # fmt: skip
    assert {name: found[name] for name in exact} == exact
    assert found["queue_oldest_seconds/default"] == pytest.approx(100, abs=5)
    assert found["unacked_oldest_seconds/"] == pytest.approx(50, abs=5)
    assert found["beat_late_seconds/"] == pytest.approx(30, abs=5)
    # Nobody knows when that was published.
    assert "queue_oldest_seconds/email_senders" not in found
    assert single("ACL", "LOG") == ""


def test_a_key_of_another_type_costs_its_own_figure_and_is_reported(node: Callable[..., Node]) -> None:
    single = node("single")
    everything = set(single.figures())
    keys = [
        "q:default", "q:unacked", "q:unacked_index", "q:dead-letter", "q:unknown-task", "q:unknown-task.names",
        "q:_kombu.binding.reply.celery.pidbox", "redbeat::schedule", "redbeat:schedulers", GAUGE,
    ]  # fmt: skip
    for key in keys:
        single("SET", key, "text")
    found = single.figures()
    assert {f"unreadable/{key}" for key in keys} == {name for name in found if name.startswith("unreadable/")}
    assert everything - set(found) == {
        "queue_messages/default", "queue_oldest_seconds/default", "unacked_messages/", "dead_letters/",
        "unknown_tasks/", "reply_queues/", "schedulers/", "app/ambiguous_recipients",
    }  # fmt: skip
    assert found["queue_messages/email_senders"] == 0


def test_a_key_that_the_exporter_may_not_read_costs_its_own_figure(node: Callable[..., Node]) -> None:
    """As between two playbooks, one of which writes the rights and the other one the script."""
    single = node("single")
    everything = set(single.figures())
    single("ACL", "SETUSER", "exporter", "resetkeys", *(word for word in rights() if word.startswith("%R~q")))
    found = set(single.figures())
    assert found - everything == {
        f"unreadable/{GAUGE}",
        "unreadable/redbeat::schedule",
        "unreadable/redbeat:schedulers",
    }
    assert everything - found == {"app/ambiguous_recipients", "schedulers/"}


def test_whatever_a_queue_holds_is_counted(node: Callable[..., Node]) -> None:
    single = node("single")
    odd = (
        "5",
        "null",
        '"text"',
        "[]",
        '{"headers": null}',
        '{"headers": {"published": []}}',
        "[" * 2000,
        "\udcff",
    )
    for count, message in enumerate(odd, 1):
        single("RPUSH", "q:default", message)  # where workers take from
        found = single.figures()
        assert found["queue_messages/default"] == count, message
        assert "queue_oldest_seconds/default" not in found, message


def test_any_name_that_a_queue_can_have_is_the_same_in_every_file(
    node: Callable[..., Node], tmp_path: Path
) -> None:
    """Where systemd, Lua, YAML and Prometheus read it, each with quotes and escapes of its own."""
    random, names = (
        Random(9),
        ["почта-ü", "it's", '"', "\\", "yes", "5", "-x", "#", "*a", "{b:1}", "%h", "🛒", "a:b/c;d"],
    )
    for _ in range(30):
        letters = "\"'\\$%#{}[]<>&*!|:;=@~^/?.ab\u00e9\u0416\u4e2d\U0001f6d2"
        names.append("".join(random.choices(letters, k=9)))
    inventory = Inventory(tmp_path / "inventories", "local")
    task = 'tasks."täglich": \\ #'
    inventory.set(
        worker_pools=[{"name": "all", "queues": names}], app_default_queue=names[0], app_extra_queues=names,
        app_task_routes={}, monitor_runtime_seconds={task: 5},
    )  # fmt: skip
    files = rendered(str(inventory.path))["local1"]
    [line] = re.findall("^WORKER_OPTIONS=(.*)$", files["/etc/hothouse/worker-all-1.env"], re.MULTILINE)
    # As systemd does: once for the file, once as it splits.
    assert shlex.split(re.sub(r"\\(.)", r"\1", line))[0] == f"--queues={','.join(names)}"
    assert json.loads(files["/opt/hothouse/overview/config.json"])["queues"] == names
    rules = {}
    for name in ("records", "alerts"):
        path = tmp_path / f"{name}.yml"
        path.write_text(files[f"/etc/prometheus/hothouse/{name}.yml"])
        subprocess.run(["promtool", "check", "rules", path], capture_output=True, check=True)
        rules[name] = [
            rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
        ]
    assert [
        rule["labels"]["queue"] for rule in rules["records"] if rule["record"] == "hothouse_expected_worker"
    ] == names
    assert task in [rule["labels"].get("task") for rule in rules["records"] if "labels" in rule]
    [slow] = [rule["expr"] for rule in rules["alerts"] if rule["alert"] == "TaskSlow"]
    assert json.loads(re.findall("task=(.*)} > 5$", slow)[0]) == task

    single = node("single", inventory=str(inventory.path))
    for name in names:
        single("LPUSH", f"q:{name}", "{}")
    assert {name: 1 for name in names} == {
        name.removeprefix("queue_messages/"): value
        for name, value in single.figures().items()
        if name.startswith("queue_messages/")
    }


def test_tasks_that_no_release_knows_are_named(node: Callable[..., Node]) -> None:
    single = node("single")
    names = {"shop.new": 3, "täsk.почта-🛒": 1, '<b>"{{ x }}"\\': 2, "x" * 100: 4}
    for name, count in names.items():
        single("HSET", "q:unknown-task.names", name, str(count))
    single("LPUSH", "q:unknown-task", *["{}"] * sum(names.values()))
    found = single.figures()
    assert found["unknown_tasks/"] == 10
    assert {name: value for name, value in found.items() if name.startswith("unknown_task/")} == {
        f"unknown_task/{name}": count for name, count in names.items()
    }
    assert single("ACL", "LOG") == ""


def test_a_task_s_name_is_whatever_somebody_sent(node: Callable[..., Node]) -> None:
    """What becomes of any bytes is a label of one line that Prometheus takes, and there are no more than 50."""
    single, random, names = (
        node("single"),
        Random(9),
        {b"": 1, b"\xed\xa0\x80": 1, "x\u202e\u2028\x85".encode(): 1},
    )
    pieces = [b"", b"\n", b"\0", b"\xff", "ü".encode(), "🛒".encode()[:3], b"}", b'"', b"y" * 99, b"z" * 5000]
    while len(names) < 3000:
        noise = bytes(random.randrange(256) for _ in range(random.randrange(40)))
        names[random.choice(pieces) + noise + random.choice(pieces)] = random.randrange(1, 9)
    for begin, end in ((0, 60), (60, 3000)):  # kept by Redis as a short list, and as a table
        some = list(names.items())[begin:end]
        words = [
            b"HSET",
            b"q:unknown-task.names",
            *(part for name, count in some for part in (name, b"%d" % count)),
        ]
        single.send(words)
        labels = [name.removeprefix("unknown_task/") for name in single.figures() if "unknown_task/" in name]
        assert len(labels) == 50
        for label in labels:
            assert label.encode() and not re.search(r"[\x00-\x1f\x7f-\x9f]", label) and len(label) <= 103, (
                label
            )


def test_figures_come_from_the_primary_alone_and_follow_a_failover(
    node: Callable[..., Node], tmp_path: Path
) -> None:
    """A primary, two replicas and three Sentinels; the primary is killed."""
    options = (
        "--min-replicas-to-write",
        "1",
        "--min-replicas-max-lag",
        "3",
        "--repl-diskless-sync-delay",
        "0",
    )
    nodes = [node("node1", *options)]
    nodes += [
        node(name, *options, "--replicaof", "127.0.0.1", str(nodes[0].port)) for name in ("node2", "node3")
    ]
    ports = [free_port() for _ in range(3)]
    for number, port in enumerate(ports):
        config = tmp_path / f"sentinel{number}.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\nsentinel monitor hothouse 127.0.0.1 {nodes[0].port} 2\n"
            "sentinel down-after-milliseconds hothouse 3000\nsentinel failover-timeout hothouse 5000\n"
        )
    sentinels = [
        subprocess.Popen(
            ["redis-server", path, "--sentinel"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for path in sorted(tmp_path.glob("sentinel?.conf"))
    ]
    try:
        wait(lambda: nodes[0].figures()["replicas/"] == 2)
        wait(lambda: [one.figures()["sentinels/"] for one in nodes] == [3, 3, 3], 30)
        assert nodes[0].write("LPUSH", "q:default", json.dumps({"headers": {"published": 0}})) == 2
        assert nodes[0].figures()["queue_messages/default"] == 1
        for replica in nodes[1:]:
            assert set(replica.figures()) == {"acl_denials/", "sentinels/"}

        nodes[0].process.kill()
        survivors = nodes[1:]
        # Until all Sentinels agree, one may send the replica to its primary once more, which it would leave for that.
        primary = wait(lambda: next((one for one in survivors if leads(one, ports)), None), 60)
        assert primary.figures()["queue_messages/default"] == 1
        assert [len(one.figures()) for one in survivors if one is not primary] == [2]

        sentinels[0].kill()
        wait(lambda: primary.figures()["sentinels/"] == 2)
        # One that stands still is no good replica, though it is still connected.
        other = next(one for one in survivors if one is not primary)
        other.process.send_signal(19)
        wait(lambda: primary.figures()["replicas/"] == 0)
        assert "connected_slaves:1" in primary("INFO", "replication")
        other.process.send_signal(18)
        assert [one("ACL", "LOG") for one in survivors] == ["", ""]
    finally:
        for sentinel in sentinels:
            sentinel.kill()
            sentinel.wait()
