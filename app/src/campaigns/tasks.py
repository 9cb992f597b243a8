"""The tasks. Each may be lost, repeated or run twice at a time: the ledger decides what is done."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import redis
from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import worker_shutting_down
from celery.utils.log import get_task_logger

from campaigns import messages, settings
from campaigns.celery import app
from campaigns.messages import MessageError
from campaigns.smtp import Dropped, InDoubt, Mailer, Refused, Unreachable, Unsendable
from campaigns.store import MOST_ATTEMPTS, Campaign, Claim, Ledger, Unconfirmed, UnknownCampaign, ledger

LONGEST_RETRY_SECONDS = 3600
# The lease of a mail on its way, as a multiple of the longest wait for its reply.
DATA_LEASE = 1.5
# What ends a task, whichever mail it is at.
ENDS_THE_TASK = (MemoryError, SoftTimeLimitExceeded)

log = get_task_logger(__name__)
_stopping = threading.Event()


@worker_shutting_down.connect
def _stop(**_: Any) -> None:
    """A pool of threads finishes the mails on their way, not their batches: those go on after the restart."""
    _stopping.set()


@app.task
def check_scheduled_campaigns() -> dict[str, int]:
    """Start what is due, recover what a lost worker or message left behind, enqueue what can be done now."""
    book = ledger()
    total: Counter[str] = Counter(campaigns=0, batches=0, returned=0, ambiguous=0, resent=0, finalizing=0)
    for campaign_id in book.due_ids():
        book.start(campaign_id)
        returned, ambiguous, resent = book.expire_claims(campaign_id, settings.retry_seconds())
        batches = book.take_batches(campaign_id, settings.requeue_seconds())
        for batch in batches:
            send_batch.delay(campaign_id, batch)
        finalizing = not book.open(campaign_id)
        if finalizing:
            finalize_campaign.delay(campaign_id)
        found = Counter(
            campaigns=1,
            batches=len(batches),
            returned=returned,
            ambiguous=ambiguous,
            resent=resent,
            finalizing=int(finalizing),
        )
        total.update(found)
        _log("check", campaign_id, {**found, **book.counts(campaign_id)})
    return dict(total)


@app.task
def send_batch(campaign_id: str, batch_no: int) -> dict[str, int]:
    """Send what is due of a batch, over one connection. Returns the number of recipients by outcome."""
    started = time.monotonic()
    book = ledger()
    counts: Counter[str] = Counter(sent=0, retry=0, failed=0, ambiguous=0, skipped=0, waiting=0)
    try:
        campaign = book.campaign(campaign_id)
    except UnknownCampaign:
        # Deleted, while its batches were still in the queue.
        _log("unknown", campaign_id, {"batch": batch_no}, level=logging.WARNING)
        return dict(counts)
    owner = uuid.uuid4().hex
    lease = settings.reply_seconds() * DATA_LEASE
    with Mailer(settings.smtp()) as mailer:
        try:
            for number, columns in book.due(campaign, batch_no).items():
                if _stopping.is_set():
                    break
                mailer.connect()
                claim = book.claim(campaign_id, number, owner, settings.claim_seconds())
                if not claim:
                    counts["skipped"] += 1
                else:
                    counts[_deliver(book, mailer, campaign, claim, columns, lease)] += 1
        except (Unreachable, Unconfirmed) as error:
            counts["waiting"] += 1
            # Less than the time to the next check, so that this one tries again.
            book.wait(campaign_id, settings.check_seconds() / 2, str(error))
            _log("waiting", campaign_id, {"reason": str(error)}, level=logging.WARNING)
    if campaign.waiting_for and not counts["waiting"] and counts["sent"] + counts["retry"] + counts["failed"]:
        book.stop_waiting(campaign_id)
    book.reschedule(campaign, batch_no)
    seconds = round(time.monotonic() - started, 3)
    _log("batch", campaign_id, {"batch": batch_no, **counts, "seconds": seconds})
    return dict(counts)


@app.task
def finalize_campaign(campaign_id: str) -> dict[str, int]:
    """Write the finishing time of a campaign that is done; a second run changes nothing."""
    book = ledger()
    first = book.finish(campaign_id)
    counts = book.counts(campaign_id)
    _log("finalize", campaign_id, {"finished": int(first), **counts})
    return counts


def _deliver(
    book: Ledger, mailer: Mailer, campaign: Campaign, claim: Claim, columns: dict[str, str], lease: float
) -> str:
    """Send one claimed recipient's mail, write the outcome and return its name.

    A mail that cannot be made or handed over fails its recipient, and nobody else. Raises Unreachable or
    Unconfirmed if the batch is to wait, redis.RedisError and what ENDS_THE_TASK.
    """
    settle = partial(book.settle, claim)
    begin_data = partial(book.begin_data, claim, lease)
    try:
        origin = messages.sender(campaign.sender)
        content = messages.render(campaign.template, columns)
        mail = messages.build(campaign.id, origin, content, columns)
        reply = mailer.send(origin.addr_spec, columns["email"], mail, begin_data)
    except (Unreachable, Unconfirmed) as error:
        # Not the recipient's fault: the attempt does not count.
        settle("pending", str(error), refund=True)
        raise
    except InDoubt as error:
        settle("ambiguous", str(error))
        if isinstance(error.__cause__, ENDS_THE_TASK):
            raise error.__cause__ from error
        return "ambiguous"
    except (Refused, Dropped) as error:
        if claim.attempt < MOST_ATTEMPTS and (isinstance(error, Dropped) or error.temporary):
            settle("pending", str(error), delay=retry_delay(claim.attempt))
            return "retry"
        settle("failed", str(error))
        return "failed"
    except redis.RedisError:
        raise
    except ENDS_THE_TASK as error:
        if claim.attempt < MOST_ATTEMPTS:
            settle("pending", messages.reason(error), delay=retry_delay(claim.attempt))
        else:
            settle("failed", messages.reason(error))
        raise
    except (MessageError, Unsendable) as error:
        settle("failed", str(error))
        return "failed"
    except Exception as error:
        # Nobody foresaw it, but its next attempt would end as this one, and the others' mails wait.
        settle("failed", messages.reason(error))
        values = {"recipient": claim.number, "error": type(error).__name__}
        _log("unforeseen", campaign.id, values, level=logging.ERROR)
        return "failed"
    if reply is None:
        return "skipped"
    try:
        known = settle("sent", reply, patience=lease)
    except Unconfirmed:
        known = False
    if not known:
        # Sent, but the ledger has given it up, or may forget it and then lists it as ambiguous.
        _log("late", campaign.id, {"recipient": claim.number}, level=logging.WARNING)
    return "sent"


def _log(event: str, campaign_id: str, values: Mapping[str, object], level: int = logging.INFO) -> None:
    """A line of a task, as a word and pairs: counts, and no address."""
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    log.log(level, "%s campaign=%s %s", event, campaign_id, pairs)


def retry_delay(attempt: int) -> int:
    """Seconds to wait after the given attempt failed for now."""
    return min(LONGEST_RETRY_SECONDS, settings.retry_seconds() << (attempt - 1))
