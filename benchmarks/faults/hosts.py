"""The local hosts of the Molecule scenario `faults`, and what can be done to them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
NETWORK = "hothouse-molecule-faults"
SSH = REPOSITORY / f".hothouse/ssh/{NETWORK}.config"
MASTER_NAME = "hothouse"
# A kernel that ends a process would still say goodbye on its connections.
SILENCE = (
    "add table inet silence; "
    "add chain inet silence in { type filter hook input priority -10; policy drop; }; "
    "add chain inet silence out { type filter hook output priority -10; policy drop; }; "
    "add rule inet silence in iif lo accept; add rule inet silence out oif lo accept"
)


class Unready(Exception):
    """The hosts are not there, or a command on one of them failed; the message names it."""


def wait(condition: Callable[[], Any], what: str, seconds: float) -> Any:
    """Return the first true value of a condition. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come true in {seconds:g} s")
        time.sleep(0.2)
    return value


class Hosts:
    """Names, addresses and groups, as molecule/shared/create.yml noted them down."""

    def __init__(self) -> None:
        path = SSH.with_suffix(".yml")
        if not path.exists():
            raise Unready("there are no hosts: run `molecule converge -s faults`, see docs/faults.md")
        inventory = yaml.safe_load(path.read_text())["all"]
        self.addresses: dict[str, str] = {
            name: values["private_address"] for name, values in inventory["hosts"].items()
        }
        self.groups: dict[str, list[str]] = {
            name: list(group["hosts"]) for name, group in inventory["children"].items()
        }
        # Where the hosts find this machine.
        self.gateway = next(iter(self.addresses.values())).rpartition(".")[0] + ".1"
        self._keep_bridge()

    def _keep_bridge(self) -> None:
        """Fix the hardware address of the hosts' bridge.

        It would be the lowest of those that are connected, and so another one when a host goes: then the other hosts
        would not find this machine for half a minute, and tell it nothing.
        """
        shown = subprocess.run(
            ["ip", "-json", "address", "show", "to", self.gateway], capture_output=True, text=True, check=True
        )
        for bridge in json.loads(shown.stdout):
            address = Path("/sys/class/net", bridge["ifname"], "address").read_text().strip()
            words = ["ip", "link", "set", "dev", bridge["ifname"], "address", address]
            subprocess.run([*([] if os.geteuid() == 0 else ["sudo"]), *words], check=True)

    def run(self, host: str, command: str, check: bool = True, seconds: float = 60) -> str:
        """Run a command as root and return what it prints. Raises Unready."""
        words = ["ssh", "-F", SSH, "-o", "ConnectTimeout=5", "-o", "ConnectionAttempts=3", host, command]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired as error:
            if check:
                raise Unready(f"{host}: {command}: no end after {seconds:g} s") from error
            return ""
        if check and done.returncode:
            raise Unready(f"{host}: {command}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    def podman(self, *words: str) -> None:
        """Do something to a container. Raises Unready."""
        command = [*([] if os.geteuid() == 0 else ["sudo"]), "podman", *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired as error:
            raise Unready(f"{' '.join(command)}: no end after 60 s") from error
        if done.returncode:
            raise Unready(f"{' '.join(command)}: {done.stderr.strip()}")

    def power_off(self, host: str) -> None:
        """Cut a host's power: nothing on it has time for anything, and nobody is told that connections are gone."""
        container = f"{NETWORK}-{host}"
        self.podman("exec", container, "nft", SILENCE)
        self.podman("kill", "--signal", "KILL", container)
        subprocess.run(["ssh", "-F", SSH, "-O", "exit", host], capture_output=True, check=False)

    def power_on(self, host: str) -> None:
        """Start a host and wait until it lets us in."""
        self.podman("start", f"{NETWORK}-{host}")
        wait(lambda: self.run(host, "echo up", check=False, seconds=10), f"{host} to let us in", 60)

    def primary(self) -> str:
        """The host that most Sentinels call the primary. Raises Unready if none answers."""
        by_address = {address: name for name, address in self.addresses.items()}
        question = f"timeout 3 hothouse-redis-cli --sentinel SENTINEL get-master-addr-by-name {MASTER_NAME}"
        with ThreadPoolExecutor() as pool:
            answers = pool.map(
                lambda host: self.run(host, question, check=False, seconds=5).split(), self.groups["redis"]
            )
            votes = Counter(by_address[words[0]] for words in answers if words and words[0] in by_address)
        if not votes:
            raise Unready("no Sentinel answers")
        return votes.most_common(1)[0][0]

    def healthy(self) -> bool:
        """Whether there is a primary with all its replicas, and a Sentinel that takes part on each host of the group.

        One that was frozen looks on for half a minute afterwards (TILT).
        """
        try:
            host = self.primary()
            replication = self.run(host, "hothouse-redis-cli INFO replication", check=False)
            heard = self.run(
                host, f"hothouse-redis-cli --sentinel SENTINEL ckquorum {MASTER_NAME}", check=False
            )
            question = "hothouse-redis-cli --sentinel INFO sentinel"
            calm = all(
                "sentinel_tilt:0" in self.run(name, question, check=False) for name in self.groups["redis"]
            )
        except Unready:
            return False
        others = len(self.groups["redis"]) - 1
        return (
            calm
            and "role:master" in replication
            and f"min_slaves_good_slaves:{others}" in replication
            and heard.startswith(f"OK {others + 1} ")
        )
