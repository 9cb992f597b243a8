"""The tasks, with a real Redis as ledger and broker and a real SMTP server."""

from __future__ import annotations

import os
import signal
import smtplib
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from conftest import (
    DROP,
    HANG,
    SENDER,
    TEMPLATE,
    MailServer,
    campaign_of,
    people,
    run_queue,
    run_until_finished,
    wait_until,
)

from campaigns import messages, smtp, tasks
from campaigns.recipients import Recipient
from campaigns.store import MOST_ATTEMPTS, Ledger
from campaigns.tasks import check_scheduled_campaigns, finalize_campaign, send_batch

Queued = Callable[[], int]


def counts(book: Ledger, campaign_id: str) -> dict[str, int]:
    return {state: count for state, count in book.counts(campaign_id).items() if count}


def everybody(count: int) -> dict[str, int]:
    return {f"user{n}@example.com": 1 for n in range(count)}


def test_a_campaign_is_sent_and_finished(
    book: Ledger, celery: Any, mail_server: MailServer, caplog: pytest.LogCaptureFixture
) -> None:
    campaign_id = book.create("Test", SENDER, TEMPLATE, people(25), 10)
    with caplog.at_level("INFO"):
        check = check_scheduled_campaigns()
        assert (check["campaigns"], check["batches"]) == (1, 3)
        run_queue(celery)
        assert check_scheduled_campaigns()["finalizing"] == 1
        run_queue(celery)
    assert mail_server.received() == everybody(25)
    assert mail_server.sessions == 3, "one connection per batch"
    campaign = book.campaign(campaign_id)
    assert campaign.state == "finished"
    assert campaign.finished_at and campaign.started_at
    assert counts(book, campaign_id) == {"sent": 25}
    lines = [record.getMessage() for record in caplog.records if record.name == "campaigns.tasks"]
    assert any(
        line.startswith(f"batch campaign={campaign_id} batch=2 sent=5 retry=0 failed=0") for line in lines
    )
    assert not any("@" in line or "\n" in line for line in lines)


def test_mails_have_their_columns_and_a_message_id_of_their_own(
    book: Ledger, mail_server: MailServer
) -> None:
    campaign = campaign_of(book, 3)
    send_batch(campaign.id, 0)
    for number, (address, mail) in enumerate(mail_server.mails):
        assert mail["Subject"] == f"Hello User {number}"
        assert mail["Message-ID"] == messages.message_id(campaign.id, address, "example.com")


def test_a_scheduled_campaign_waits_for_its_time(book: Ledger, mail_server: MailServer) -> None:
    book.create("x", SENDER, TEMPLATE, people(1), 10, datetime.now(UTC) + timedelta(hours=1))
    assert check_scheduled_campaigns()["campaigns"] == 0
    soon = book.create("y", SENDER, TEMPLATE, people(1), 10, datetime.now(UTC) + timedelta(seconds=0.3))
    assert wait_until(lambda: check_scheduled_campaigns()["batches"]) == 1
    assert book.campaign(soon).state == "sending"


def test_checks_do_not_flood_the_queue(book: Ledger, queued: Queued, mail_server: MailServer) -> None:
    campaign_of(book, 30)
    for _ in range(5):
        check_scheduled_campaigns()
    assert queued() == 3


