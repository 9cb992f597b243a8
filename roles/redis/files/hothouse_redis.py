#!/usr/bin/python3 -I
"""roles/redis: what a node of Redis needs beside its configuration, run as root by its units.

Redis and Sentinel rewrite their configuration when roles change. So that the managed files in /etc/redis stay what was
deployed, both run with a file below /var/lib/redis that includes the managed one, and that is composed here at every
start: of all that was rewritten it keeps nothing but who is whose primary.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import re
import shutil
import socket
import ssl
import stat
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

CONFIGURED = Path("/etc/redis")
STATE = Path("/var/lib/redis")
CREDENTIALS = Path("/etc/hothouse/credentials")
SETTINGS = Path("/etc/hothouse/redis.json")
# What the running Redis has loaded, and what it had before, while newer files may be there already. Root's own.
LOADED = Path("/run/hothouse-redis/loaded")
BEFORE = Path("/run/hothouse-redis/before")
PASSWORDS = ("redis_admin", "redis_sentinel")
CERTIFICATES = ("ca.crt", "host.crt", "host.key")
USERS = "users.acl"
REPLICATION = "replication.conf"
ACCOUNT = "redis"
MASTER = "hothouse"
HEADER = (
    "# Composed by /opt/hothouse/lib/hothouse_redis.py at every start, and rewritten by Redis.",
    f"include {CONFIGURED}/redis.conf",
)
NEVER_PROMOTED = "replica-priority 0"
# There while a replica copies everything; what it has until then are no data.
INCOMPLETE = "incomplete"

ANSWER_SECONDS = 1.0  # that a node may take to answer
BUSY_SECONDS = 10.0  # that this node's own Redis may take to answer when nobody is kept waiting
PRIMARY_SECONDS = (
    60.0  # that a node without data waits for another primary to be named, and a replica for its own
)
HUNG_SECONDS = 600.0  # that a Redis with data may answer nothing at all
REPLACED_SECONDS = 15.0  # that a primary that crashed waits for the Sentinels to replace it
CAUGHT_UP_SECONDS = 3.0  # that a replica may take to have all that the primary wrote
HAND_OVER_SECONDS = 10.0  # that a failover may take
SHUT_DOWN_SECONDS = 120.0  # that Redis may take to write down its data
POLL_SECONDS = 0.1
MOST_BYTES = 1 << 20  # of a file that Redis or Sentinel rewrites; a few thousand are usual
EPOCH = "[0-9]{1,18}"  # a number of 64 bits


class RedisError(Exception):
    """What Redis answered instead of doing it."""


class LoginError(RedisError):
    """None of the passwords is right."""


class Settings:
    """What roles/redis knows of the node and the others."""

    def __init__(self, path: Path = SETTINGS) -> None:
        values = json.loads(path.read_text())
        self.address: str = values["address"]
        self.port: int = values["port"]
        self.sentinel_port: int = values["sentinel_port"]
        self.tls: bool = values["tls"]
        # address → identity of its Sentinel; empty for a single host
        self.nodes: dict[str, str] = values["nodes"]

    @property
    def others(self) -> list[str]:
        return [address for address in self.nodes if address != self.address]

    @property
    def quorum(self) -> int:
        return len(self.nodes) // 2 + 1

    def redis(self, address: str | None = None, seconds: float = ANSWER_SECONDS) -> Redis:
        """A connection to Redis as `admin`."""
        return Redis(
            address or self.address, self.port, self.identities(), "admin", passwords("redis_admin"), seconds
        )

    def sentinel(self, address: str) -> Redis:
        """A connection to a Sentinel."""
        return Redis(address, self.sentinel_port, self.identities(), "default", passwords("redis_sentinel"))

    def identities(self) -> list[Path]:
        """Folders with certificates, one of which a node accepts while they are being replaced; none without TLS."""
        return [
            folder for folder in (LOADED, CONFIGURED, BEFORE) if self.tls and (folder / "ca.crt").exists()
        ]


def passwords(credential: str) -> list[str]:
    """The passwords that a node may accept while they are being replaced: what it has loaded is seldom the newest."""
    paths = [folder / credential for folder in (LOADED, CREDENTIALS, BEFORE)]
    return list(dict.fromkeys(path.read_text().strip() for path in paths if path.exists()))


class Redis:
    """A connection to Redis or Sentinel. Raises RedisError and OSError."""

    def __init__(
        self,
        address: str,
        port: int,
        identities: list[Path],
        user: str,
        passwords: list[str],
        seconds: float = ANSWER_SECONDS,
    ) -> None:
        for identity in identities or [None]:
            last = not identities or identity == identities[-1]
            connection = socket.create_connection((address, port), timeout=seconds)
            try:
                if identity:
                    context = ssl.create_default_context(cafile=str(identity / "ca.crt"))
                    context.load_cert_chain(identity / "host.crt", identity / "host.key")
                    connection = context.wrap_socket(connection, server_hostname=address)
                self._connection = connection
                self._reader = connection.makefile("rb")
                self._log_in(user, passwords)
                return
            except (ssl.SSLError, ConnectionError):
                # The other side may look at our certificate only now.
                connection.close()
                if last:
                    raise
            except BaseException:
                connection.close()
                raise

    def _log_in(self, user: str, passwords: list[str]) -> None:
        for password in passwords:
            with contextlib.suppress(LoginError):
                self.ask("AUTH", user, password)
                return
        raise LoginError(f"none of the passwords of `{user}` is right")

    def __enter__(self) -> Redis:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._connection.close()

    def patience(self, seconds: float) -> None:
        """How long an answer may take from now on."""
        self._connection.settimeout(seconds)

    def ask(self, *words: str) -> Any:
        """Send a command; its answer as text, number, list or None."""
        parts = [b"*%d\r\n" % len(words)]
        for word in words:
            data = word.encode()
            parts.append(b"$%d\r\n%s\r\n" % (len(data), data))
        self._connection.sendall(b"".join(parts))
        return self._answer()

    def _answer(self) -> Any:
        line = self._reader.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("the connection was closed")
        kind, text = line[:1], line[1:-2].decode()
        if kind == b"-":
            raise (LoginError if text.startswith("WRONGPASS") else RedisError)(text)
        if kind == b":":
            return int(text)
        if kind == b"$":
            if int(text) < 0:
                return None
            data = self._reader.read(int(text) + 2)
            if len(data) < int(text) + 2:
                raise ConnectionResetError("the connection was closed")
            return data[:-2].decode()
        if kind == b"*":
            return None if int(text) < 0 else [self._answer() for _ in range(int(text))]
        return text

    def info(self, section: str) -> dict[str, str]:
        lines = str(self.ask("INFO", section)).splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)


class View(NamedTuple):
    """Who is the primary, as a Sentinel sees it. Of two views the one of the later failover (epoch) is right."""

    epoch: int
    primary: str


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def wait(condition: Callable[[], Any], seconds: float) -> Any:
    """The first true value of the condition, or its last one when the time is over."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return value


