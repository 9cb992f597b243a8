"""Who is the primary when nodes start: never one without data, whatever is left on its disk."""

from __future__ import annotations

import getpass
import grp
import importlib.util
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from conftest import BUNDLE, load_plugin

filters = load_plugin("filter/hothouse")
NODES = {"r1": "127.0.0.11", "r2": "127.0.0.12", "r3": "127.0.0.13"}
SENTINEL = "sentinel monitor hothouse 127.0.0.12 6379 2"
EMPTY, DATA = "known", "known\ndata"


def said(**lines: str) -> dict[str, Any]:
    """What hosts answered to roles/redis/tasks/primary.yml."""
    return {name: {"stdout_lines": text.splitlines()} for name, text in lines.items()}


def primary(**lines: str) -> str:
    return str(filters.redis_roles(NODES, said(**lines))["primary"])


def test_on_fresh_hosts_the_first_becomes_the_primary() -> None:
    assert filters.redis_roles(NODES, said(r1="", r2="", r3="")) == {
        "primary": "r1",
        "deployed": False,
        "known": [],
    }


def test_the_host_that_has_data_stays_the_primary_wherever_it_stands_in_the_inventory() -> None:
    assert primary(r1="", r2="", r3=DATA) == "r3"
    assert primary(r1="", r2="", r3="data") == "r3"


def test_a_run_that_was_interrupted_goes_on_with_the_same_primary() -> None:
    assert primary(r1="known\nreplicaof 127.0.0.12 6379", r2=EMPTY, r3="") == "r2"


