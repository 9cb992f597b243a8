"""A real redis-server for the session, with the app's ACL, and a real, scripted SMTP server for each test."""

from __future__ import annotations

import asyncio
import email
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import redis
from aiosmtpd.controller import Controller

from campaigns import recipients, settings, store
from campaigns.messages import Template
from campaigns.store import Campaign, Ledger
from campaigns.tasks import check_scheduled_campaigns

HERE = Path(__file__).parent
TEMPLATE = Template("Hello {{ name }}", "Dear {{ name }},\nbye\n", "<p>Dear {{ name }}</p>\n")
SENDER = "News <news@example.com>"

DROP = object()  # close the connection instead of a reply
HANG = object()  # never reply


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Return the first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Redis:
    """The server: `admin` may do everything, `url` is the app's."""

    admin: Any
    url: str
    admin_url: str

    process: subprocess.Popen[bytes]
    port: int

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


PASSWORDS = {"admin": secrets.token_hex(8), "app": secrets.token_hex(8)}


@contextmanager
def running_redis(folder: Path, *lines: str) -> Iterator[Redis]:
    """A Redis with these lines of configuration; all of them have the same passwords."""
    port = free_port()
    rules = (HERE / "redis.acl").read_text().strip()
    configuration = folder / "redis.conf"
    folder.mkdir(exist_ok=True)
    configuration.write_text(
        f'port {port}\nbind 127.0.0.1\ndir {folder}\nsave ""\nuser default off\n'
        f"user admin on >{PASSWORDS['admin']} ~* &* +@all\nuser app {rules} >{PASSWORDS['app']}\n"
        f"masteruser admin\nmasterauth {PASSWORDS['admin']}\nrepl-diskless-sync-delay 0\n" + "\n".join(lines)
    )
    with subprocess.Popen(["redis-server", configuration], stdout=(folder / "log").open("w")) as server:
        urls = {user: f"redis://{user}:{word}@127.0.0.1:{port}/0" for user, word in PASSWORDS.items()}
        admin = redis.Redis.from_url(urls["admin"], decode_responses=True)
        try:
            wait_until(lambda: "ready to accept" in (folder / "log").read_text().lower())
            yield Redis(admin, urls["app"], urls["admin"], server, port)
        finally:
            server.send_signal(signal.SIGCONT)
            server.terminate()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def celery(redis_server: Redis) -> Any:
    """The app as a deployment configures it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_BROKER_URL", redis_server.admin_url)
        from deployment import app

        yield app


@pytest.fixture
def book(
    redis_server: Redis, celery: Any, mail_server: MailServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Ledger]:
    """An empty ledger, and the settings of a deployment. Fails if the ACL refused the app anything."""
    admin = redis_server.admin
    keys = [*admin.keys("app:*"), "q:email_senders", "q:default"]
    admin.delete(*keys)
    (tmp_path / "redis_url").write_text(redis_server.url + "\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("CAMPAIGNS_SMTP_URL", f"smtp://127.0.0.1:{mail_server.port}")
    monkeypatch.setenv("CAMPAIGNS_BATCH_SIZE", "10")
    monkeypatch.setenv("CAMPAIGNS_CHECK_SECONDS", "1")
    forget_settings()
    yield store.ledger()
    forget_settings()
    assert admin.acl_log() == []


def forget_settings() -> None:
    for cached in (settings.redis_url, settings.smtp, store.ledger):
        cached.cache_clear()


@pytest.fixture
def queued(redis_server: Redis, book: Ledger) -> Callable[[], int]:
    """The number of messages that wait for a sender."""
    return lambda: redis_server.admin.llen("q:email_senders")


def people(count: int) -> list[recipients.Recipient]:
    lines = "".join(f"user{n}@example.com,User {n}\n" for n in range(count))
    return recipients.parse(f"email,name\n{lines}".encode())


def campaign_of(book: Ledger, count: int, **changes: Any) -> Campaign:
    """A campaign that has started, in batches of 10."""
    values = {"name": "Test", "sender": SENDER, "template": TEMPLATE, "batch_size": 10, **changes}
    campaign_id = book.create(recipients=people(count), **values)
    book.start(campaign_id)
    return book.campaign(campaign_id)


def run_queue(celery: Any) -> int:
    """Run what is queued in this process, as a worker would, and return how many tasks that were."""
    count = 0
    with celery.connection_for_read() as connection:
        for name in ("email_senders", "default"):
            queue = connection.SimpleQueue(name)
            while True:
                try:
                    message = queue.get(block=False)
                except Empty:
                    break
                arguments = message.payload[0]
                celery.tasks[message.headers["task"]](*arguments)
                message.ack()
                count += 1
            queue.close()
    return count


def run_until_finished(celery: Any, book: Ledger, campaign_id: str) -> dict[str, int]:
    """Check and run until the campaign is finished; return its counts."""

    def step() -> bool:
        check_scheduled_campaigns()
        run_queue(celery)
        return book.campaign(campaign_id).finished_at is not None

    wait_until(step)
    return book.counts(campaign_id)


@dataclass
class MailServer:
    """An SMTP server whose replies can be set per recipient, each used once; the rest is accepted."""

    port: int = field(default_factory=free_port)
    options: dict[str, Any] = field(default_factory=dict)
    mails: list[tuple[str, Message]] = field(default_factory=list)
    sessions: int = 0
    mail_replies: deque[Any] = field(default_factory=deque)
    rcpt_replies: dict[str, deque[Any]] = field(default_factory=lambda: defaultdict(deque))
    data_replies: dict[str, deque[Any]] = field(default_factory=lambda: defaultdict(deque))
    on_rcpt: Callable[[str], None] = lambda address: None
    on_data: Callable[[str], None] = lambda address: None
    hanging: threading.Event = field(default_factory=threading.Event)
    _controller: Controller | None = None

    def start(self) -> None:
        self._controller = Controller(self, hostname="127.0.0.1", port=self.port, **self.options)
        self._controller.start()

    def stop(self) -> None:
        if self._controller:
            self._controller.stop()
            self._controller = None

    def received(self) -> Counter[str]:
        return Counter(address for address, _ in self.mails)

    async def _answer(self, server: Any, reply: Any) -> str:
        if reply is DROP:
            server.transport.abort()
            return "421 gone"
        if reply is HANG:
            self.hanging.set()
            await asyncio.sleep(3600)
        return str(reply)

    async def handle_EHLO(
        self, server: Any, session: Any, envelope: Any, hostname: str, responses: list[str]
    ) -> list[str]:
        self.sessions += 1
        session.host_name = hostname
        return responses

    async def handle_MAIL(
        self, server: Any, session: Any, envelope: Any, address: str, options: list[str]
    ) -> str:
        reply = self.mail_replies.popleft() if self.mail_replies else "250 OK"
        if reply == "250 OK":
            envelope.mail_from = address
        return await self._answer(server, reply)

    async def handle_RCPT(
        self, server: Any, session: Any, envelope: Any, address: str, options: list[str]
    ) -> str:
        self.on_rcpt(address)
        replies = self.rcpt_replies[address]
        reply = replies.popleft() if replies else "250 OK"
        if reply == "250 OK":
            envelope.rcpt_tos.append(address)
        return await self._answer(server, reply)

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        [address] = envelope.rcpt_tos
        self.on_data(address)
        replies = self.data_replies[address]
        reply = replies.popleft() if replies else "250 OK queued"
        if reply in (DROP, HANG) or str(reply).startswith("250"):
            self.mails.append((address, email.message_from_bytes(envelope.content)))
        return await self._answer(server, reply)


@pytest.fixture
def mail_server() -> Iterator[MailServer]:
    server = MailServer()
    server.start()
    yield server
    server.stop()