def test_a_lost_message_is_healed(
    book: Ledger,
    celery: Any,
    mail_server: MailServer,
    redis_server: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CAMPAIGNS_REQUEUE_SECONDS", "1")
    campaign = campaign_of(book, 15)
    assert check_scheduled_campaigns()["batches"] == 2
    redis_server.admin.delete("q:email_senders")
    run_until_finished(celery, book, campaign.id)
    assert mail_server.received() == everybody(15)


def test_a_redelivered_batch_sends_nothing_twice(book: Ledger, mail_server: MailServer) -> None:
    campaign = campaign_of(book, 10)
    assert send_batch(campaign.id, 0)["sent"] == 10
    assert send_batch(campaign.id, 0)["sent"] == 0
    assert mail_server.received() == everybody(10)
    assert mail_server.sessions == 1, "a batch with nothing to do does not connect"


def test_a_batch_that_runs_many_times_at_once_sends_each_mail_once(
    book: Ledger, mail_server: MailServer
) -> None:
    campaign = campaign_of(book, 40, batch_size=40)
    together = threading.Barrier(4)
    results: list[dict[str, int]] = []

    def run() -> None:
        together.wait()
        results.append(send_batch(campaign.id, 0))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mail_server.received() == everybody(40)
    assert sum(result["sent"] for result in results) == 40


def test_a_temporary_refusal_is_retried_with_growing_pauses(
    book: Ledger, celery: Any, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMPAIGNS_RETRY_SECONDS", "60")
    assert [tasks.retry_delay(attempt) for attempt in range(1, 9)] == [
        60, 120, 240, 480, 960, 1920, 3600, 3600,
    ]  # fmt: skip
    monkeypatch.setenv("CAMPAIGNS_RETRY_SECONDS", "1")
    mail_server.rcpt_replies["user1@example.com"].append("450 greylisted")
    campaign = campaign_of(book, 3)
    assert send_batch(campaign.id, 0) == send_batch_result(sent=2, retry=1)
    assert send_batch(campaign.id, 0) == send_batch_result(), "not before its time"
    [record] = book.records(campaign.id, "pending", 10)
    assert (record.attempts, record.reply) == (1, "RCPT: 450 greylisted")
    run_until_finished(celery, book, campaign.id)
    assert mail_server.received() == everybody(3)


def send_batch_result(**changes: int) -> dict[str, int]:
    return {
        "sent": 0, "retry": 0, "failed": 0, "ambiguous": 0, "skipped": 0, "waiting": 0, **changes,
    }  # fmt: skip


def test_temporary_refusals_without_end_fail(
    book: Ledger, celery: Any, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "retry_delay", lambda attempt: 0)
    mail_server.data_replies["user0@example.com"].extend(["452 full"] * 20)
    campaign = campaign_of(book, 1)
    assert run_until_finished(celery, book, campaign.id)["failed"] == 1
    [record] = book.records(campaign.id, "failed", 10)
    assert (record.attempts, record.reply) == (MOST_ATTEMPTS, "end of data: 452 full")


def test_a_permanent_refusal_is_recorded_and_the_batch_goes_on(
    book: Ledger, celery: Any, mail_server: MailServer
) -> None:
    mail_server.rcpt_replies["user0@example.com"].append("550 5.1.1 no such user")
    mail_server.data_replies["user1@example.com"].append("554 5.7.1 spam")
    campaign = campaign_of(book, 3)
    assert send_batch(campaign.id, 0) == send_batch_result(sent=1, failed=2)
    replies = [record.reply for record in book.records(campaign.id, "failed", 10)]
    assert replies == ["RCPT: 550 5.1.1 no such user", "end of data: 554 5.7.1 spam"]
    assert run_until_finished(celery, book, campaign.id)["failed"] == 2
    assert mail_server.received() == {"user2@example.com": 1}


def test_a_connection_dropped_before_data_is_opened_again(book: Ledger, mail_server: MailServer) -> None:
    mail_server.rcpt_replies["user1@example.com"].append(DROP)
    campaign = campaign_of(book, 3)
    assert send_batch(campaign.id, 0) == send_batch_result(sent=3)
    assert mail_server.received() == everybody(3)


def test_a_recipient_that_the_server_always_drops_holds_up_nobody(
    book: Ledger, celery: Any, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "retry_delay", lambda attempt: 0)
    mail_server.rcpt_replies["user0@example.com"].extend([DROP] * 50)
    campaign = campaign_of(book, 3)
    final = run_until_finished(celery, book, campaign.id)
    assert (final["sent"], final["failed"]) == (2, 1)


def test_a_connection_dropped_after_data_is_held_as_ambiguous(
    book: Ledger, celery: Any, mail_server: MailServer
) -> None:
    mail_server.data_replies["user1@example.com"].append(DROP)
    campaign = campaign_of(book, 3)
    assert send_batch(campaign.id, 0) == send_batch_result(sent=2, ambiguous=1)
    final = run_until_finished(celery, book, campaign.id)
    assert (final["sent"], final["ambiguous"]) == (2, 1)
    assert mail_server.received() == everybody(3)
    [record] = book.records(campaign.id, "ambiguous", 10)
    assert record.email == "user1@example.com"


def test_a_mail_in_doubt_is_resent_once_if_the_campaign_says_so(
    book: Ledger, celery: Any, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail_server.data_replies["user0@example.com"].append(DROP)
    mail_server.data_replies["user1@example.com"].extend([DROP, DROP])
    campaign = campaign_of(book, 3, ambiguous="resend")
    assert send_batch(campaign.id, 0) == send_batch_result(sent=1, ambiguous=2)
    assert check_scheduled_campaigns()["resent"] == 0, "not before a pause"
    monkeypatch.setenv("CAMPAIGNS_RETRY_SECONDS", "1")
    final = run_until_finished(celery, book, campaign.id)
    assert (final["sent"], final["ambiguous"]) == (2, 1)
    twice = {record.email: record.state for record in book.resent(campaign.id)}
    assert twice == {"user0@example.com": "sent", "user1@example.com": "ambiguous"}
    assert mail_server.received() == {**everybody(3), "user0@example.com": 2, "user1@example.com": 2}
    ids = {mail["Message-ID"] for address, mail in mail_server.mails if address == "user0@example.com"}
    assert len(ids) == 1, "so that receivers can tell"


def test_greylisting_after_the_mail_was_read_is_retried(
    book: Ledger, celery: Any, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMPAIGNS_RETRY_SECONDS", "1")
    for number in range(3):
        mail_server.data_replies[f"user{number}@example.com"].append("451 4.7.1 greylisted, try again")
    campaign = campaign_of(book, 3)
    assert send_batch(campaign.id, 0) == send_batch_result(retry=3)
    final = run_until_finished(celery, book, campaign.id)
    assert (final["sent"], final["ambiguous"]) == (3, 0)
    assert mail_server.received() == everybody(3)


def test_a_server_that_is_too_slow_lets_the_campaign_wait_and_costs_no_attempt(
    book: Ledger, celery: Any, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "COMMAND_SECONDS", 0.2)
    for number in range(10):
        mail_server.rcpt_replies[f"user{number}@example.com"].extend([HANG, HANG])
    campaign = campaign_of(book, 10)
    assert send_batch(campaign.id, 0) == send_batch_result(retry=1, waiting=1)
    assert "timed out" in (book.campaign(campaign.id).waiting_for or "")
    assert sorted(record.attempts for record in book.records(campaign.id, "pending")) == [0] * 9 + [1]


def test_an_unreachable_server_costs_nothing_but_time(
    book: Ledger, celery: Any, queued: Queued, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "MOST_ATTEMPTS", 2)
    mail_server.stop()
    campaign = campaign_of(book, 30)
    check_scheduled_campaigns()
    run_queue(celery)
    assert counts(book, campaign.id) == {"pending": 30}
    assert {record.attempts for record in book.records(campaign.id, "pending", 30)} == {0}
    waiting_for = book.campaign(campaign.id).waiting_for
    assert waiting_for and "refused" in waiting_for
    assert (check_scheduled_campaigns()["batches"], queued()) == (0, 0), "not before the pause is over"

    for _ in range(3):
        wait_until(lambda: check_scheduled_campaigns()["batches"])
        run_queue(celery)
    assert counts(book, campaign.id) == {"pending": 30}

    mail_server.start()
    run_until_finished(celery, book, campaign.id)
    assert mail_server.received() == everybody(30)
    assert book.campaign(campaign.id).waiting_for is None


def test_a_server_lost_in_the_middle_of_a_batch_loses_nothing(
    book: Ledger, celery: Any, mail_server: MailServer
) -> None:
    def stop(address: str) -> None:
        if address == "user5@example.com":
            mail_server.on_rcpt = lambda address: None
            # From another thread: the server cannot stop within its own handler.
            threading.Thread(target=mail_server.stop).start()
            stopping.set()

    stopping = threading.Event()
    mail_server.on_rcpt = stop
    mail_server.rcpt_replies["user5@example.com"].append(HANG)
    campaign = campaign_of(book, 10)
    assert send_batch(campaign.id, 0) == send_batch_result(sent=5, waiting=1)
    assert stopping.is_set()
    assert {record.attempts for record in book.records(campaign.id, "pending", 10)} == {0}
    mail_server.start()
    run_until_finished(celery, book, campaign.id)
    assert mail_server.received() == everybody(10)


def test_a_refused_sender_lets_the_campaign_wait(book: Ledger, celery: Any, mail_server: MailServer) -> None:
    mail_server.mail_replies.append("530 5.7.0 authentication required")
    campaign = campaign_of(book, 3)
    assert send_batch(campaign.id, 0) == send_batch_result(waiting=1)
    assert "530 5.7.0" in (book.campaign(campaign.id).waiting_for or "")
    run_until_finished(celery, book, campaign.id)
    assert mail_server.received() == everybody(3)


def test_a_cancelled_campaign_sends_no_further_mail(
    book: Ledger, celery: Any, mail_server: MailServer
) -> None:
    campaign = campaign_of(book, 20)
    check_scheduled_campaigns()
    mail_server.on_rcpt = lambda address: book.cancel(campaign.id) if address == "user3@example.com" else None
    run_queue(celery)
    assert mail_server.received() == everybody(3)
    final = run_until_finished(celery, book, campaign.id)
    assert (final["sent"], final["cancelled"]) == (3, 17)
    assert book.campaign(campaign.id).state == "cancelled"


def test_finalizing_again_changes_nothing(book: Ledger, celery: Any, mail_server: MailServer) -> None:
    campaign = campaign_of(book, 1)
    assert finalize_campaign(campaign.id)["pending"] == 1
    assert book.campaign(campaign.id).finished_at is None, "not before all is sent"
    send_batch(campaign.id, 0)
    first = (finalize_campaign(campaign.id), book.campaign(campaign.id))
    second = (finalize_campaign(campaign.id), book.campaign(campaign.id))
    assert first == second
    assert first[1].finished_at


def test_one_campaign_does_not_wait_for_another(book: Ledger, celery: Any, mail_server: MailServer) -> None:
    mail_server.mail_replies.append("550 not you")
    blocked, free = campaign_of(book, 3), campaign_of(book, 3)
    send_batch(blocked.id, 0)
    assert send_batch(free.id, 0)["sent"] == 3


def test_a_message_for_a_deleted_campaign_is_no_failure(
    book: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    assert send_batch("nope", 0) == send_batch_result()
    assert "unknown campaign=nope batch=0" in caplog.text


def recipient(email: str, **columns: str) -> Recipient:
    """One whom the checks of a list would not let through."""
    return Recipient(2, email, {"email": email, "name": "x", **columns})


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (
            recipient("jürgen@example.com"),
            r"To is not ASCII, or longer than 994 characters: 'j\xfcrgen@example.com'",
        ),
        (recipient("a@example.com\r\nBcc: eve@example.com"), "To holds a line break (U+000D)"),
        (
            recipient("x@example.com", name="x\x07"),
            "subject.txt: no mail can hold the control character U+0007",
        ),
        (recipient("x@example.com", name="\0"), "subject.txt: no mail can hold the control character U+0000"),
        (recipient("x@example.com", unsubscribe="https://ü"), "List-Unsubscribe is not ASCII"),
        (
            recipient("x@example.com", unsubscribe="https://" + "x" * 998),
            "List-Unsubscribe is not ASCII, or longer",
        ),
        (
            Recipient(2, "x@example.com", {"email": "x@example.com"}),
            "subject.txt, line 1: 'name' is undefined",
        ),
    ],
)
def test_a_recipient_whose_mail_cannot_be_made_fails_with_the_reason_and_alone(
    book: Ledger, celery: Any, mail_server: MailServer, poison: Recipient, reason: str
) -> None:
    some = people(9)
    campaign_id = book.create("Test", SENDER, TEMPLATE, [*some[:4], poison, *some[4:]], 10)
    book.start(campaign_id)
    assert send_batch(campaign_id, 0) == send_batch_result(sent=9, failed=1)
    [record] = book.records(campaign_id, "failed")
    assert (record.number, record.attempts) == (4, 1)
    assert reason in record.reply
    assert run_until_finished(celery, book, campaign_id)["failed"] == 1
    assert mail_server.received() == everybody(9)


FAILURES = [
    ValueError("bad value"),
    UnicodeEncodeError("ascii", "ü", 0, 1, "not ASCII"),
    RecursionError("too deep"),
    AssertionError(),
    KeyError("x"),
    messages.MessageError("half of a character \udcff"),
    smtp.Unsendable("no SMTPUTF8"),
    LookupError("line\nbreak " * 100),
]


@pytest.mark.parametrize("stage", ["sender", "render", "build", "send"])
def test_whatever_goes_wrong_with_one_recipient_fails_that_one_with_the_true_reason(
    book: Ledger, celery: Any, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """No failure of the ledger or the server, but of the code or what it calls, at each stage of a mail."""
    place: Any = smtp.Mailer if stage == "send" else messages
    whole, calls = getattr(place, stage), count()

    def fails(*args: Any) -> Any:
        number = next(calls)
        if number < len(FAILURES):
            raise FAILURES[number]
        return whole(*args)

    monkeypatch.setattr(place, stage, fails)
    campaign = campaign_of(book, 10)
    assert send_batch(campaign.id, 0) == send_batch_result(sent=2, failed=8)
    records = book.records(campaign.id, "failed")
    assert [record.attempts for record in records] == [1] * 8
    replies = [record.reply for record in records]
    assert replies[:3] == [
        "ValueError: bad value",
        "UnicodeEncodeError: 'ascii' codec can't encode character '\\xfc' in position 0: not ASCII",
        "RecursionError: too deep",
    ]
    assert replies[3:7] == ["AssertionError:", "KeyError: 'x'", "half of a character \\udcff", "no SMTPUTF8"]
    assert replies[7].startswith("LookupError: line break line break")
    assert len(replies[7]) <= 300
    assert run_until_finished(celery, book, campaign.id)["sent"] == 2


@pytest.mark.parametrize("end", [MemoryError("no more"), SoftTimeLimitExceeded()])
def test_what_ends_the_task_is_tried_again_and_fails_at_last_with_its_reason(
    book: Ledger, celery: Any, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch, end: Exception
) -> None:
    monkeypatch.setattr(tasks, "retry_delay", lambda attempt: 0)
    build, ended = messages.build, Counter[str]()

    def fails(campaign_id: str, origin: Any, content: Any, columns: dict[str, str]) -> bytes:
        if columns["email"] in ("user1@example.com", "user3@example.com"):
            ended[columns["email"]] += 1
            if columns["email"] == "user1@example.com" or ended[columns["email"]] < 2:
                raise end
        return build(campaign_id, origin, content, columns)

    monkeypatch.setattr(messages, "build", fails)
    campaign = campaign_of(book, 5)
    while counts(book, campaign.id).get("pending"):
        try:
            send_batch(campaign.id, 0)
        except type(end):
            continue
    assert counts(book, campaign.id) == {"sent": 4, "failed": 1}
    [record] = book.records(campaign.id, "failed")
    assert (record.attempts, record.reply) == (MOST_ATTEMPTS, messages.reason(end))
    assert mail_server.received() == Counter(f"user{n}@example.com" for n in (0, 2, 3, 4))


def test_a_task_that_ends_while_a_mail_leaves_leaves_it_in_doubt(
    book: Ledger, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = smtplib.SMTP.send

    def send_and_end(self: smtplib.SMTP, data: str | bytes) -> None:
        write(self, data)
        if isinstance(data, bytes):
            raise SoftTimeLimitExceeded

    monkeypatch.setattr(smtplib.SMTP, "send", send_and_end)
    campaign = campaign_of(book, 2)
    with pytest.raises(SoftTimeLimitExceeded):
        send_batch(campaign.id, 0)
    [record] = book.records(campaign.id, "ambiguous")
    assert record.reply.startswith("after the mail was sent: SoftTimeLimitExceeded")
    assert counts(book, campaign.id) == {"ambiguous": 1, "pending": 1}


@pytest.fixture
def stopping_worker() -> Iterator[None]:
    tasks._stop()
    yield
    tasks._stopping.clear()


def test_a_worker_that_stops_leaves_the_rest_of_its_batch_for_the_next(
    book: Ledger, mail_server: MailServer, stopping_worker: None
) -> None:
    campaign = campaign_of(book, 5)
    book.take_batches(campaign.id, 60)
    assert send_batch(campaign.id, 0)["sent"] == 0
    assert book.take_batches(campaign.id, 60) == [0]


def kill_a_sender(campaign_id: str, mail_server: MailServer) -> None:
    """Run the first batch in a process of its own and kill that when the server hangs."""
    code = f"from campaigns.tasks import send_batch; send_batch({campaign_id!r}, 0)"
    with subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ)) as sender:
        assert mail_server.hanging.wait(30)
        sender.send_signal(signal.SIGKILL)


def test_a_worker_killed_before_data_loses_and_doubles_nothing(
    book: Ledger, celery: Any, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMPAIGNS_CLAIM_SECONDS", "1")
    mail_server.rcpt_replies["user2@example.com"].append(HANG)
    campaign = campaign_of(book, 5)
    kill_a_sender(campaign.id, mail_server)
    assert counts(book, campaign.id) == {"sent": 2, "sending": 1, "pending": 2}
    assert run_until_finished(celery, book, campaign.id)["sent"] == 5
    assert mail_server.received() == everybody(5)


def test_a_worker_killed_after_data_doubles_nothing(
    book: Ledger, celery: Any, mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMPAIGNS_REPLY_SECONDS", "1")
    mail_server.data_replies["user2@example.com"].append(HANG)
    campaign = campaign_of(book, 5)
    kill_a_sender(campaign.id, mail_server)
    assert counts(book, campaign.id) == {"sent": 2, "data": 1, "pending": 2}
    final = run_until_finished(celery, book, campaign.id)
    assert (final["sent"], final["ambiguous"]) == (4, 1)
    assert mail_server.received() == everybody(5)