def test_the_later_failover_counts() -> None:
    old = "sentinel monitor hothouse 127.0.0.11 6379 2\nsentinel config-epoch hothouse 9"
    new = f"{SENTINEL}\nsentinel config-epoch hothouse 10"
    assert primary(r1=f"{DATA}\n{old}", r2=f"{DATA}\n{new}", r3=f"{DATA}\n{old}") == "r2"
    # Also with the hosts of --limit alone.
    assert primary(r1=f"{DATA}\n{new}") == "r2"
    # A host whose disk was lost is told what the others know.
    assert filters.redis_roles(NODES, said(r1="", r2=f"{DATA}\n{new}", r3=f"{DATA}\n{old}"))["known"] == [
        "r2",
        "r3",
    ]
    # Its Sentinel has not been started yet.
    assert primary(r1=f"{DATA}\nreplicaof 127.0.0.12 6379", r2=DATA, r3=f"{DATA}\n{new}") == "r2"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({"r1": DATA, "r2": DATA, "r3": ""}, "r1 and r2 have data of their own"),
        ({"r1": "", "r3": ""}, "r2 is not part of this run (--limit?)"),
        (
            {"r1": DATA, "r2": SENTINEL, "r3": ""},
            "r2 for the primary of Redis, but it has no data (a lost disk?)",
        ),
        (
            {"r1": "", "r2": f"{EMPTY}\n{SENTINEL}"},
            "r2 for the primary of Redis, but it has no data (a lost disk?), and r3 may have",
        ),
        (
            {"r1": DATA, "r2": f"{DATA}\n{SENTINEL}", "r3": f"{DATA}\n{SENTINEL}"},
            "r1 has data of its own, but the Sentinels of r2, r3 remember r2 as the primary",
        ),
        (
            {"r1": f"{DATA}\nsentinel monitor hothouse 127.0.0.19 6379 2", "r2": DATA, "r3": DATA},
            "127.0.0.19, which is no host of the group `redis` any more",
        ),
    ],
)
def test_a_choice_that_could_cost_data_is_refused(lines: dict[str, str], expected: str) -> None:
    with pytest.raises(AnsibleFilterError) as error:
        primary(**lines)
    assert expected in str(error.value) and "nothing was changed on the redis hosts" in str(error.value)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of the units as r1, alone: of the other nodes nobody answers."""
    path = BUNDLE / "roles/redis/files/hothouse_redis.py"
    spec = importlib.util.spec_from_file_location("hothouse_redis", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"address": NODES["r1"], "port": port, "sentinel_port": port, "tls": False}
    settings["nodes"] = {address: name for name, address in NODES.items()}
    (tmp_path / "redis.json").write_text(json.dumps(settings))
    (tmp_path / "redis_sentinel").write_text("secret\n")
    (tmp_path / "redis_admin").write_text("secret\n")
    paths = {"STATE": tmp_path, "CREDENTIALS": tmp_path, "CONFIGURED": tmp_path}
    paths |= {"LOADED": tmp_path / "run/loaded", "BEFORE": tmp_path / "run/before"}
    for name, value in {**paths, "PRIMARY_SECONDS": 0.3, "ACCOUNT": getpass.getuser()}.items():
        monkeypatch.setattr(module, name, value)
    module.__dict__["settings"] = own = module.Settings(tmp_path / "redis.json")
    monkeypatch.setattr(module, "Settings", lambda: own)
    return module


def leave(folder: Path, data: bool = False, **files: str) -> None:
    """What is on the disk of the node."""
    if data:
        (folder / "appendonlydir").mkdir()
        (folder / "appendonlydir/appendonly.aof.manifest").write_text("")
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


REPLICA = "include /etc/redis/redis.conf\nreplicaof 127.0.0.13 6379\n"
PRIMARY = "include /etc/redis/redis.conf\n"


@pytest.mark.parametrize(
    ("left", "follows"),
    [
        ({"seed": "primary\n"}, None),
        ({"seed": "replicaof 127.0.0.13 6379\n"}, "127.0.0.13"),
        ({"data": True, "redis_conf": PRIMARY}, None),
        ({"data": True, "redis_conf": REPLICA}, "127.0.0.13"),
        ({"data": False, "redis_conf": REPLICA}, "127.0.0.13"),
        # Its own Sentinel saw a failover while Redis was down.
        ({"data": True, "redis_conf": PRIMARY, "sentinel_conf": SENTINEL}, "127.0.0.12"),
        ({"data": False, "sentinel_conf": SENTINEL}, "127.0.0.12"),
        ({"data": True, "seed": "primary"}, None),
    ],
)
def test_a_node_starts_in_the_role_that_it_remembers(
    node: ModuleType, tmp_path: Path, left: dict[str, Any], follows: str | None
) -> None:
    leave(tmp_path, **left)
    assert node.followed_primary(node.settings) == follows


@pytest.mark.parametrize(
    "left",
    [
        {},
        {"redis_conf": PRIMARY},
        {"sentinel_conf": SENTINEL.replace("127.0.0.12", "127.0.0.11")},
        {"seed": "replicaof 127.0.0.11 6379\n", "sentinel_conf": SENTINEL.replace(".12", ".11")},
    ],
)
def test_a_node_without_data_never_starts_as_the_primary(
    node: ModuleType, tmp_path: Path, left: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, **left)
    with pytest.raises(node.RedisError, match="does not start as an empty primary"):
        node.followed_primary(node.settings)
    assert "waits until the Sentinels have made another node the primary" in capsys.readouterr().err


def test_data_that_nobody_deployed_are_told_from_lost_ones(
    node: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, data=True)
    with pytest.raises(node.RedisError) as error:
        node.followed_primary(node.settings)
    assert f"Redis has data in {tmp_path}, but neither redis.conf nor seed" in str(error.value)
    assert "has data here of which nothing says whose they are, so it waits" in capsys.readouterr().err


# The account of Redis owns the folder in which root writes.


def test_a_planted_link_leads_root_nowhere(
    node: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners: list[tuple[int, int]] = []
    monkeypatch.setattr(node.os, "fchown", lambda _, user, group: owners.append((user, group)))
    victim = tmp_path / "shadow"
    victim.write_text("root:secret\n")
    before = victim.stat()
    for name in (".redis.conf.new", "redis.conf"):
        (tmp_path / name).symlink_to(victim)
    node.replace(tmp_path / "redis.conf", ["include this"])
    assert victim.read_text() == "root:secret\n" and victim.stat() == before
    written = tmp_path / "redis.conf"
    assert written.read_text() == "include this\n" and not written.is_symlink()
    assert written.stat().st_mode & 0o777 == 0o600
    assert owners == [(os.getuid(), grp.getgrnam(getpass.getuser()).gr_gid)]
    assert not (tmp_path / ".redis.conf.new").is_symlink()


def test_a_link_that_comes_back_at_once_is_not_followed(
    node: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "shadow"
    victim.write_text("root:secret\n")
    (tmp_path / ".redis.conf.new").symlink_to(victim)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(FileExistsError):
        node.replace(tmp_path / "redis.conf", ["include this"])
    assert victim.read_text() == "root:secret\n"


@pytest.mark.parametrize("name", ["redis.conf", "seed", "sentinel.conf"])
def test_root_reads_no_file_through_a_link_and_waits_for_no_pipe(
    node: ModuleType, tmp_path: Path, name: str
) -> None:
    (tmp_path / "elsewhere").write_text("replicaof 127.0.0.13 6379\n")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        node.followed_primary(node.settings)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="is no plain file"):
        node.followed_primary(node.settings)


def test_what_was_loaded_is_noted_where_redis_cannot_write(node: ModuleType, tmp_path: Path) -> None:
    leave(tmp_path, seed="primary", users_acl=USERS)
    node.compose()
    assert node.loaded_files()["users.acl"] == USERS.encode()
    assert {path.stat().st_mode & 0o777 for path in (node.LOADED, node.LOADED.parent)} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in node.LOADED.iterdir()} == {0o600}
    source = (BUNDLE / "roles/redis/files/hothouse_redis.py").read_text()
    assert 'LOADED = Path("/run/hothouse-redis/loaded")' in source


# Real servers.

USERS = "user default on nopass ~* &* +@all\nuser admin on >secret ~* &* +@all\n"
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(node: ModuleType, tmp_path: Path) -> Iterator[Start]:
    """Starts a server with the data of this folder; all of them are killed afterwards."""
    servers: list[subprocess.Popen[bytes]] = []

    def run(folder: Path, *options: str, address: str = NODES["r1"]) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        if not (tmp_path / "users.acl").exists():
            (tmp_path / "users.acl").write_text(USERS)
        words = ["--bind", address, "--port", str(node.settings.port), "--dir", str(folder)]
        words += ["--aclfile", str(tmp_path / "users.acl"), "--protected-mode", "no"]
        words += ["--enable-debug-command", "yes", "--appendonly", "yes", "--save", "3600 1"]
        words += ["--repl-diskless-sync-delay", "0"]
        with (folder / "log").open("ab") as log:
            servers.append(subprocess.Popen(["redis-server", *words, *options], stdout=log, stderr=log))
        settings = node.settings

        def answers() -> bool:
            try:
                with settings.redis(address, 5) as redis:
                    return redis.info("persistence")["loading"] == "0"
            except (OSError, node.RedisError):
                return False

        assert node.wait(answers, 15), (folder / "log").read_text()
        return servers[-1]

    yield run
    for server in servers:
        server.kill()
        server.wait()


def ended(server: subprocess.Popen[bytes]) -> int:
    return server.wait(15)


@pytest.fixture
def asleep(node: ModuleType) -> Iterator[Callable[[float], None]]:
    """Lets the server of this node answer nobody for some seconds."""
    threads: list[threading.Thread] = []

    def sleep(seconds: float) -> None:
        def run() -> None:
            with node.settings.redis(seconds=30) as redis:
                redis.ask("DEBUG", "SLEEP", str(seconds))

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        time.sleep(0.3)

    yield sleep
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("patience", [10.0, 0.4])
def test_a_redis_that_answers_late_is_not_killed(
    node: ModuleType,
    tmp_path: Path,
    start: Start,
    asleep: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    patience: float,
) -> None:
    """With one long answer, and with connections that are given up in between."""
    monkeypatch.setattr(node, "BUSY_SECONDS", patience)
    monkeypatch.setattr(node, "PRIMARY_SECONDS", 15.0)
    start(tmp_path / "primary", address=NODES["r3"])
    leave(tmp_path, redis_conf=f"{REPLICA}replica-priority 0\n", incomplete="")
    port = str(node.settings.port)
    start(tmp_path / "replica", "--replicaof", NODES["r3"], port, "--replica-priority", "0")
    asleep(1.8)
    began = time.monotonic()
    node.ready()
    assert time.monotonic() - began > 1
    with node.settings.redis() as redis:
        assert redis.ask("CONFIG", "GET", "replica-priority")[1] == "100"
        assert redis.info("replication")["master_link_status"] == "up"
    assert not (tmp_path / "incomplete").exists()


def test_a_replica_that_got_nothing_has_no_data_though_redis_made_its_files(
    node: ModuleType, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started a second time it would be promoted, and the primary would copy its emptiness."""
    monkeypatch.setattr(node, "BUSY_SECONDS", 1.0)
    leave(tmp_path, seed=f"replicaof {NODES['r3']} 6379\n", users_acl=USERS)
    node.compose()
    # The primary does not answer.
    server = start(tmp_path, "--replicaof", NODES["r3"], "1", "--replica-priority", "0")
    with pytest.raises(node.RedisError, match="has no data here, and does not get the data of its primary"):
        node.ready()
    server.kill()
    server.wait()
    assert list((tmp_path / "appendonlydir").glob("*.manifest")) and not node.has_data()
    node.compose()
    assert "replica-priority 0" in (tmp_path / "redis.conf").read_text()


