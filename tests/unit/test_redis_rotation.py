"""Passwords and certificates of three Redis hosts are replaced while they run, whatever interrupts it in between."""

from __future__ import annotations

import getpass
import importlib.util
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha1, sha256
from ipaddress import ip_address
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import BUNDLE
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ADDRESSES = ("127.0.0.21", "127.0.0.22", "127.0.0.23")
NAMES = ("admin", "sentinel", "replica", "worker")
DOWN_SECONDS = 2  # after which Sentinels take a node for dead
RULES = {
    "admin": "~* &* +@all",
    "replica": "-@all +auth +hello +ping +psync +replconf",
    "sentinel": "-@all +auth +hello +ping +info +role +multi +exec +slaveof +config|rewrite +client|setname "
    "+client|kill +script|kill +subscribe +publish resetchannels &__sentinel__:hello",
    "worker": "~q:* +@all",
}


class Authority:
    """A CA, and the certificates of the three hosts from it."""

    def __init__(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"CA {random.random()}")])
        now = datetime.now(UTC)

        def sign(name: x509.Name, public: Any, *extensions: x509.ExtensionType) -> str:
            builder = x509.CertificateBuilder().subject_name(name).issuer_name(subject).public_key(public)
            builder = builder.serial_number(x509.random_serial_number())
            builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(1))
            for extension in extensions:
                builder = builder.add_extension(extension, critical=False)
            certificate = builder.sign(key, hashes.SHA256())
            return certificate.public_bytes(serialization.Encoding.PEM).decode()

        self.ca = sign(subject, key.public_key(), x509.BasicConstraints(ca=True, path_length=0))
        self.hosts = {}
        for address in ADDRESSES:
            own = ec.generate_private_key(ec.SECP256R1())
            form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            pem = own.private_bytes(serialization.Encoding.PEM, *form).decode()
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
            san = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
            self.hosts[address] = sign(name, own.public_key(), san), pem


class Credentials:
    """What the controller has: passwords, and the CAs that are trusted."""

    def __init__(self) -> None:
        self.authority = Authority()
        self.trusted = self.authority.ca
        self.passwords = {name: self.password() for name in NAMES}

    @staticmethod
    def password() -> str:
        return f"secret{random.getrandbits(64)}"

    def replace(self, *names: str) -> None:
        """Passwords by their names; `ca` is another CA at once, `ca both` its first step and `ca new` its second."""
        for name in names:
            if name == "ca new":
                self.trusted = self.authority.ca
            elif name.startswith("ca"):
                old, self.authority = self.authority.ca, Authority()
                self.trusted = self.authority.ca + (old if name == "ca both" else "")
            else:
                self.passwords[name] = self.password()


