"""The states of a recipient, against a real Redis with the app's own ACL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import SENDER, TEMPLATE, Redis, campaign_of, people, wait_until

from campaigns import store
from campaigns.store import Claim, Ledger, UnknownCampaign


def counts(book: Ledger, campaign_id: str) -> dict[str, int]:
    return {state: count for state, count in book.counts(campaign_id).items() if count}


def claim(book: Ledger, campaign_id: str, number: int = 0, owner: str = "me", seconds: float = 60) -> Claim:
    result = book.claim(campaign_id, number, owner, seconds)
    assert result
    return result


def expire(book: Ledger, campaign_id: str, resend_seconds: float = 60) -> tuple[int, int, int]:
    expired: tuple[int, int, int] = wait_until(
        lambda: result if any(result := book.expire_claims(campaign_id, resend_seconds)) else None
    )
    return expired


def in_doubt(redis_server: Redis) -> list[str]:
    """What the monitoring counts."""
    return list(redis_server.admin.zrange("app:campaigns:ambiguous", 0, -1))


def test_a_campaign_is_read_as_it_was_written(book: Ledger) -> None:
    at = datetime(2100, 1, 1, tzinfo=UTC)
    campaign_id = book.create("Spring News!", SENDER, TEMPLATE, people(25), 10, at)
    campaign = book.campaign(campaign_id)
    assert campaign_id.startswith("spring-news-")
    assert (campaign.name, campaign.template, campaign.send_at) == ("Spring News!", TEMPLATE, at)
    assert (campaign.state, campaign.size, campaign.batch(2)) == ("scheduled", 25, range(20, 25))
    assert counts(book, campaign_id) == {"pending": 25}
    assert book.ids() == [campaign_id]
    assert book.due_ids() == []


def test_an_unfinished_upload_is_seen_by_nobody_and_goes_away(
    book: Ledger, redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK", 1)

    class Broken(Exception): ...

    class Interrupted(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if index == 2:
                raise Broken
            return super().__getitem__(index)

    with pytest.raises(Broken):
        book.create("x", SENDER, TEMPLATE, Interrupted(people(3)), 10)
    assert book.ids() == book.due_ids() == []
    left = redis_server.admin.keys("app:*")
    assert len(left) == 4
    assert all(0 < redis_server.admin.ttl(key) <= store.UPLOAD_SECONDS for key in left)


def test_nothing_of_a_campaign_expires(book: Ledger, redis_server: Redis) -> None:
    campaign_of(book, 3)
    assert {redis_server.admin.ttl(key) for key in redis_server.admin.keys("app:*")} == {-1}


def test_a_scheduled_campaign_hands_out_nothing_before_its_time(book: Ledger) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    campaign_id = book.create("x", SENDER, TEMPLATE, people(1), 10, at)
    assert book.take_batches(campaign_id, 60) == []
    assert book.due(book.campaign(campaign_id), 0) == {}
    assert book.claim(campaign_id, 0, "me", 60) is None
    assert book.finish(campaign_id) is False


def test_of_many_claimants_exactly_one_gets_each_recipient(book: Ledger) -> None:
    campaign = campaign_of(book, 50)
    won: list[Claim] = []

    def run(owner: str) -> None:
        won.extend(c for number in range(50) if (c := book.claim(campaign.id, number, owner, 60)))

    threads = [threading.Thread(target=run, args=(f"owner{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(c.number for c in won) == list(range(50))
    assert counts(book, campaign.id) == {"sending": 50}


def test_a_batch_is_handed_out_once_per_lease(book: Ledger) -> None:
    campaign = campaign_of(book, 25)
    assert book.take_batches(campaign.id, 60) == [0, 1, 2]
    assert book.take_batches(campaign.id, 60) == []


def test_a_batch_that_nobody_finished_is_handed_out_again(book: Ledger) -> None:
    campaign = campaign_of(book, 5)
    assert book.take_batches(campaign.id, 0) == [0]
    assert wait_until(lambda: book.take_batches(campaign.id, 60)) == [0]


def test_a_finished_batch_is_handed_out_never_again(book: Ledger) -> None:
    campaign = campaign_of(book, 2)
    book.take_batches(campaign.id, 0)
    for number in range(2):
        book.settle(claim(book, campaign.id, number), "sent", "250")
    book.reschedule(campaign, 0)
    assert book.take_batches(campaign.id, 0) == []


def test_a_batch_is_due_again_with_its_first_retry(book: Ledger) -> None:
    campaign = campaign_of(book, 2)
    book.take_batches(campaign.id, 60)
    book.settle(claim(book, campaign.id, 0), "pending", "451", delay=0.1)
    book.settle(claim(book, campaign.id, 1), "pending", "451", delay=60)
    book.reschedule(campaign, 0)
    assert book.take_batches(campaign.id, 60) == []
    assert wait_until(lambda: book.take_batches(campaign.id, 60)) == [0]


def test_a_retry_survives_a_worker_lost_before_it_rescheduled(book: Ledger) -> None:
    campaign = campaign_of(book, 1)
    book.take_batches(campaign.id, 60)
    held = claim(book, campaign.id)
    book.reschedule(campaign, 0)  # by another run, which finds nothing pending
    book.settle(held, "pending", "451", delay=0)
    assert book.take_batches(campaign.id, 60) == [0]


def test_a_waiting_campaign_hands_out_nothing_until_the_time_is_over(book: Ledger) -> None:
    campaign = campaign_of(book, 1)
    book.wait(campaign.id, 0.2, "no server")
    assert book.take_batches(campaign.id, 60) == []
    assert book.due(campaign, 0) == {}
    assert book.campaign(campaign.id).waiting_for == "no server"
    assert wait_until(lambda: book.take_batches(campaign.id, 60)) == [0]
    book.stop_waiting(campaign.id)
    assert book.campaign(campaign.id).waiting_for is None


def test_a_claim_that_expires_before_data_is_given_back(book: Ledger) -> None:
    campaign = campaign_of(book, 1)
    lost = claim(book, campaign.id, seconds=0)
    assert expire(book, campaign.id) == (1, 0, 0)
    assert counts(book, campaign.id) == {"pending": 1}
    assert book.begin_data(lost, 60) is False, "whoever lost a claim may not send"
    assert book.settle(lost, "pending", "451", delay=60) is False
    again = claim(book, campaign.id, owner="other")
    assert again.attempt == 2
    assert book.begin_data(lost, 60) is False
    assert book.settle(lost, "sent", "250") is False
    assert counts(book, campaign.id) == {"sending": 1}


def test_a_claim_that_expires_after_data_is_ambiguous_and_held(book: Ledger) -> None:
    campaign = campaign_of(book, 1)
    lost = claim(book, campaign.id)
    assert book.begin_data(lost, 0)
    assert expire(book, campaign.id) == (0, 1, 0)
    assert book.claim(campaign.id, 0, "other", 60) is None
    assert book.take_batches(campaign.id, 60) == [0]
    assert book.due(campaign, 0) == {}
    [record] = book.records(campaign.id, "ambiguous", 10)
    assert (record.email, record.reply) == ("user0@example.com", "the worker was lost after DATA")


@pytest.mark.parametrize(("state", "reply"), [("sent", "250"), ("failed", "554")])
def test_a_late_answer_ends_the_doubt(book: Ledger, state: str, reply: str) -> None:
    campaign = campaign_of(book, 1)
    slow = claim(book, campaign.id)
    book.begin_data(slow, 0)
    expire(book, campaign.id)
    assert book.settle(slow, state, reply)
    assert counts(book, campaign.id) == {state: 1}


def test_a_recipient_that_kills_every_worker_fails_in_the_end(
    book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_ATTEMPTS", 2)
    campaign = campaign_of(book, 1)
    for _ in range(2):
        claim(book, campaign.id, seconds=0)
        expire(book, campaign.id)
    [record] = book.records(campaign.id, "failed", 10)
    assert record.reply == "the worker or Redis was lost in each of 2 attempts"


def test_a_repeated_call_changes_nothing_and_answers_the_same(book: Ledger) -> None:
    campaign = campaign_of(book, 2)
    first, again = claim(book, campaign.id), claim(book, campaign.id)
    assert first == again
    assert book.begin_data(first, 60) and book.begin_data(first, 60)
    for _ in range(2):
        assert book.settle(first, "pending", "451", delay=0, refund=True)
    assert claim(book, campaign.id, owner="next").attempt == 1
    second = claim(book, campaign.id, 1)
    for _ in range(2):
        assert book.settle(second, "sent", "250")
    assert book.claim(campaign.id, 1, "me", 60) is None
    assert counts(book, campaign.id) == {"sending": 1, "sent": 1}


def test_a_recipient_cannot_be_claimed_before_its_next_attempt_is_due(book: Ledger) -> None:
    campaign = campaign_of(book, 1)
    book.settle(claim(book, campaign.id), "pending", "451", delay=60)
    assert book.due(campaign, 0) == {}
    assert book.claim(campaign.id, 0, "other", 60) is None


@pytest.mark.parametrize("state", ["sent", "failed", "ambiguous"])
def test_a_settled_recipient_cannot_be_claimed(book: Ledger, state: str) -> None:
    campaign = campaign_of(book, 1)
    book.settle(claim(book, campaign.id), state, "x")
    assert book.claim(campaign.id, 0, "other", 60) is None


def test_cancel_stops_all_that_is_not_on_its_way(book: Ledger) -> None:
    campaign = campaign_of(book, 5)
    sent, leaving, claimed, returned = (claim(book, campaign.id, number) for number in range(4))
    book.settle(sent, "sent", "250")
    book.begin_data(leaving, 60)
    assert book.cancel(campaign.id) == "sending"
    assert book.cancel(campaign.id) == "cancelled"
    assert book.begin_data(claimed, 60) is False
    book.settle(returned, "pending", "451")
    assert book.claim(campaign.id, 4, "me", 60) is None
    assert book.take_batches(campaign.id, 60) == []
    assert book.finish(campaign.id) is False, "one mail is still on its way"
    book.settle(leaving, "sent", "250")
    assert counts(book, campaign.id) == {"sent": 2, "cancelled": 3}
    assert book.finish(campaign.id) is True
    closed = book.campaign(campaign.id)
    assert closed.state == "cancelled" and closed.finished_at
    assert book.finish(campaign.id) is False
    assert book.campaign(campaign.id) == closed


def test_a_campaign_cancelled_before_its_time_is_closed_at_once(book: Ledger) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    campaign_id = book.create("x", SENDER, TEMPLATE, people(1), 10, at)
    assert book.cancel(campaign_id) == "scheduled"
    assert book.due_ids() == [campaign_id]
    book.start(campaign_id)
    assert book.finish(campaign_id)
    assert book.campaign(campaign_id).state == "cancelled"


def test_a_finished_campaign_is_finished_once(book: Ledger, redis_server: Redis) -> None:
    campaign = campaign_of(book, 1)
    book.settle(claim(book, campaign.id), "sent", "250")
    assert book.finish(campaign.id) is True
    row = redis_server.admin.hgetall(f"app:campaigns:{campaign.id}")
    assert book.finish(campaign.id) is False
    assert book.cancel(campaign.id) == "finished"
    book.wait(campaign.id, 60, "too late")
    assert redis_server.admin.hgetall(f"app:campaigns:{campaign.id}") == row
    assert book.due_ids() == []


@pytest.mark.parametrize("state", ["sent", "failed", "pending"])
def test_a_finished_campaign_takes_a_late_answer(book: Ledger, redis_server: Redis, state: str) -> None:
    campaign = campaign_of(book, 2)
    slow, other = claim(book, campaign.id, 0), claim(book, campaign.id, 1)
    book.begin_data(slow, 0)
    book.settle(other, "sent", "250")
    assert book.finish(campaign.id) is False, "not while a mail is on its way"
    expire(book, campaign.id)
    assert book.finish(campaign.id) is True
    assert in_doubt(redis_server) == [f"{campaign.id}/0"]
    assert book.settle(slow, state, "late")
    assert in_doubt(redis_server) == []
    assert book.campaign(campaign.id).state == ("sending" if state == "pending" else "finished")
    assert book.due_ids() == ([campaign.id] if state == "pending" else [])
    assert book.take_batches(campaign.id, 60) == ([0] if state == "pending" else [])


def doubt(book: Ledger, count: int = 1, policy: str = "hold") -> str:
    """A campaign with nothing but ambiguous recipients."""
    campaign = campaign_of(book, count, ambiguous=policy)
    for number in range(count):
        book.begin_data(claim(book, campaign.id, number), 0)
    while book.counts(campaign.id)["ambiguous"] < count:
        expire(book, campaign.id)
    return campaign.id


def test_held_recipients_stay_ambiguous_until_somebody_decides(book: Ledger, redis_server: Redis) -> None:
    campaign_id = doubt(book, 3)
    assert book.expire_claims(campaign_id, 0) == (0, 0, 0)
    assert book.open(campaign_id) is False
    assert book.finish(campaign_id)
    assert in_doubt(redis_server) == [f"{campaign_id}/{number}" for number in range(3)]
    for _ in range(2):
        assert book.resolve(campaign_id, [0], "sent", "decided") == 1
    assert book.campaign(campaign_id).state == "finished"
    assert counts(book, campaign_id) == {"sent": 1, "ambiguous": 2}
    for _ in range(2):
        assert book.resolve(campaign_id, [1], "pending", "decided") == 1
    assert counts(book, campaign_id) == {"sent": 1, "ambiguous": 1, "pending": 1}
    assert in_doubt(redis_server) == [f"{campaign_id}/2"]
    assert book.due_ids() == [campaign_id], "a finished campaign goes on"
    assert book.take_batches(campaign_id, 60) == [0]
    book.settle(claim(book, campaign_id, 1), "sent", "250")
    assert book.finish(campaign_id)
    assert [(record.number, record.state) for record in book.resent(campaign_id)] == [(1, "sent")]


def test_a_campaign_from_before_there_was_a_policy_holds(book: Ledger, redis_server: Redis) -> None:
    campaign_id = doubt(book)
    redis_server.admin.hdel(f"app:campaigns:{campaign_id}", "ambiguous", "token")
    assert book.campaign(campaign_id).ambiguous == "hold"
    assert book.expire_claims(campaign_id, 0) == (0, 0, 0)


def test_the_policy_resends_once_after_a_pause_and_then_holds(book: Ledger, redis_server: Redis) -> None:
    campaign_id = doubt(book, policy="resend")
    assert book.expire_claims(campaign_id, 60) == (0, 0, 0), "a slow worker may still learn the answer"
    assert book.open(campaign_id) is True
    assert book.finish(campaign_id) is False
    assert expire(book, campaign_id, 0) == (0, 0, 1)
    assert in_doubt(redis_server) == []
    assert book.resent_count(campaign_id) == 1
    again = claim(book, campaign_id, owner="other")
    assert again.attempt == 2
    book.begin_data(again, 0)
    assert expire(book, campaign_id, 0) == (0, 1, 0)
    assert book.expire_claims(campaign_id, 0) == (0, 0, 0), "nobody gets a third mail"
    assert in_doubt(redis_server) == [f"{campaign_id}/0"]
    assert book.finish(campaign_id)


def test_those_that_were_resent_do_not_keep_the_others_from_it(
    book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LIMIT", 1)
    campaign = campaign_of(book, 2, ambiguous="resend")
    for number in range(2):
        book.settle(claim(book, campaign.id, number), "ambiguous", "lost")
        assert expire(book, campaign.id, 0) == (0, 0, 1)
        book.settle(claim(book, campaign.id, number, "other"), "ambiguous", "lost again")


def test_a_late_answer_comes_before_the_policy(book: Ledger) -> None:
    campaign = campaign_of(book, 1, ambiguous="resend")
    slow = claim(book, campaign.id)
    book.begin_data(slow, 0)
    expire(book, campaign.id)
    assert book.settle(slow, "sent", "250")
    assert book.expire_claims(campaign.id, 0) == (0, 0, 0)
    assert book.resent_count(campaign.id) == 0


def test_after_a_resend_the_first_worker_has_no_say(book: Ledger) -> None:
    campaign = campaign_of(book, 1, ambiguous="resend")
    slow = claim(book, campaign.id)
    book.begin_data(slow, 0)
    expire(book, campaign.id)
    expire(book, campaign.id, 0)
    assert book.settle(slow, "failed", "554") is False
    assert counts(book, campaign.id) == {"pending": 1}


@pytest.mark.parametrize("reached", ["pending", "sending", "data"])
def test_what_a_cancelled_campaign_was_to_resend_is_in_doubt_as_before(
    book: Ledger, redis_server: Redis, reached: str
) -> None:
    campaign_id = doubt(book, policy="resend")
    expire(book, campaign_id, 0)
    again = claim(book, campaign_id) if reached != "pending" else None
    if again and reached == "data":
        assert book.begin_data(again, 60) is True
    book.cancel(campaign_id)
    if again and reached == "sending":
        assert book.begin_data(again, 60) is False
    if again and reached == "data":
        assert book.settle(again, "pending", "451 later")
    assert counts(book, campaign_id) == {"ambiguous": 1}
    assert in_doubt(redis_server) == [f"{campaign_id}/0"]
    assert book.resolve(campaign_id, [0], "pending", "decided") is None
    assert book.resolve(campaign_id, [0], "sent", "decided") == 1
    assert in_doubt(redis_server) == []


@pytest.mark.parametrize("ask", [Ledger.campaign, Ledger.cancel])
def test_an_unknown_campaign_is_an_error(book: Ledger, ask: Callable[[Ledger, str], Any]) -> None:
    with pytest.raises(UnknownCampaign, match="nope"):
        ask(book, "nope")


def test_ten_thousand_recipients_fit_and_a_batch_reads_only_its_own(
    book: Ledger, redis_server: Redis
) -> None:
    started = time.monotonic()
    campaign = campaign_of(book, 10_000, batch_size=100)
    assert len(book.take_batches(campaign.id, 60)) == 100
    assert list(book.due(campaign, 42)) == list(range(4200, 4300))
    assert len(book.records(campaign.id, "pending", 20)) == 20
    assert time.monotonic() - started < 2
    used = sum(redis_server.admin.memory_usage(key) for key in redis_server.admin.keys("app:*"))
    assert used < 5 * 2**20


def test_the_queue_id_is_kept_and_an_advertisement_is_not(book: Ledger) -> None:
    campaign = campaign_of(book, 1)
    book.settle(claim(book, campaign.id), "sent", "250 2.0.0 Ok: queued as 4F1C9A2E " + "buy! " * 50)
    [record] = book.records(campaign.id, "sent")
    assert record.reply.startswith("250 2.0.0 Ok: queued as 4F1C9A2E")
    assert len(record.reply) == store.REPLY_LENGTH