def test_a_replica_that_has_data_is_promotable_when_it_follows_or_nobody_is_there(
    node: ModuleType, tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, data=True, redis_conf=REPLICA, users_acl=USERS)
    node.compose()
    assert "replica-priority 0" in (tmp_path / "redis.conf").read_text()
    start(tmp_path / "replica", "--replicaof", NODES["r3"], "1", "--replica-priority", "0")
    node.ready()
    assert "Redis runs, but does not get the data of its primary" in capsys.readouterr().err
    with node.settings.redis() as redis:
        assert redis.ask("CONFIG", "GET", "replica-priority")[1] == "100"


def test_replicas_learn_a_new_login_by_a_reload(node: ModuleType, tmp_path: Path, start: Start) -> None:
    start(tmp_path / "data", "--masterauth", "old")
    (tmp_path / "replication.conf").write_text("# roles/redis\nmasterauth new\n")
    node.reload()
    with node.settings.redis() as redis:
        assert redis.ask("CONFIG", "GET", "masterauth")[1] == "new"


def give(folder: Path, password: str) -> None:
    """What a run writes for another password of `admin`."""
    (folder / "redis_admin").write_text(f"{password}\n")
    (folder / "users.acl").write_text(USERS.replace(">secret", f"#{sha256(password.encode()).hexdigest()}"))