# Redis owns its folders, so a Redis that was broken into may leave anything there, links to files of root among it.


def content(path: Path, most: int = -1) -> bytes:
    """What is in a plain file, the first `most` bytes; nothing else is followed or waited for. Raises OSError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is no plain file")
        return file.read(most)


def text_of(path: Path) -> str | None:
    """What Redis or Sentinel wrote, None if there is no such file. It may be any bytes; each use checks its part."""
    try:
        return content(path, MOST_BYTES).decode("ascii", "replace")
    except FileNotFoundError:
        return None


def replace(path: Path, lines: list[str]) -> None:
    """Write a file that Redis may rewrite, whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fchown(file.fileno(), pwd.getpwnam(ACCOUNT).pw_uid, grp.getgrnam(ACCOUNT).gr_gid)
        os.fsync(file.fileno())
    new.replace(path)


def forget_remains(name: str) -> None:
    """Remove what a Redis or this script left that was killed while it rewrote a file: passwords may be in there."""
    for path in STATE.glob(f"{name}.*"):
        if re.fullmatch(r"[A-Za-z0-9]{6}", path.name.removeprefix(f"{name}.")):
            path.unlink(missing_ok=True)
    (STATE / f".{name}.new").unlink(missing_ok=True)


def has_data() -> bool:
    """Whether Redis would load all that it once had.

    Without a manifest it takes the append-only file for empty. A replica has one at once, long before its data.
    """
    return any((STATE / "appendonlydir").glob("*.manifest")) and not (STATE / INCOMPLETE).exists()