class Node:
    """A host with Redis and Sentinel, and the script of its units."""

    def __init__(self, folder: Path, address: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.address, self.port = folder, address, port
        folder.mkdir()
        spec = importlib.util.spec_from_file_location(
            f"hothouse_redis_{address.replace('.', '_')}", BUNDLE / "roles/redis/files/hothouse_redis.py"
        )
        assert spec and spec.loader
        self.script: ModuleType = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, self.script)
        spec.loader.exec_module(self.script)
        nodes = {each: sha1(each.encode()).hexdigest() for each in ADDRESSES}
        values = {"address": address, "port": port, "sentinel_port": port + 1, "tls": True, "nodes": nodes}
        (folder / "redis.json").write_text(json.dumps(values))
        self.etc = folder / "etc"
        self.etc.mkdir()
        values = {
            "STATE": folder,
            "CREDENTIALS": self.etc,
            "CONFIGURED": self.etc,
            "ACCOUNT": getpass.getuser(),
        }
        values |= {"LOADED": folder / "run/loaded", "BEFORE": folder / "run/before"}
        values["HEADER"] = ["# by this test", f"include {self.etc}/redis.conf"]
        for name, value in values.items():
            monkeypatch.setattr(self.script, name, value)
        self.settings = self.script.Settings(folder / "redis.json")
        monkeypatch.setattr(self.script, "Settings", lambda: self.settings)
        self.redis: subprocess.Popen[bytes] | None = None
        self.sentinel: subprocess.Popen[bytes] | None = None
        self.newest = ""

    def write(self, credentials: Credentials, files: int = 99) -> None:
        """What the role writes, in its order; all of it, or only so many files."""
        secret = credentials.passwords
        users = ["user default off resetpass ~* &* +@all"]
        users += [
            f"user {name} on #{sha256(secret[name].encode()).hexdigest()} {RULES[name]}" for name in NAMES
        ]
        certificate, key = credentials.authority.hosts[self.address]
        texts = {
            "redis_admin": secret["admin"],
            "users.acl": "\n".join(users),
            "ca.crt": credentials.trusted,
            "host.crt": certificate,
            "host.key": key,
            "redis_sentinel": secret["sentinel"],
            "replication.conf": f"masterauth {secret['replica']}",
            "sentinel-passwords.conf": f"requirepass {secret['sentinel']}\n"
            f"sentinel sentinel-pass {secret['sentinel']}\nsentinel auth-pass hothouse {secret['sentinel']}",
        }
        for name, text in list(texts.items())[:files]:
            new = self.etc / f".{name}.new"
            new.write_text(f"{text}\n")
            new.replace(self.etc / name)

    def start(self, primary: str | None = None) -> None:
        etc = self.etc
        certificates = (
            ("tls-cert-file", "host.crt"),
            ("tls-key-file", "host.key"),
            ("tls-ca-cert-file", "ca.crt"),
        )
        common = [f"bind {self.address}", "port 0", "tls-replication yes", "protected-mode no"]
        common += [f"dir {self.folder}", *(f"{option} {etc / name}" for option, name in certificates)]
        redis = [f"tls-port {self.port}", f"aclfile {etc}/users.acl", "appendonly yes", "masteruser replica"]
        redis += [f"include {etc}/replication.conf", "repl-diskless-sync-delay 0", "min-replicas-to-write 1"]
        redis += ["min-replicas-max-lag 3", f"replica-announce-ip {self.address}"]
        sentinel = [f"tls-port {self.port + 1}", f"include {etc}/sentinel-passwords.conf"]
        sentinel += ["sentinel auth-user hothouse sentinel", f"sentinel announce-ip {self.address}"]
        sentinel += [
            f"sentinel announce-port {self.port + 1}",
            f"sentinel down-after-milliseconds hothouse {DOWN_SECONDS * 1000}",
        ]
        (etc / "redis.conf").write_text("\n".join([*common, *redis]) + "\n")
        (etc / "sentinel.conf").write_text("\n".join([*common, *sentinel]) + "\n")
        if primary is not None:
            (self.folder / "seed").write_text(f"replicaof {primary} {self.port}" if primary else "primary")
        self.script.compose()
        self.redis = self.run("redis", self.folder / "redis.conf")
        wait(self.loaded, 20)

    def loaded(self) -> bool:
        try:
            with self.settings.redis() as redis:
                return redis.info("persistence")["loading"] == "0"
        except (OSError, self.script.RedisError):
            return False

    def start_sentinel(self) -> None:
        self.script.compose_sentinel()
        self.sentinel = self.run("sentinel", self.folder / "sentinel.conf", "--sentinel")
        self.newest = self.files_of_sentinel()

    def restart_sentinel(self) -> None:
        """As a run does, if it has not read the newest files."""
        if self.newest != self.files_of_sentinel():
            self.stop(self.sentinel)
            self.start_sentinel()

    def files_of_sentinel(self) -> str:
        return "".join(
            (self.etc / name).read_text() for name in ("sentinel-passwords.conf", *self.script.CERTIFICATES)
        )

    def run(self, name: str, *words: Any) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(["redis-server", *map(str, words)], stdout=log, stderr=log)

    @staticmethod
    def stop(process: subprocess.Popen[bytes] | None) -> None:
        if process:
            process.kill()
            process.wait()

    def log(self, name: str = "sentinel") -> str:
        return (self.folder / f"{name}.log").read_text()


def wait(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.1)
    return value