@pytest.mark.parametrize("alone", [True, False])
def test_a_password_of_admin_that_changes_twice_before_redis_hears_of_it_is_taken_over(
    node: ModuleType, tmp_path: Path, start: Start, alone: bool
) -> None:
    node.settings.nodes = {} if alone else node.settings.nodes
    give(tmp_path, "secret")
    start(tmp_path / "data")
    node.note(node.deployed_files())
    give(tmp_path, "second")
    give(tmp_path, "third")
    node.reload()
    node.reload()
    node.settle()
    for password in ("secret", "second"):
        with pytest.raises(node.LoginError):
            node.Redis(NODES["r1"], node.settings.port, [], "admin", [password])
    with node.Redis(NODES["r1"], node.settings.port, [], "admin", ["third"]) as redis:
        assert redis.ask("PING") == "PONG"


def test_what_is_deployed_while_redis_starts_is_taken_over_at_once(
    node: ModuleType, tmp_path: Path, start: Start
) -> None:
    """systemd takes it for read, as the unit was not active before."""
    node.settings.nodes = {}
    leave(tmp_path, seed="primary", users_acl=USERS)
    node.compose()
    start(tmp_path / "data")
    give(tmp_path, "late")
    node.ready()
    with node.Redis(NODES["r1"], node.settings.port, [], "admin", ["late"]) as redis:
        assert redis.ask("PING") == "PONG"


