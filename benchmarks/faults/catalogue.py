"""Everything that is broken on purpose. A fault is a context: entering it breaks something, leaving it mends it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from collector import Mails
from hosts import Hosts, Unready, wait

# Long enough for Sentinel to notice, to vote and to promote, and for everybody to follow.
HOLD_SECONDS = 15.0
# The threads of one worker that sends mail, and of all: so many mails can be on their way at once.
THREADS = 8
MAILS_AT_ONCE = 3 * THREADS


@dataclass
class World:
    """What faults act upon."""

    hosts: Hosts
    mails: Mails
    random: random.Random

    def worker(self) -> str:
        """A host with workers."""
        return self.random.choice(self.hosts.groups["worker"])

    def replica(self) -> str:
        """A host with Redis that is not the primary."""
        primary = self.hosts.primary()
        return self.random.choice([name for name in self.hosts.groups["redis"] if name != primary])


Break = Callable[[World], AbstractContextManager[None]]


@dataclass(frozen=True)
class Fault:
    """A way to break something: its name in the table, and what it does."""

    name: str
    inject: Break
    # How long it stays broken, in seconds.
    hold: float = HOLD_SECONDS
    # Whether there is another primary afterwards.
    failover: bool = False
    # Of how many recipients at most nobody can know whether they got their mail.
    doubtful: int = MAILS_AT_ONCE
    # Whether to break it before the campaign begins, which would have ended by the time it is broken.
    first: bool = False


@contextmanager
def pool_child(world: World) -> Iterator[None]:
    child = "$(pgrep -P $(systemctl show -P MainPID celery-worker@default-1) celery | head -n 1)"
    world.hosts.run(world.worker(), f"kill -KILL {child}")
    yield


def worker(pool: str) -> Break:
    @contextmanager
    def inject(world: World) -> Iterator[None]:
        unit = f"celery-worker@{pool}-1.service"
        world.hosts.run(world.worker(), f"systemctl kill --kill-whom=all --signal=KILL {unit}")
        yield

    return inject


@contextmanager
def power_cut(world: World, host: str) -> Iterator[None]:
    world.hosts.power_off(host)
    try:
        yield
    finally:
        world.hosts.power_on(host)


def worker_host(world: World) -> AbstractContextManager[None]:
    return power_cut(world, world.replica())


def primary_host(world: World) -> AbstractContextManager[None]:
    return power_cut(world, world.hosts.primary())


def beat_host(world: World) -> AbstractContextManager[None]:
    """The host whose beat holds the lock and schedules."""
    latest = world.hosts.run(world.hosts.primary(), "hothouse-redis-cli ZREVRANGE redbeat:schedulers 0 0")
    holder = latest.split("@")[-1]
    if holder not in world.hosts.groups["beat"]:
        raise Unready(f"nobody knows who schedules: {latest!r}")
    return power_cut(world, holder)


@contextmanager
def primary_killed(world: World) -> Iterator[None]:
    """And kept down, for systemd would start it before anybody notices."""
    host = world.hosts.primary()
    stop = "/run/systemd/system/redis-server.service.d/fault.conf"
    try:
        world.hosts.run(
            host,
            f"mkdir -p $(dirname {stop}) && printf '[Service]\\nRestart=no\\n' >{stop} && systemctl daemon-reload && "
            "systemctl kill --kill-whom=all --signal=KILL redis-server",
        )
        yield
    finally:
        world.hosts.run(host, f"rm -f {stop} && systemctl daemon-reload && systemctl restart redis-server")


@contextmanager
def frozen(world: World, host: str, unit: str) -> Iterator[None]:
    world.hosts.run(host, f"systemctl kill --kill-whom=all --signal=STOP {unit}")
    try:
        yield
    finally:
        world.hosts.run(host, f"systemctl kill --kill-whom=all --signal=CONT {unit}")


def primary_frozen(world: World) -> AbstractContextManager[None]:
    return frozen(world, world.hosts.primary(), "redis-server")


@contextmanager
def primary_and_sentinel(world: World) -> Iterator[None]:
    """The primary and the Sentinel of another host at the same time."""
    primary, other = world.hosts.primary(), world.replica()
    with frozen(world, other, "redis-sentinel"), frozen(world, primary, "redis-server"):
        yield


@contextmanager
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
    try:
        yield
    finally:
        world.hosts.run(host, "nft delete table ip fault")


@contextmanager
def sentinel(world: World) -> Iterator[None]:
    host = world.random.choice(world.hosts.groups["redis"])
    world.hosts.run(host, "systemctl kill --kill-whom=all --signal=KILL redis-sentinel")
    yield


@contextmanager
def memory_full(world: World) -> Iterator[None]:
    host = world.hosts.primary()
    limit = world.hosts.run(host, "hothouse-redis-cli --raw CONFIG GET maxmemory").split()[-1]
    world.hosts.run(host, "hothouse-redis-cli CONFIG SET maxmemory 1mb")
    try:
        yield
    finally:
        world.hosts.run(host, f"hothouse-redis-cli CONFIG SET maxmemory {limit}")


@contextmanager
def disk_full(world: World) -> Iterator[None]:
    """The small disk that prepare.yml made; not that of the machine."""
    host = world.hosts.primary()
    fill = "/var/lib/redis/fill"
    try:
        world.hosts.run(
            host, f"mountpoint -q /var/lib/redis && {{ cat /dev/zero >{fill} 2>/dev/null; test -s {fill}; }}"
        )
        yield
    finally:
        world.hosts.run(host, f"rm -f {fill}")
    question = "hothouse-redis-cli INFO persistence"
    wait(
        lambda: "aof_last_write_status:ok" in world.hosts.run(host, question, check=False),
        "Redis to write again",
        30,
    )


# Shifts what Python calls the time, in seconds: the kernel's clock is that of all hosts.
CLOCK = """
import datetime, time
right, real = time.time, datetime.datetime
class Kind(type(real)):
    def __instancecheck__(cls, value):
        return isinstance(value, real)