class Cluster:
    def __init__(self, nodes: list[Node], credentials: Credentials) -> None:
        self.nodes, self.credentials = nodes, credentials

    def steps(self) -> list[Callable[[], Any]]:
        """What a run does, in the role's order: replicas first, the primary last, Sentinels one by one."""
        primary = self.primary()
        order = sorted(self.nodes, key=lambda node: node.address == primary)
        return [
            *(lambda node=node: node.write(self.credentials) for node in self.nodes),
            *(node.script.reload for node in order),
            *(node.restart_sentinel for node in self.nodes),
            *(node.script.settle for node in self.nodes),
        ]  # fmt: skip

    def primary(self) -> str:
        return str(
            max(
                node.script.kept_view(node.script.text_of(node.folder / "sentinel.conf"))
                for node in self.nodes
            ).primary
        )

    def works(self) -> bool:
        """Whether the primary has both replicas, all Sentinels agree, and each node takes the newest credentials."""
        try:
            for node in self.nodes:
                if node.script.passwords("redis_admin")[0] != self.credentials.passwords["admin"]:
                    return False
                with node.settings.redis() as redis:
                    info = redis.info("replication")
                    if info.get(
                        "connected_slaves" if info["role"] == "master" else "master_link_status"
                    ) not in ("2", "up"):
                        return False
                with node.settings.sentinel(node.address) as sentinel:
                    if "3 usable Sentinels" not in sentinel.ask("SENTINEL", "CKQUORUM", "hothouse"):
                        return False
        except (OSError, node.script.RedisError):
            return False
        return True


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    credentials = Credentials()
    with socket.create_server((ADDRESSES[0], 0)) as free:
        port = free.getsockname()[1]
    nodes = [Node(tmp_path / address, address, port, monkeypatch) for address in ADDRESSES]
    try:
        for node in nodes:
            node.write(credentials)
            node.start(primary="" if node is nodes[0] else ADDRESSES[0])
        for node in nodes:
            node.script.ready()
        for node in nodes:
            node.start_sentinel()
        made = Cluster(nodes, credentials)
        wait(made.works, 30)
        yield made
    finally:
        for node in nodes:
            node.stop(node.sentinel)
            node.stop(node.redis)


def let_in(node: Node, user: str, password: str) -> bool:
    try:
        with node.script.Redis(node.address, node.port, [node.etc], user, [password]):
            return True
    except node.script.LoginError:
        return False


def taken_for_dead(cluster: Cluster) -> list[str]:
    """What Sentinels said of Redis; that one of them is restarted is no matter."""
    said = [line for node in cluster.nodes for line in node.log("sentinel").splitlines()]
    return [
        line
        for line in said
        if re.search(r"[+](sdown (master|slave)|odown|try-failover|switch-master)", line)
    ]


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_replaced_and_interrupted_no_node_is_taken_for_dead(cluster: Cluster, seed: int) -> None:
    """Runs that end anywhere, also in the middle of the files of a host, and then one that comes through."""
    chance = random.Random(seed)
    first = dict(cluster.credentials.passwords)
    with cluster.nodes[0].settings.redis() as redis:
        redis.ask("SET", "q:kept", "value")
    everything = [*NAMES, "ca"]
    for _ in range(3):
        names = chance.choice([everything, ["ca both"], chance.sample(everything, 2), ["admin"]])
        cluster.credentials.replace(*names)
        steps = cluster.steps()
        ends = chance.randrange(1, len(steps))
        print(f"{datetime.now()} {names}: the first {ends} of {len(steps)} steps")  # shown when this fails
        for step in steps[:ends]:
            step()
        if chance.random() < 0.5:
            chance.choice(cluster.nodes).write(cluster.credentials, files=chance.randrange(1, 8))
        time.sleep(1.5 * DOWN_SECONDS)  # in which nothing happens
    cluster.credentials.replace("ca new", *NAMES)
    for step in cluster.steps():
        step()
    wait(cluster.works, 30)
    for node in cluster.nodes:
        for name in ("admin", "replica", "worker"):
            assert let_in(node, name, cluster.credentials.passwords[name])
            assert not let_in(node, name, first[name])
        with node.settings.redis() as redis:
            assert redis.ask("GET", "q:kept") == "value"
    assert taken_for_dead(cluster) == []