def test_a_redis_that_was_given_another_password_by_hand_says_what_helps(
    node: ModuleType, tmp_path: Path, start: Start
) -> None:
    node.settings.nodes = {}
    server = start(tmp_path / "data")
    node.note(node.deployed_files())
    with node.settings.redis() as redis:
        redis.ask("ACL", "SETUSER", "admin", "resetpass", ">by hand")
    give(tmp_path, "second")
    with pytest.raises(node.RedisError) as error:
        node.reload()
    assert "password of `admin`" in str(error.value) and "`systemctl restart redis-server`" in str(
        error.value
    )
    server.kill()
    server.wait()
    node.compose()
    start(tmp_path / "data")
    node.reload()


def test_a_redis_that_is_alone_forgets_what_its_sentinel_knew(node: ModuleType, tmp_path: Path) -> None:
    leave(tmp_path, data=True, redis_conf=PRIMARY, sentinel_conf=SENTINEL, users_acl=USERS)
    node.settings.nodes = {}
    node.compose()
    assert not (tmp_path / "sentinel.conf").exists()


def test_a_sentinel_that_knows_nobody_does_not_watch_its_own_redis(node: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(node.RedisError, match="knows no primary yet"):
        node.compose_sentinel()
    leave(tmp_path, redis_conf=REPLICA)
    node.compose_sentinel()
    assert "sentinel monitor hothouse 127.0.0.13 " in (tmp_path / "sentinel.conf").read_text()


def test_a_redis_that_never_answers_is_killed_only_without_data(
    node: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"BUSY_SECONDS": 0.1, "PRIMARY_SECONDS": 0.5, "HUNG_SECONDS": 0.8}.items():
        monkeypatch.setattr(node, name, value)
    leave(tmp_path, redis_conf=REPLICA)
    with pytest.raises(ConnectionRefusedError):
        node.ready()
    with socket.create_server((NODES["r1"], node.settings.port)):
        node.ready()
        assert "Redis runs, but does not answer within 0.8 s" in capsys.readouterr().err
        (tmp_path / "incomplete").touch()
        with pytest.raises(TimeoutError):
            node.ready()


def test_users_count_as_loaded_only_when_redis_has_loaded_them(
    node: ModuleType, tmp_path: Path, start: Start
) -> None:
    start(tmp_path / "data")
    node.note({"users.acl": b"of the start"})
    (tmp_path / "users.acl").write_text(USERS + "user mistaken on +nonsense\n")
    for _ in range(2):
        with pytest.raises(node.RedisError):
            node.settle()
        assert node.loaded_files()["users.acl"] == b"of the start"
    # The admin is another one too, so that Redis closes the connection that loads.
    (tmp_path / "users.acl").write_text(
        USERS.replace(">secret", ">secret >second") + "user late on >late +ping\n"
    )
    node.settle()
    assert node.loaded_files() == node.deployed_files()
    with node.Redis(NODES["r1"], node.settings.port, [], "late", ["late"]) as late:
        assert late.ask("PING") == "PONG"


@pytest.mark.parametrize("answer", [b"+OK\r\n", b"-WRONGPASS no\r\n"])
def test_a_closed_connection_counts_only_if_a_new_login_works(
    node: ModuleType, tmp_path: Path, answer: bytes
) -> None:
    leave(tmp_path, users_acl=USERS)
    node.note({"users.acl": b"of the start"})
    with socket.create_server((NODES["r1"], node.settings.port)) as listener:

        def serve() -> None:
            first, _ = listener.accept()
            with first:
                first.recv(4096)
                first.sendall(b"+OK\r\n")
                first.recv(4096)  # ACL LOAD
            second, _ = listener.accept()
            with second:
                second.recv(4096)
                second.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        if answer.startswith(b"+"):
            node.settle()
            assert node.loaded_files() == node.deployed_files()
        else:
            with pytest.raises(node.RedisError):
                node.settle()
            assert node.loaded_files()["users.acl"] == b"of the start"
        thread.join()


def fill(node: ModuleType) -> None:
    with node.settings.redis() as redis:
        for number in range(20):
            redis.ask("SET", f"key{number}", "value")


def kept(node: ModuleType) -> int:
    with node.settings.redis() as redis:
        return int(redis.ask("DBSIZE"))


def test_redis_stops_at_once_though_there_is_no_room_for_all_its_data(
    node: ModuleType, tmp_path: Path, start: Start
) -> None:
    server = start(tmp_path / "data")
    (tmp_path / "data/dump.rdb").mkdir()  # so that it cannot be written, not even by root
    fill(node)
    began = time.monotonic()
    with node.settings.redis() as redis:
        node.shut_down(redis)
    assert ended(server) == 0 and time.monotonic() - began < 2
    start(tmp_path / "data")
    assert kept(node) == 20


def test_without_an_append_only_file_redis_writes_its_data_down(
    node: ModuleType, tmp_path: Path, start: Start
) -> None:
    server = start(tmp_path / "data", "--appendonly", "no")
    fill(node)
    with node.settings.redis() as redis:
        node.shut_down(redis)
    ended(server)
    assert (tmp_path / "data/dump.rdb").is_file()
    start(tmp_path / "data", "--appendonly", "no")
    assert kept(node) == 20


@pytest.mark.parametrize("behind", [False, True])
def test_redis_stops_only_when_its_first_append_only_file_is_whole(
    node: ModuleType, tmp_path: Path, start: Start, behind: bool
) -> None:
    """Also if that has to wait for a background save."""
    server = start(tmp_path / "data", "--appendonly", "no")
    fill(node)
    with node.settings.redis() as redis:
        redis.ask("CONFIG", "SET", "rdb-key-save-delay", "50000")
        if behind:
            redis.ask("BGSAVE")
        redis.ask("CONFIG", "SET", "appendonly", "yes")
        info = redis.info("persistence")
        assert info["aof_rewrite_scheduled" if behind else "aof_rewrite_in_progress"] == "1"
        node.shut_down(redis)
    ended(server)
    start(tmp_path / "data")
    assert kept(node) == 20


BROKEN = random.Random(11)


def broken(text: str) -> list[bytes]:
    """What a text may be after a crash of a disk, or in the hands of a stranger: cut, torn, mixed, without an end."""
    data = text.encode()
    found = [data[:end] for end in range(0, len(data), 3)]
    found += [
        b"",
        b"\0" * 100,
        b"\xff\xfe" + data,
        data.replace(b"\n", b"\r"),
        data * 3,
        b"x" * 3_000_000,
        data + b"x" * 3_000_000,
    ]
    for _ in range(150):
        torn = bytearray(data)
        for _ in range(BROKEN.randrange(1, 8)):
            position = BROKEN.randrange(len(torn))
            piece = BROKEN.choice(
                [
                    b"\0",
                    b"\xff",
                    b"\xe2\x80",
                    b"\n",
                    b"9" * 5000,
                    "\u0661".encode(),
                    b" ",
                    b'"',
                    BROKEN.randbytes(9),
                ]
            )
            torn[position : position + BROKEN.randrange(3)] = piece
        found.append(bytes(torn))
    return found


def test_whatever_is_in_their_files_redis_starts_as_nothing_else_than_before(
    node: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or not at all, and says why: a replica whose file is torn never becomes a primary with its old data."""
    monkeypatch.setattr(node, "REPLACED_SECONDS", 0)
    monkeypatch.setattr(node, "PRIMARY_SECONDS", 0)
    monkeypatch.setattr(node, "POLL_SECONDS", 0)
    monkeypatch.setattr(node, "views", lambda settings: [])
    monkeypatch.setattr(node, "may_be_replaced", lambda settings: False)
    leave(tmp_path, data=True, users_acl=USERS)
    outcomes = set()
    for name, text in (("redis.conf", REPLICA), ("seed", "replicaof 127.0.0.13 6379\n")):
        for data in broken(text):
            for file in ("redis.conf", "seed"):
                (tmp_path / file).unlink(missing_ok=True)
            (tmp_path / name).write_bytes(data)
            try:
                outcome = node.followed_primary(node.Settings())
            except node.RedisError:
                outcome = "refused"
            # Cut right before that line it is what a primary has. The Sentinels, who are asked first, know better.
            assert outcome in ("127.0.0.13", "refused") or (outcome is None and b"replicaof" not in data), (
                data
            )
            outcomes.add(outcome)
    assert {"127.0.0.13", "refused"} <= outcomes


def test_whatever_is_in_its_file_sentinel_starts_with_what_makes_sense(
    node: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "views", lambda settings: [])
    leave(tmp_path, data=True, redis_conf=REPLICA, users_acl=USERS)
    text = f"{SENTINEL}\nsentinel config-epoch hothouse 3\nsentinel leader-epoch hothouse 3\nsentinel current-epoch 3\n"
    for data in broken(text):
        (tmp_path / "sentinel.conf").write_bytes(data)
        node.compose_sentinel()
        lines = (tmp_path / "sentinel.conf").read_text().splitlines()
        assert lines[2] in {
            f"sentinel monitor hothouse {address} {lines[2].split()[4]} 2" for address in NODES.values()
        }
        for line in lines:
            assert re.fullmatch(r"[ -~]{1,200}", line), data
            if "epoch" in line:
                assert re.fullmatch(
                    r"sentinel ((config|leader)-epoch hothouse|current-epoch) [0-9]{1,18}", line
                ), data


def test_what_a_redis_left_that_was_killed_is_removed_when_it_starts(
    node: ModuleType, tmp_path: Path
) -> None:
    """It writes its new file beside the old one, with the password of its primary in it."""
    leave(tmp_path, seed="primary", users_acl=USERS)
    remains = [tmp_path / name for name in ("redis.conf.aB3xY9", ".redis.conf.new")]
    stays = [tmp_path / name for name in ("redis.conf.original", "redis.conf.dpkg-old", "dump.rdb")]
    for path in (*remains, *stays):
        path.write_text("masterauth secret\n")
    node.compose()
    assert [path for path in remains if path.exists()] == []
    assert [path for path in stays if not path.exists()] == []


@pytest.mark.parametrize("name", ["redis.conf", "seed", "sentinel.conf"])
def test_whatever_a_node_says_of_its_files_the_run_has_an_answer(name: str) -> None:
    """What roles/redis/tasks/primary.yml greps out of them."""
    for data in broken(f"{DATA}\nreplicaof 127.0.0.12 6379\n{SENTINEL}\nsentinel config-epoch hothouse 10\n"):
        text = data[:100_000].decode("utf-8", "replace")
        try:
            role = filters.redis_roles(
                NODES, said(r1=text, r2=f"{DATA}\n{SENTINEL}", r3=f"{DATA}\nreplicaof 127.0.0.12 6379")
            )
        except AnsibleFilterError:
            continue
        assert role["primary"] in NODES