class Shifted(real, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(seconds=SHIFT)
    @classmethod
    def utcnow(cls):
        return real.utcnow() + datetime.timedelta(seconds=SHIFT)
time.time, datetime.datetime = (lambda: right() + SHIFT), Shifted
"""


@contextmanager
def clock(world: World) -> Iterator[None]:
    """The clock of one host's workers is an hour ahead or behind."""
    host, shift = world.worker(), world.random.choice([3600, -3600])
    override = "/run/systemd/system/celery-worker@.service.d"
    restart = "systemctl daemon-reload && systemctl restart 'celery-worker@*'"
    try:
        world.hosts.run(
            host,
            f"mkdir -p {override} /run/fault && cat >/run/fault/sitecustomize.py <<'END'\nSHIFT = {shift}\n{CLOCK}END\n"
            f"printf '[Service]\\nEnvironment=PYTHONPATH=/run/fault:/opt/hothouse/lib\\n' >{override}/fault.conf && "
            + restart,
            seconds=120,
        )
        yield
    finally:
        world.hosts.run(host, f"rm -rf {override} /run/fault && {restart}", seconds=120)


def mail_server(mode: str) -> Break:
    @contextmanager
    def inject(world: World) -> Iterator[None]:
        world.mails.mode = mode
        try:
            yield
        finally:
            world.mails.mode = "fine"

    return inject


FAULTS = [
    Fault("SIGKILL of a pool's child", pool_child, hold=2, doubtful=0),
    Fault("SIGKILL of a worker", worker("default"), hold=2, doubtful=0),
    Fault("SIGKILL of a worker that sends mail", worker("email_senders"), hold=2, doubtful=THREADS),
    Fault("power cut of a worker's host", worker_host, hold=10, doubtful=THREADS),
    Fault("power cut of the host that schedules", beat_host, hold=10),
    Fault("power cut of the primary's host", primary_host, failover=True),
    Fault("SIGKILL of the primary", primary_killed, failover=True),
    Fault("primary frozen", primary_frozen, failover=True),
    Fault("primary cut off from the others", primary_partitioned, failover=True),
    Fault("primary and a Sentinel frozen", primary_and_sentinel, failover=True),
    Fault("SIGKILL of a Sentinel", sentinel, hold=3, doubtful=0),
    Fault("Redis' memory full", memory_full, hold=6),
    Fault("Redis' disk full", disk_full, hold=6),
    Fault("a host's clock an hour off", clock, hold=8, first=True),
    Fault("mail server refuses", mail_server("refusing"), hold=5, doubtful=0),
    Fault("mail server slow", mail_server("slow"), hold=5, doubtful=0),
    Fault("mail server drops after DATA", mail_server("dropping"), hold=5, doubtful=100),
    Fault("mail server greylists", mail_server("greylisting"), hold=5, doubtful=0),
]
