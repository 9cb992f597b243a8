"""Redis fails, is replaced or forgets: three real servers behind one address, as behind HAProxy."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import (
    SENDER,
    TEMPLATE,
    MailServer,
    Redis,
    campaign_of,
    forget_settings,
    people,
    run_until_finished,
    running_redis,
    wait_until,
)

from campaigns import cli, store
from campaigns.store import Campaign, Ledger, Unconfirmed
from campaigns.tasks import send_batch


class Proxy:
    """One address that leads to the server that is the primary at present."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.lose_answers_to: set[str] = set()  # the operations of the ledger whose next answer gets lost
        self.before: dict[
            str, Callable[[], object]
        ] = {}  # called once, before such an operation is passed on
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def lead_to(self, target: int) -> None:
        self.target = target
        for side in list(self._open):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.lead_to(0)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        lost = threading.Event()
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", self.target)) as server:
            self._open |= {client, server}
            threading.Thread(target=self._answer, args=(server, client, lost), daemon=True).start()
            while data := client.recv(2**20):
                for operation in list(self.before):
                    if f"\r\n{operation}\r\n".encode() in data:
                        self.before.pop(operation)()
                for operation in list(self.lose_answers_to):
                    if f"\r\n{operation}\r\n".encode() in data:
                        self.lose_answers_to.discard(operation)
                        lost.set()
                server.sendall(data)
            self._open -= {client, server}

    def _answer(self, server: socket.socket, client: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            while (data := server.recv(2**20)) and not lost.is_set():
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


class Cluster:
    """A primary and two replicas."""

    def __init__(self, servers: list[Redis]) -> None:
        self.primary, *self.replicas = servers
        for replica in self.replicas:
            replica.admin.replicaof("127.0.0.1", self.primary.port)
        self.proxy = Proxy(self.primary.port)
        self.wait_for_replicas()

    def wait_for_replicas(self) -> None:
        def up_to_date() -> bool:
            with self.primary.admin.pipeline(transaction=False) as pipe:
                # WAIT is about what its own connection wrote.
                replicas = pipe.incr("asked").wait(len(self.replicas), 100).execute()[1]
            return bool(replicas == len(self.replicas))

        wait_until(up_to_date)

    def detach(self) -> None:
        """From now on the primary writes what a failover will forget."""
        for replica in self.replicas:
            replica.admin.replicaof("NO", "ONE")

    def promote(self) -> None:
        """What Sentinel and HAProxy do: the replica that has most becomes the primary."""
        self.replicas.sort(key=lambda replica: -replica.admin.info("replication")["master_repl_offset"])
        self.primary, *self.replicas = self.replicas
        self.primary.admin.replicaof("NO", "ONE")
        for replica in self.replicas:
            replica.admin.replicaof("127.0.0.1", self.primary.port)
        self.proxy.lead_to(self.primary.port)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        result = Cluster([stack.enter_context(running_redis(tmp_path / f"redis{n}")) for n in range(3)])
        yield result
        result.proxy.close()


@pytest.fixture
def confirmed(
    book: Ledger, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Ledger]:
    """The ledger of a deployment with replicas."""
    url = cluster.primary.url.replace(str(cluster.primary.port), str(cluster.proxy.port))
    (tmp_path / "redis_url").write_text(url)
    monkeypatch.setenv("CAMPAIGNS_CONFIRM_REPLICAS", "1")
    forget_settings()
    yield store.ledger()
    cluster.primary.go_on()
    assert cluster.primary.admin.acl_log() == []


def everybody(count: int) -> dict[str, int]:
    return {f"user{n}@example.com": 1 for n in range(count)}


def attempts(book: Ledger, campaign: Campaign, state: str) -> set[int]:
    return {record.attempts for record in book.records(campaign.id, state)}


@pytest.mark.parametrize(("when", "seconds"), [("on_rcpt", 1), ("on_data", 5)])
def test_a_primary_killed_in_the_middle_of_a_batch_costs_no_mail_and_doubles_none(
    confirmed: Ledger, cluster: Cluster, celery: Any, mail_server: MailServer, when: str, seconds: float
) -> None:
    def kill(address: str) -> None:
        if address == "user4@example.com":
            setattr(mail_server, when, lambda address: None)
            cluster.primary.kill()
            threading.Timer(seconds, cluster.promote).start()

    setattr(mail_server, when, kill)
    campaign = campaign_of(confirmed, 10)
    assert send_batch(campaign.id, 0)["sent"] == 10
    counts = run_until_finished(celery, confirmed, campaign.id)
    assert (counts["sent"], counts["ambiguous"]) == (10, 0)
    assert mail_server.received() == everybody(10)


def test_without_a_confirmation_no_mail_leaves(
    confirmed: Ledger,
    cluster: Cluster,
    celery: Any,
    mail_server: MailServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The failover also forgets that the claim was given back.
    monkeypatch.setenv("CAMPAIGNS_CLAIM_SECONDS", "3")
    monkeypatch.setenv("CAMPAIGNS_REQUEUE_SECONDS", "1")
    campaign = campaign_of(confirmed, 10)

    def cut_off(address: str) -> None:
        if address == "user4@example.com":
            mail_server.on_rcpt = lambda address: None
            cluster.detach()

    mail_server.on_rcpt = cut_off
    result = send_batch(campaign.id, 0)
    assert (result["sent"], result["waiting"]) == (4, 1)
    assert confirmed.campaign(campaign.id).waiting_for == "Redis replicas: 0 of 1 confirmed within 1 s"
    assert mail_server.received() == everybody(4)
    assert attempts(confirmed, campaign, "pending") == {0}

    cluster.promote()
    counts = run_until_finished(celery, confirmed, campaign.id)
    assert counts["sent"] == 10
    assert mail_server.received() == everybody(10)


def test_a_claim_that_a_failover_forgot_sends_nothing(
    confirmed: Ledger, cluster: Cluster, celery: Any, mail_server: MailServer
) -> None:
    """The worker whose claim is forgotten and the one that has the new claim: one of them sends."""
    campaign = campaign_of(confirmed, 1)
    cluster.wait_for_replicas()
    cluster.detach()
    forgotten = confirmed.claim(campaign.id, 0, "first", 60)
    assert forgotten
    cluster.promote()
    cluster.wait_for_replicas()
    second = confirmed.claim(campaign.id, 0, "second", 60)
    assert second
    assert confirmed.begin_data(forgotten, 60) is False
    assert confirmed.begin_data(second, 60) is True


def test_a_repeated_call_is_confirmed_anew(confirmed: Ledger, cluster: Cluster) -> None:
    """A second call changes nothing, and yet must not count on what the first one wrote."""
    campaign = campaign_of(confirmed, 1)
    claim = confirmed.claim(campaign.id, 0, "me", 60)
    assert claim
    for replica in cluster.replicas:
        replica.pause()
    for _ in range(2):
        cluster.proxy.lead_to(cluster.primary.port)  # on a connection of its own
        with pytest.raises(Unconfirmed):
            confirmed.begin_data(claim, 60)


@pytest.mark.parametrize(
    ("name", "broken", "mended"),
    [
        ("min-replicas-to-write", "3", "0"),  # NOREPLICAS
        ("maxmemory", "1", "0"),  # OOM
    ],
)
def test_a_redis_that_takes_no_writes_for_now_is_waited_for(
    confirmed: Ledger, cluster: Cluster, name: str, broken: str, mended: str
) -> None:
    campaign = campaign_of(confirmed, 1)
    cluster.primary.admin.config_set(name, broken)
    threading.Timer(0.5, lambda: cluster.primary.admin.config_set(name, mended)).start()
    assert confirmed.take_batches(campaign.id, 60) == [0]


def test_a_primary_that_became_a_replica_is_left(confirmed: Ledger, cluster: Cluster) -> None:
    campaign = campaign_of(confirmed, 1)
    cluster.wait_for_replicas()
    old = cluster.primary
    old.admin.replicaof("127.0.0.1", cluster.replicas[0].port)  # READONLY
    threading.Timer(0.5, cluster.promote).start()
    assert confirmed.claim(campaign.id, 0, "me", 60)


def test_a_server_that_never_saw_the_script_is_taught_it(book: Ledger, redis_server: Redis) -> None:
    campaign = campaign_of(book, 1)
    redis_server.admin.script_flush()
    assert book.claim(campaign.id, 0, "me", 60)


def test_what_was_sent_can_be_written_to_a_full_redis(confirmed: Ledger, cluster: Cluster) -> None:
    campaign = campaign_of(confirmed, 2)
    claims = [confirmed.claim(campaign.id, number, "me", 60) for number in range(2)]
    cluster.primary.admin.config_set("maxmemory", 1)
    for claim, state in zip(claims, ("sent", "pending"), strict=True):
        assert claim
        assert confirmed.begin_data(claim, 60)
        assert confirmed.settle(claim, state, "250 OK")
    counts = confirmed.counts(campaign.id)
    assert (counts["sent"], counts["pending"]) == (1, 1)


def test_a_lost_answer_of_redis_changes_nothing(
    confirmed: Ledger, cluster: Cluster, celery: Any, mail_server: MailServer
) -> None:
    """Each operation runs twice, because nobody heard that the first time was enough."""
    lost = {"upload", "publish", "start", "take", "due", "claim", "begin_data", "settle", "reschedule"}
    lost |= {"expire", "open", "finish"}
    cluster.proxy.lose_answers_to = set(lost)
    campaign = campaign_of(confirmed, 12)
    counts = run_until_finished(celery, confirmed, campaign.id)
    assert cluster.proxy.lose_answers_to == set(), "each answer was lost once"
    assert confirmed.ids() == [campaign.id]
    assert counts["sent"] == 12
    assert attempts(confirmed, campaign, "sent") == {1}
    assert mail_server.received() == everybody(12)


def test_a_lost_answer_to_a_decision_changes_nothing(confirmed: Ledger, cluster: Cluster) -> None:
    campaign = campaign_of(confirmed, 2)
    for number, state in enumerate(("pending", "sent")):
        claim = confirmed.claim(campaign.id, number, "me", 60)
        assert claim
        confirmed.settle(claim, "ambiguous", "lost")
        cluster.proxy.lose_answers_to = {"resolve"}
        assert confirmed.resolve(campaign.id, [number], state, "decided") == 1
    cluster.proxy.lose_answers_to |= {"cancel"}
    confirmed.cancel(campaign.id)
    assert cluster.proxy.lose_answers_to == set()
    counts = confirmed.counts(campaign.id)
    assert (counts["sent"], counts["ambiguous"]) == (1, 1)


@pytest.mark.parametrize("all_of_it", [True, False])
def test_an_upload_that_a_failover_forgot_is_repeated(
    confirmed: Ledger, cluster: Cluster, all_of_it: bool
) -> None:
    def forget() -> None:
        for key in cluster.primary.admin.keys("app:campaigns:test-*" + ("" if all_of_it else ":pending")):
            cluster.primary.admin.delete(key)

    cluster.proxy.before["publish"] = forget
    campaign_id = confirmed.create("Test", SENDER, TEMPLATE, people(12), 10)
    assert confirmed.counts(campaign_id)["pending"] == 12
    assert confirmed.take_batches(campaign_id, 60) == []
    confirmed.start(campaign_id)
    assert confirmed.take_batches(campaign_id, 60) == [0, 1]


def test_a_late_upload_does_not_touch_a_campaign_that_began(confirmed: Ledger, cluster: Cluster) -> None:
    """A frozen server reads the first of two tries when nobody waits for it any more."""
    campaign = campaign_of(confirmed, 1)
    claim = confirmed.claim(campaign.id, 0, "me", 60)
    assert claim
    confirmed.settle(claim, "sent", "250 OK")
    token = cluster.primary.admin.hget(f"app:campaigns:{campaign.id}", "token")
    assert confirmed._call(campaign.id, "upload", token, 60, 0, 10, 0, "{}") == "published"
    counts = confirmed.counts(campaign.id)
    assert (counts["sent"], counts["pending"]) == (1, 0)
    assert cluster.primary.admin.ttl(f"app:campaigns:{campaign.id}") == -1


def test_create_says_when_it_cannot_tell_whether_the_campaign_exists(
    confirmed: Ledger, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.5)
    for replica in cluster.replicas:
        replica.pause()
    args = [
        "create",
        "--name",
        "x",
        "--sender",
        "a@example.com",
        "--template",
        "welcome",
        "--recipients",
        "-",
    ]
    result = CliRunner().invoke(cli.main, args, input="email,name\nada@example.com,Ada\n")
    assert (result.exit_code, result.stdout) == (3, "")
    [campaign_id] = confirmed.ids()
    assert "0 of 1 confirmed" in result.stderr
    assert f"may exist all the same: `campaigns show {campaign_id}` tells" in result.stderr


@pytest.mark.parametrize("command", ["cancel", "resolve"])
def test_an_order_counts_only_when_replicas_have_it(
    confirmed: Ledger, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.5)
    campaign = campaign_of(confirmed, 1)
    claim = confirmed.claim(campaign.id, 0, "me", 60)
    assert claim
    confirmed.settle(claim, "ambiguous", "lost")
    for replica in cluster.replicas:
        replica.pause()
    args = [command, campaign.id, *(["--sent"] if command == "resolve" else [])]
    result = CliRunner().invoke(cli.main, args)
    assert result.exit_code == 3
    assert "0 of 1 confirmed" in result.stderr
