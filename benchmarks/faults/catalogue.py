"""Everything that is broken on purpose. A fault is a generator: it breaks something, yields, and mends it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from collector import Mails
from hosts import Hosts, wait

# Long enough for Sentinel to notice, to vote and to promote, and for everybody to follow.
HOLD_SECONDS = 15.0


@dataclass
class World:
    """What faults act upon."""

    hosts: Hosts
    mails: Mails
    random: random.Random

    def worker(self) -> tuple[str, str]:
        """A host and the unit of one of its workers."""
        return self.random.choice(self.hosts.groups["worker"]), f"celery-worker@{self.pool()}-1.service"

    def pool(self) -> str:
        return self.random.choice(["default", "email_senders"])

    def replica(self) -> str:
        """A host with Redis that is not the primary."""
        primary = self.hosts.primary()
        return self.random.choice([name for name in self.hosts.groups["redis"] if name != primary])


@dataclass(frozen=True)
class Fault:
    """A way to break something: its name in the table, and what it does."""

    name: str
    inject: Callable[[World], Iterator[None]]
    # How long it stays broken, in seconds.
    hold: float = HOLD_SECONDS
    # Whether there is another primary afterwards.
    failover: bool = False


def pool_child(world: World) -> Iterator[None]:
    host = world.random.choice(world.hosts.groups["worker"])
    world.hosts.run(
        host, "kill -KILL $(pgrep -P $(systemctl show -P MainPID celery-worker@default-1) celery | head -n 1)"
    )
    yield


def worker(world: World) -> Iterator[None]:
    host, unit = world.worker()
    world.hosts.run(host, f"systemctl kill --kill-whom=all --signal=KILL {unit}")
    yield


def power_cut(world: World, host: str) -> Iterator[None]:
    world.hosts.power_off(host)
    yield
    world.hosts.power_on(host)


def worker_host(world: World) -> Iterator[None]:
    yield from power_cut(world, world.replica())


def primary_host(world: World) -> Iterator[None]:
    yield from power_cut(world, world.hosts.primary())


def beat_host(world: World) -> Iterator[None]:
    """The host whose beat holds the lock and schedules."""
    primary = world.hosts.primary()
    holder = world.hosts.run(primary, "hothouse-redis-cli ZREVRANGE redbeat:schedulers 0 0").split("@")[-1]
    yield from power_cut(world, holder if holder in world.hosts.groups["beat"] else primary)


def primary_killed(world: World) -> Iterator[None]:
    """And kept down, for systemd would start it before anybody notices."""
    host = world.hosts.primary()
    stop = "/run/systemd/system/redis-server.service.d/fault.conf"
    world.hosts.run(host, f"mkdir -p $(dirname {stop}) && printf '[Service]\\nRestart=no\\n' >{stop}")
    world.hosts.run(
        host, "systemctl daemon-reload && systemctl kill --kill-whom=all --signal=KILL redis-server"
    )
    yield
    world.hosts.run(host, f"rm {stop} && systemctl daemon-reload && systemctl restart redis-server")


def frozen(world: World, host: str, unit: str) -> Iterator[None]:
    world.hosts.run(host, f"systemctl kill --kill-whom=all --signal=STOP {unit}")
    yield
    world.hosts.run(host, f"systemctl kill --kill-whom=all --signal=CONT {unit}")


def primary_frozen(world: World) -> Iterator[None]:
    yield from frozen(world, world.hosts.primary(), "redis-server")


def primary_and_sentinel(world: World) -> Iterator[None]:
    """The primary and the Sentinel of another host at the same time."""
    other = frozen(world, world.replica(), "redis-sentinel")
    first = frozen(world, world.hosts.primary(), "redis-server")
    next(other)
    next(first)
    yield
    for fault in (first, other):
        next(fault, None)


def primary_partitioned(world: World) -> Iterator[None]:
    """Cut off from all other hosts; its own processes still reach it."""
    host = world.hosts.primary()
    others = ", ".join(address for name, address in world.hosts.addresses.items() if name != host)
    world.hosts.run(
        host,
        f"nft 'add table ip fault; add chain ip fault in {{ type filter hook input priority -10; }}; "
        f"add chain ip fault out {{ type filter hook output priority -10; }}; "
        f"add rule ip fault in ip saddr {{ {others} }} drop; add rule ip fault out ip daddr {{ {others} }} drop'",
    )
    yield
    world.hosts.run(host, "nft delete table ip fault")


def sentinel(world: World) -> Iterator[None]:
    host = world.random.choice(world.hosts.groups["redis"])
    world.hosts.run(host, "systemctl kill --kill-whom=all --signal=KILL redis-sentinel")
    yield


def memory_full(world: World) -> Iterator[None]:
    host = world.hosts.primary()
    limit = world.hosts.run(host, "hothouse-redis-cli --raw CONFIG GET maxmemory").split()[-1]
    world.hosts.run(host, "hothouse-redis-cli CONFIG SET maxmemory 1mb")
    yield
    world.hosts.run(host, f"hothouse-redis-cli CONFIG SET maxmemory {limit}")


def disk_full(world: World) -> Iterator[None]:
    host = world.hosts.primary()
    world.hosts.run(host, "cat /dev/zero >/var/lib/redis/fill 2>/dev/null; test -s /var/lib/redis/fill")
    yield
    world.hosts.run(host, "rm /var/lib/redis/fill")
    wait(
        lambda: (
            "aof_last_write_status:ok"
            in world.hosts.run(host, "hothouse-redis-cli INFO persistence", check=False)
        ),
        "Redis to write again",
        30,
    )


def clock(world: World) -> Iterator[None]:
    """One worker's clock is an hour ahead or behind: for Python, as the kernel's is that of all hosts."""
    host, unit = world.worker()
    shift = world.random.choice([3600, -3600])
    code = f"import time; right = time.time; time.time = lambda: right() + {shift}"
    override = f"/run/systemd/system/{unit}.d"
    world.hosts.run(
        host,
        f"mkdir -p {override} /run/fault && echo '{code}' >/run/fault/sitecustomize.py && "
        f"printf '[Service]\\nEnvironment=PYTHONPATH=/run/fault:/opt/hothouse/lib\\n' >{override}/fault.conf",
    )
    world.hosts.run(host, f"systemctl daemon-reload && systemctl restart {unit}", seconds=120)
    yield
    world.hosts.run(
        host, f"rm -r {override} && systemctl daemon-reload && systemctl restart {unit}", seconds=120
    )


def mail_server(mode: str) -> Callable[[World], Iterator[None]]:
    def inject(world: World) -> Iterator[None]:
        world.mails.mode = mode
        yield
        world.mails.mode = "fine"

    return inject


FAULTS = [
    Fault("SIGKILL of a pool's child", pool_child, hold=2),
    Fault("SIGKILL of a worker", worker, hold=2),
    Fault("power cut of a worker's host", worker_host, hold=10),
    Fault("power cut of the host that schedules", beat_host, hold=10),
    Fault("power cut of the primary's host", primary_host, failover=True),
    Fault("SIGKILL of the primary", primary_killed, failover=True),
    Fault("primary frozen", primary_frozen, failover=True),
    Fault("primary cut off from the others", primary_partitioned, failover=True),
    Fault("primary and a Sentinel frozen", primary_and_sentinel, failover=True),
    Fault("SIGKILL of a Sentinel", sentinel, hold=3),
    Fault("Redis' memory full", memory_full, hold=6),
    Fault("Redis' disk full", disk_full, hold=6),
    Fault("a worker's clock an hour off", clock, hold=8),
    Fault("mail server refuses", mail_server("refusing"), hold=5),
    Fault("mail server slow", mail_server("slow"), hold=5),
    Fault("mail server drops after DATA", mail_server("dropping"), hold=5),
    Fault("mail server greylists", mail_server("greylisting"), hold=5),
]