# Who is the primary.


def kept_view(text: str | None) -> View | None:
    """What a Sentinel's own file remembers."""
    monitor = re.search(rf"^sentinel monitor {MASTER} (\S+) ", text or "", re.MULTILINE)
    epoch = re.search(rf"^sentinel config-epoch {MASTER} ({EPOCH})$", text or "", re.MULTILINE)
    return View(int(epoch[1]) if epoch else 0, monitor[1]) if monitor else None


def asked_view(settings: Settings, address: str) -> View | None:
    """What a Sentinel says; None if it does not answer."""
    try:
        with settings.sentinel(address) as sentinel:
            answer = sentinel.ask("SENTINEL", "MASTER", MASTER)
    except (OSError, RedisError):
        return None
    values = dict(zip(answer[::2], answer[1::2], strict=True))
    return View(int(values["config-epoch"]), values["ip"])


def views(settings: Settings) -> list[View]:
    """What every Sentinel says, this node's own as it last wrote it down. Addresses of former nodes do not count."""
    with ThreadPoolExecutor(len(settings.nodes)) as pool:
        found = list(pool.map(lambda address: asked_view(settings, address), settings.others))
    found.append(kept_view(text_of(STATE / "sentinel.conf")))
    return [view for view in found if view and view.primary in settings.nodes]


def kept_primary(settings: Settings) -> tuple[bool, str | None]:
    """Whether this node remembers its role, and whose replica it was, if it was one.

    A file that is not sound tells nothing: what is lost of it may have said whose replica this was.
    """
    for name, known in (("redis.conf", HEADER[1]), ("seed", "primary")):
        text = text_of(STATE / name) or ""
        lines = text.splitlines()
        # Nothing else names another node.
        named = any(address in line.split() for line in lines for address in settings.others)
        own = [line for line in lines if line.startswith("replicaof")]
        found = [re.fullmatch(r"replicaof (\S+) [0-9]{1,5}", line) for line in own]
        addresses = [match[1] for match in found if match and match[1] in settings.nodes]
        if not is_sound(text) or len(addresses) != len(own) or len(own) > 1 or named != bool(own):
            continue
        if (known in lines and (text.endswith("\n") or name == "seed")) or (addresses and name == "seed"):
            return True, next(iter(addresses), None)
    return False, None


def is_sound(text: str) -> bool:
    """Whether nothing in a text is what a broken disk, or a stranger, would have left there."""
    return len(text) < MOST_BYTES and not re.search(r"[^\t\n\r -~]", text)


def may_be_replaced(settings: Settings) -> bool:
    """Whether the Sentinels are about to replace this node, which is down: enough of them, and a replica that is fit.

    A replica that was restarted too has not copied anything since, so nobody can tell how much it lacks; then this node
    is the better one. Nothing replaces a node while fewer Sentinels than the quorum run.
    """

    def fit(address: str) -> bool:
        try:
            with settings.redis(address) as redis:
                info = redis.info("replication")
        except (OSError, RedisError):
            return False
        # It is 1 before the first copy.
        return info["role"] == "slave" and int(info["slave_repl_offset"]) > 1

    with ThreadPoolExecutor(len(settings.nodes)) as pool:
        running = sum(
            1 for view in pool.map(lambda address: asked_view(settings, address), settings.nodes) if view
        )
        return running >= settings.quorum and any(pool.map(fit, settings.others))


def followed_primary(settings: Settings) -> str | None:
    """Whose replica this node has to be when it starts; None: it is the primary.

    A primary that crashed may be half replaced when it is back. For a moment it would take writes that are gone when
    the other one is the primary, so it waits for the Sentinels as long as they can replace it.

    A node whose data are lost must never start as the primary: its replicas would copy the emptiness. It waits until
    the Sentinels have made another one the primary, which its own absence makes them do. Only a node that was just
    deployed as the first primary (`seed`) may start without data. Raises RedisError.
    """
    remembers, kept = kept_primary(settings)
    first = (text_of(STATE / "seed") or "").strip() == "primary"
    data = has_data()
    known = remembers or not data
    reason = ""
    began = time.monotonic()
    while True:
        view = max(views(settings), default=None)
        if view and view.primary != settings.address:
            return view.primary
        if kept and not view:
            return kept
        if first and not data:
            return None
        if (
            remembers
            and data
            and (time.monotonic() - began > REPLACED_SECONDS or not may_be_replaced(settings))
        ):
            return None
        if not reason:
            reason = "was the primary" if remembers and data else "has no data here"
            if not known:
                reason = "has data here of which nothing says whose they are"
            say(f"Redis {reason}, so it waits until the Sentinels have made another node the primary")
        if time.monotonic() - began > PRIMARY_SECONDS:
            if not known:
                raise RedisError(
                    f"Redis has data in {STATE}, but neither redis.conf nor seed there says in which role, and no "
                    "Sentinel names a primary. It does not start as the primary with data that may be anybody's. Start "
                    f"Redis and Sentinel on the other nodes ({', '.join(settings.others)}). Only if these are the data "
                    f"to go on with: echo primary > {STATE}/seed"
                )
            raise RedisError(
                f"Redis has no data in {STATE}, and no Sentinel names another primary that it could copy. It does not "
                "start as an empty primary, because its replicas would lose their data too. Start Redis and Sentinel "
                f"on the other nodes ({', '.join(settings.others)}). Only if the data are gone everywhere: "
                f"echo primary > {STATE}/seed"
            )
        time.sleep(POLL_SECONDS)


# What the units run.


def compose() -> None:
    """Before Redis starts: its configuration, and which node it follows."""
    settings = Settings()
    forget_remains("redis.conf")
    lines = [*HEADER]
    if settings.nodes and (primary := followed_primary(settings)):
        # Never promoted before it has what the primary has; `ready` takes it back.
        lines += [f"replicaof {primary} {settings.port}", NEVER_PROMOTED]
        if not has_data():
            replace(STATE / INCOMPLETE, [])
    else:
        (STATE / INCOMPLETE).unlink(missing_ok=True)
    if not settings.nodes:
        # What it knows would be old news if this ever becomes one of several nodes again.
        (STATE / "sentinel.conf").unlink(missing_ok=True)
    replace(STATE / "redis.conf", lines)
    note(deployed_files())


def compose_sentinel() -> None:
    """Before Sentinel starts: its configuration, the present primary, and all other nodes.

    The identities of Sentinels follow from their hosts' names. Otherwise one whose disk was lost would come back as one
    more Sentinel, and the majority would have to count the dead one for ever.
    """
    settings = Settings()
    forget_remains("sentinel.conf")
    previous = text_of(STATE / "sentinel.conf") or ""
    view = kept_view(previous)
    primary = view.primary if view and view.primary in settings.nodes else None
    if not primary:
        latest = max(views(settings), default=None)
        remembers, kept = kept_primary(settings)
        if not latest and not remembers:
            # It would take this node for the primary, against all the others. systemd tries again.
            raise RedisError(
                "Sentinel knows no primary yet: no other Sentinel answers, and no Redis ran here so far"
            )
        primary = latest.primary if latest else kept or settings.address
    epochs = re.findall(
        rf"^sentinel (?:(?:config|leader)-epoch {MASTER}|current-epoch) {EPOCH}$", previous, re.MULTILINE
    )
    replicas = [address for address in settings.nodes if address != primary]
    replace(
        STATE / "sentinel.conf",
        [
            "# Composed by /opt/hothouse/lib/hothouse_redis.py at every start, and rewritten by Sentinel.",
            f"sentinel myid {settings.nodes[settings.address]}",
            f"sentinel monitor {MASTER} {primary} {settings.port} {settings.quorum}",
            *epochs,
            *(f"sentinel known-replica {MASTER} {address} {settings.port}" for address in replicas),
            *(
                f"sentinel known-sentinel {MASTER} {address} {settings.sentinel_port} {settings.nodes[address]}"
                for address in settings.others
            ),
            f"include {CONFIGURED}/sentinel.conf",
        ],
    )


def ready() -> None:
    """After Redis started: a replica counts as started when it has what its primary has. Raises RedisError and OSError.

    Until then no Sentinel may promote it: nobody can tell how much a replica lacks that was down. One that has data may
    be promoted after a while all the same, for its primary may be gone for good.

    systemd kills Redis if this fails. One that is busy with its data, and answers late, is not to begin anew.
    """
    settings = Settings()
    (STATE / "seed").unlink(missing_ok=True)
    if not settings.nodes:
        settle()
        return
    empty = (STATE / INCOMPLETE).exists()
    began, copied = time.monotonic(), 0
    while True:
        late = time.monotonic() - began > PRIMARY_SECONDS
        try:
            # What was deployed since it began to start would be taken for loaded from now on.
            settle()
            with settings.redis(seconds=BUSY_SECONDS) as redis:
                info = redis.info("replication")
                if info["role"] != "slave" or info["master_link_status"] == "up":
                    if not empty or is_written_down(redis):
                        promotable(redis)
                        return
                    began = time.monotonic()
                else:
                    loaded = redis.info("persistence").get("loading_loaded_bytes", "0")
                    if (now := max(int(info.get("master_sync_read_bytes", "0")), 0) + int(loaded)) > copied:
                        began, copied = time.monotonic(), now
                    elif late:
                        problem = f"does not get the data of its primary {info['master_host']}"
                        if empty:
                            raise RedisError(f"Redis has no data here, and {problem}")
                        say(f"Redis runs, but {problem}")
                        promotable(redis)
                        return
        except OSError as error:
            if late and (empty or not isinstance(error, TimeoutError)):
                raise
            if time.monotonic() - began > HUNG_SECONDS:
                say(
                    f"Redis runs, but does not answer within {HUNG_SECONDS:g} s; it is not promoted before a restart"
                )
                return
        time.sleep(POLL_SECONDS)


def is_written_down(redis: Redis) -> bool:
    """Whether what was copied is in the append-only file, which is begun anew after a copy."""
    info = redis.info("persistence")
    return info["aof_rewrite_in_progress"] == info["aof_rewrite_scheduled"] == "0" and (
        info["aof_last_bgrewrite_status"] == "ok"
    )


def promotable(redis: Redis) -> None:
    """Let Sentinels promote this node."""
    (STATE / INCOMPLETE).unlink(missing_ok=True)
    redis.ask("CONFIG", "SET", "replica-priority", "100")


def stop() -> None:
    """Stop Redis. A primary first hands over to a replica that has everything it wrote.

    Writes are held back meanwhile, and clients are sent away only when the other one is primary: they come back there.
    If nobody can take over, Redis stops as it is.
    """
    settings = Settings()
    try:
        with settings.redis() as redis:
            if settings.nodes and redis.info("replication")["role"] == "master":
                try:
                    with sentinel_that_knows(settings) as sentinel:
                        hand_over(settings, redis, sentinel)
                except (OSError, RedisError) as error:
                    say(f"Redis stops without handing over: {error}")
            shut_down(redis)
    except (OSError, RedisError) as error:
        say(f"Redis is left to systemd to stop: {error}")


def shut_down(redis: Redis) -> None:
    """A signal would be lost on a replica that is about to write down what it has just copied; this one insists.

    Everything is in the append-only file, so Redis is not to write all its data once more, for which a full disk has no
    room. Only after a copy from the primary the file is yet to be written: Redis refuses to stop while it does so, but
    not while that is only scheduled, as it is until a background save has ended.
    """
    redis.patience(SHUT_DOWN_SECONDS)
    began, said = time.monotonic(), False
    while True:
        over = time.monotonic() - began > SHUT_DOWN_SECONDS
        try:
            info = redis.info("persistence")
            loading = info["loading"] != "0" or info.get("async_loading", "0") != "0"
            if info["aof_enabled"] != "1" or loading:
                redis.ask("SHUTDOWN")
            elif info["aof_rewrite_scheduled"] == "0":
                if info["aof_last_write_status"] != "ok" and not said:
                    said = True
                    say("Redis cannot write its append-only file, and stops without what it took in at last")
                redis.ask("SHUTDOWN", "NOSAVE")
            elif over:
                raise RedisError("Redis does not come to write its append-only file")
        except ConnectionError:
            return
        except RedisError:
            if over:
                raise
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def sentinel_that_knows(settings: Settings) -> Iterator[Redis]:
    """A Sentinel that takes this node for the primary; of another host, as this one's may be stopping too."""
    for address in [*settings.others, settings.address]:
        if (view := asked_view(settings, address)) and view.primary == settings.address:
            with settings.sentinel(address) as sentinel:
                yield sentinel
            return
    raise RedisError("no Sentinel that takes it for the primary answers")


def hand_over(settings: Settings, redis: Redis, sentinel: Redis) -> None:
    """Make a replica the primary. Raises RedisError if none is fit, and OSError.

    Then writes stay held back until Redis has stopped: a failover that comes late would lose them.
    """
    if not any(progress(redis.info("replication"), 0)):
        raise RedisError("no replica is connected")
    began = time.monotonic()
    # Also until it has stopped, if this comes to nothing.
    redis.ask("CLIENT", "PAUSE", str(int((CAUGHT_UP_SECONDS + HAND_OVER_SECONDS + 60) * 1000)), "WRITE")
    offset = int(redis.info("replication")["master_repl_offset"])
    # All of them, for the Sentinels choose; at least one.
    wait(lambda: all(progress(redis.info("replication"), offset)), CAUGHT_UP_SECONDS)
    if not any(progress(redis.info("replication"), offset)):
        raise RedisError("no replica has all that was written")

    def begun() -> bool:
        """Whether it has begun; a Sentinel can take some seconds to hear that a replica may be promoted."""
        try:
            return bool(sentinel.ask("SENTINEL", "FAILOVER", MASTER))
        except RedisError as error:
            if "NOGOODSLAVE" not in str(error):
                raise
            return False

    if not wait(begun, HAND_OVER_SECONDS):
        raise RedisError("the Sentinels find no replica that is fit")

    def successor() -> str | None:
        address = str(sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)[0])
        return address if address != settings.address else None

    new = wait(successor, HAND_OVER_SECONDS)
    if not new:
        raise RedisError(f"no replica was made the primary within {HAND_OVER_SECONDS:g} s")
    # Nobody is left to write down the new role, and nothing is written until the end.
    replace(STATE / "redis.conf", [*HEADER, f"replicaof {new} {settings.port}"])
    for kind in ("normal", "pubsub"):
        redis.ask("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
    say(f"{new} is the primary now, after {time.monotonic() - began:.1f} s")


def progress(info: dict[str, str], offset: int) -> list[bool]:
    """Of each connected replica, whether it has everything up to this offset."""
    replicas = [
        dict(part.split("=", 1) for part in value.split(","))
        for name, value in info.items()
        if re.fullmatch(r"slave\d+", name)
    ]
    return [int(replica["offset"]) >= offset for replica in replicas if replica["state"] == "online"]


def deployed_files() -> dict[str, bytes]:
    """The files by which a node is let in and lets others in, as they are on the disk."""
    paths = [CREDENTIALS / name for name in PASSWORDS]
    paths += [CONFIGURED / name for name in (USERS, REPLICATION, *CERTIFICATES)]
    return {path.name: content(path) for path in paths if path.exists()}


def loaded_files() -> dict[str, bytes]:
    """The same files as the running Redis has loaded them."""
    return {path.name: path.read_bytes() for path in LOADED.glob("*")}


def note(files: dict[str, bytes]) -> None:
    """Remember what Redis has loaded, and what it had before, by which the other nodes may still know this one."""
    new = LOADED.with_name("new")
    shutil.rmtree(new, ignore_errors=True)
    if files == loaded_files():
        return
    LOADED.parent.mkdir(mode=0o700, exist_ok=True)
    new.mkdir(mode=0o700)
    for name, data in files.items():
        with os.fdopen(os.open(new / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
    if LOADED.exists():
        shutil.rmtree(BEFORE, ignore_errors=True)
        LOADED.rename(BEFORE)
    new.rename(LOADED)


def reload(settle: bool = False) -> None:
    """Take over new certificates, users and the login of replicas without a restart.

    Connections stay, except those of changed users. On several nodes none is closed at first, for a Sentinel that does
    not know the new passwords and certificates yet could not come back, and would take a Redis for dead that is well:
    the old passwords stay good beside the new ones until this is asked to `settle`. Raises RedisError and OSError.
    """
    settings = Settings()
    new, old = deployed_files(), loaded_files()
    hashes, old_hashes = hashes_of(new), hashes_of(old)
    overlap = bool(settings.nodes) and USERS in old and not settle
    try:
        with settings.redis(seconds=BUSY_SECONDS) as redis:
            login = re.search(rb"^masterauth (\S+)$", new.get(REPLICATION, b""), re.MULTILINE)
            if login:
                redis.ask("CONFIG", "SET", "masterauth", login[1].decode())
            if settings.tls:
                files = {
                    "tls-cert-file": "host.crt",
                    "tls-key-file": "host.key",
                    "tls-ca-cert-file": "ca.crt",
                }
                words = [word for option, name in files.items() for word in (option, str(CONFIGURED / name))]
                redis.ask("CONFIG", "SET", *words)
            if overlap:
                for user in hashes.keys() & old_hashes.keys():
                    redis.ask("ACL", "SETUSER", user, f"#{hashes[user]}")
            elif new.get(USERS) != old.get(USERS):
                # Redis 7.0 closes every connection when it has loaded them, this one too.
                with contextlib.suppress(ConnectionError):
                    redis.ask("ACL", "LOAD")
    except (LoginError, ssl.SSLError) as error:
        raise RedisError(
            f"The running Redis on {settings.address} knows neither the password of `admin` and the certificates in "
            f"{CREDENTIALS} and {CONFIGURED} nor those of before ({error}). Nothing was changed in it. Restart it, and "
            "it loads the files that are there: `systemctl restart redis-server`, on one host after the other; a "
            "primary that does so is replaced by a replica, if there is one. Then repeat the run"
        ) from None
    # It counts only if what was deployed is let in from now on.
    password = new["redis_admin"].decode().strip()
    identities = [CONFIGURED] if settings.tls else []
    with Redis(settings.address, settings.port, identities, "admin", [password], BUSY_SECONDS):
        note(new | {USERS: old[USERS]} if overlap else new)


def hashes_of(files: dict[str, bytes]) -> dict[str, str]:
    """The hash of each user's password, from the file of users."""
    return dict(re.findall(r"^user (\S+) on #(\S+)", files.get(USERS, b"").decode(), re.MULTILINE))


def settle() -> None:
    """Let no one in any more by a password of before. Raises RedisError and OSError."""
    if loaded_files() != deployed_files():
        reload(settle=True)
        print("What was deployed is in force, and nothing else.")


def primary() -> None:
    """Print the address of the present primary."""
    settings = Settings()
    latest = max(views(settings), default=None) if settings.nodes else None
    print(latest.primary if latest else settings.address)


def main() -> None:
    commands = {
        "compose": compose,
        "compose-sentinel": compose_sentinel,
        "ready": ready,
        "reload": reload,
        "settle": settle,
        "stop": stop,
        "primary": primary,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: hothouse_redis.py {'|'.join(commands)}")
    try:
        commands[sys.argv[1]]()
    except (OSError, RedisError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
