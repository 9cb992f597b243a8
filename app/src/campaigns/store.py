"""The ledger: campaigns and what became of each recipient, in Redis under `app:campaigns:`.

`app:campaigns:index` lists the campaigns by creation time, `app:campaigns:active` the unfinished ones by due
time, `app:campaigns:ambiguous` the ambiguous recipients of all as CAMPAIGN/NUMBER. `app:campaigns:ID` is a
campaign's hash; beside it are, by recipient number, the hashes `:recipients`, `:attempts`, `:owners` and
`:replies`, the sorted sets `:batches` (when each must be enqueued) and `:resent` (sent again after a doubt),
and one sorted set per state. Every change of a state happens in ledger.lua.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from campaigns import settings
from campaigns.messages import Template
from campaigns.recipients import Recipient

PREFIX = "app:campaigns:"
INDEX, ACTIVE, AMBIGUOUS = PREFIX + "index", PREFIX + "active", PREFIX + "ambiguous"
OPEN = ("pending", "sending", "data")
STATES = (*OPEN, "sent", "failed", "ambiguous", "cancelled")
MOST_ATTEMPTS = 8
LIMIT = 1000  # claims expired and batches handed out in one check; the next one goes on
CHUNK = 1000  # recipients read or written in one round trip
REPLY_LENGTH = (
    120  # characters kept of the reply to a mail that was sent: its queue id, and not its advertisement
)
UPLOAD_SECONDS = 3600  # after which an interrupted `create` leaves no trace
PATIENCE_SECONDS = 30  # with a Redis that fails; a failover takes 10
CONFIRM_SECONDS = 1  # for replicas
# Errors of a Redis that is being replaced, or that has no replicas, memory or disk to write to, for now.
PASSING = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.ReadOnlyError,
    redis.OutOfMemoryError,
    redis.exceptions.MasterDownError,
)
PASSING_CODES = {"NOREPLICAS", "MISCONF", "UNBLOCKED"}  # those without a class of their own


class UnknownCampaign(Exception):
    """There is no campaign with this id."""


class Unconfirmed(redis.RedisError):
    """A change was made, but not enough replicas have it yet: a failover may undo it."""


class Uncertain(redis.RedisError):
    """Redis failed in the moment in which the campaign was to become visible."""

    def __init__(self, campaign_id: str, error: redis.RedisError) -> None:
        super().__init__(
            f"{error}; the campaign may exist all the same: `campaigns show {campaign_id}` tells, "
            "and if it does not there is nothing to clear away"
        )


@dataclass(frozen=True)
class Campaign:
    """One campaign. Times are aware and in UTC."""

    id: str
    name: str
    sender: str
    template: Template
    state: str  # scheduled, sending, finished or cancelled
    size: int  # recipients
    batch_size: int
    send_at: datetime
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    waiting_for: str | None  # why nothing could be sent last
    ambiguous: str  # hold or resend: what becomes of a recipient in doubt

    def batch(self, number: int) -> range:
        """The numbers of a batch's recipients."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.size))


@dataclass(frozen=True)
class Record:
    """One recipient as the ledger has it; `reply` is the mail server's last word or ours."""

    number: int
    email: str
    state: str
    attempts: int
    reply: str


@dataclass(frozen=True)
class Claim:
    """The right to send one mail, until it expires. The owner is one run of one task."""

    campaign_id: str
    number: int
    owner: str
    attempt: int  # from 1


@dataclass(frozen=True)
class Deletion:
    """Whether a campaign was deleted, and what there was of it in that moment."""

    outcome: str  # deleted, open or ambiguous
    state: str  # the campaign's
    seconds: int  # until the last claim of a mail on its way expires
    counts: dict[str, int]  # recipients by state


class Ledger:
    """The campaigns of one Redis database. Thread-safe.

    Every call outlasts a failover, and may be repeated when its reply was lost. Raises redis.RedisError if
    Redis is still of no use after PATIENCE_SECONDS.
    """

    def __init__(self, url: str, confirm_replicas: int = 0) -> None:
        # The client's types do not know that decode_responses makes every reply text.
        self._redis: Any = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=10,
            socket_connect_timeout=3,
            socket_keepalive=True,
            health_check_interval=30,
            retry=Retry(NoBackoff(), 0),  # _ask does that, for more errors than the client knows to pass
            driver_info=None,  # spares CLIENT SETINFO, which Redis 7.0 does not know
        )
        self._replicas = confirm_replicas
        self._source = (resources.files("campaigns") / "ledger.lua").read_text()
        self._sha = self._redis.register_script(self._source).sha

    def _ask(self, request: Callable[[Any], Any], patience: float | None = None, insist: bool = True) -> Any:
        """Answer a request to Redis, repeated for `patience` seconds while it fails for reasons that pass.

        `insist` repeats it for want of a confirmation as well.
        """
        end, pause = time.monotonic() + (PATIENCE_SECONDS if patience is None else patience), 0.05
        while True:
            try:
                return request(self._redis)
            except redis.RedisError as error:
                passes = insist if isinstance(error, Unconfirmed) else _passes(error)
                if not passes or time.monotonic() + pause > end:
                    raise
            # The next connection may lead to another server.
            self._redis.connection_pool.disconnect(inuse_connections=False)
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _call(
        self,
        campaign_id: str,
        operation: str,
        *args: str | float,
        confirm: bool = False,
        patience: float | None = None,
        insist: bool = True,
    ) -> Any:
        """Run an operation of ledger.lua; `confirm` lets it count only when the replicas have it.

        A replica has all that happened before as well: what one call confirms is confirmed up to there.
        """
        keys = (PREFIX + campaign_id, ACTIVE, INDEX, AMBIGUOUS)
        confirm = confirm and self._replicas > 0

        def run(client: Any) -> Any:
            with client.pipeline(transaction=False) as pipe:
                pipe.evalsha(self._sha, len(keys), *keys, operation, "confirm" if confirm else "", *args)
                if confirm:
                    pipe.wait(self._replicas, CONFIRM_SECONDS * 1000)
                answer, *replicas = pipe.execute(raise_on_error=False)
            if isinstance(answer, redis.exceptions.NoScriptError):
                # A server that was restarted, or promoted.
                client.script_load(self._source)
                return run(client)
            for reply in (answer, *replicas):
                if isinstance(reply, Exception):
                    raise reply
            if confirm and replicas[0] < self._replicas:
                raise Unconfirmed(
                    f"Redis replicas: {replicas[0]} of {self._replicas} confirmed within {CONFIRM_SECONDS} s"
                )
            return answer

        return self._ask(run, patience, insist)

    # Campaigns

    def create(
        self,
        name: str,
        sender: str,
        template: Template,
        recipients: Sequence[Recipient],
        batch_size: int,
        send_at: datetime | None = None,
        ambiguous: str = "hold",
    ) -> str:
        """Write a campaign and return its id; until all of it is written nobody sees any of it.

        Raises Uncertain if it may exist all the same.
        """
        due = send_at.timestamp() if send_at else self._now()
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32].strip("-") or "campaign"
        campaign_id, token = "", secrets.token_hex(16)
        fields = {**asdict(template), "name": name, "sender": sender, "ambiguous": ambiguous}
        fields["batch_size"] = str(batch_size)
        pairs = [word for pair in fields.items() for word in pair]
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            campaign_id = campaign_id or f"{slug}-{secrets.token_hex(4)}"
            answer = ""
            for start in range(0, len(recipients), CHUNK):
                numbers = range(start, min(start + CHUNK, len(recipients)))
                rows = [json.dumps(recipients[n].fields, ensure_ascii=False) for n in numbers]
                args = (token, UPLOAD_SECONDS, due, batch_size, start)
                answer = self._call(campaign_id, "upload", *args, *rows)
                if answer == "taken":
                    break
            if answer == "taken":
                campaign_id = ""
                continue
            try:
                if (
                    self._call(campaign_id, "publish", token, len(recipients), due, *pairs, confirm=True)
                    != "lost"
                ):
                    return campaign_id
            except redis.RedisError as error:
                raise Uncertain(campaign_id, error) from error
        raise redis.ConnectionError("what was uploaded is lost again and again")

    def ids(self) -> list[str]:
        """All campaigns, the newest first."""
        return list(self._ask(lambda client: client.zrange(INDEX, 0, -1)))[::-1]

    def due_ids(self) -> list[str]:
        """The campaigns that are due and not finished."""
        now = self._now()
        return list(self._ask(lambda client: client.zrangebyscore(ACTIVE, "-inf", now)))

    def campaign(self, campaign_id: str) -> Campaign:
        """Return a campaign. Raises UnknownCampaign."""
        row = self._ask(lambda client: client.hgetall(PREFIX + campaign_id))
        if "state" not in row:
            raise UnknownCampaign(campaign_id)
        return Campaign(
            id=campaign_id,
            name=row["name"],
            sender=row["sender"],
            template=Template(row["subject"], row["text"], row["html"]),
            state=row["state"],
            size=int(row["size"]),
            batch_size=int(row["batch_size"]),
            send_at=_time(row["send_at"]),
            created_at=_time(row["created_at"]),
            started_at=_time(row["started_at"]) if "started_at" in row else None,
            finished_at=_time(row["finished_at"]) if "finished_at" in row else None,
            waiting_for=row.get("waiting_for"),
            ambiguous=row.get("ambiguous", "hold"),  # campaigns of before know no policy
        )

    def counts(self, campaign_id: str) -> dict[str, int]:
        """The number of recipients in each state."""
        return dict(zip(STATES, self._call(campaign_id, "counts", *STATES), strict=True))

    def records(self, campaign_id: str, state: str, limit: int | None = None) -> list[Record]:
        """Up to `limit` recipients in a state, the earliest first."""
        numbers = self._members(campaign_id, state, limit)
        return self._records(campaign_id, numbers, [state] * len(numbers))

    def resent(self, campaign_id: str, limit: int | None = None) -> list[Record]:
        """Up to `limit` recipients who may have got the mail twice, whatever their state is now."""
        numbers = self._members(campaign_id, "resent", limit)

        def ask(client: Any) -> list[Any]:
            with client.pipeline(transaction=False) as pipe:
                for number in numbers:
                    for state in STATES:
                        pipe.zscore(f"{PREFIX}{campaign_id}:{state}", number)
                return list(pipe.execute())

        scores = self._ask(ask) if numbers else []
        rows = [scores[start : start + len(STATES)] for start in range(0, len(scores), len(STATES))]
        states = [
            # Between two of the questions it may have moved, which only open ones do.
            next((state for state, at in zip(STATES, row, strict=True) if at is not None), "pending")
            for row in rows
        ]
        return self._records(campaign_id, numbers, states)

    def resent_count(self, campaign_id: str) -> int:
        """How many recipients may have got the mail twice."""
        return int(self._ask(lambda client: client.zcard(f"{PREFIX}{campaign_id}:resent")))

    def _members(self, campaign_id: str, part: str, limit: int | None) -> list[str]:
        if limit == 0:
            return []
        last = -1 if limit is None else limit - 1
        return list(self._ask(lambda client: client.zrange(f"{PREFIX}{campaign_id}:{part}", 0, last)))

    def _records(self, campaign_id: str, numbers: list[str], states: list[str]) -> list[Record]:
        result = []
        for start in range(0, len(numbers), CHUNK):
            some = numbers[start : start + CHUNK]
            columns = [
                self._values(campaign_id, part, some) for part in ("recipients", "attempts", "replies")
            ]
            result += [
                Record(int(number), json.loads(row)["email"], state, int(attempts or 0), reply or "")
                for number, state, row, attempts, reply in zip(
                    some, states[start : start + CHUNK], *columns, strict=True
                )
            ]
        return result

    def _values(self, campaign_id: str, part: str, numbers: list[str]) -> list[Any]:
        return list(self._ask(lambda client: client.hmget(f"{PREFIX}{campaign_id}:{part}", numbers)))

    def start(self, campaign_id: str) -> None:
        """Let a campaign begin, if it has not."""
        self._call(campaign_id, "start")

    def wait(self, campaign_id: str, seconds: float, reason: str) -> None:
        """Hand out none of a campaign's batches for a while: nothing can be sent now."""
        self._call(campaign_id, "wait", seconds, reason)

    def stop_waiting(self, campaign_id: str) -> None:
        """Mails can be sent."""
        self._ask(lambda client: client.hdel(PREFIX + campaign_id, "waiting_until", "waiting_for"))

    def cancel(self, campaign_id: str) -> str:
        """Stop what is not on its way and return the state before. Raises UnknownCampaign."""
        state = self._call(campaign_id, "cancel", confirm=True)
        if state is None:
            raise UnknownCampaign(campaign_id)
        return str(state)

    def finish(self, campaign_id: str) -> bool:
        """Write a campaign's finishing time; False if it is open or was finished before."""
        return bool(self._call(campaign_id, "finish"))

    def delete(self, campaign_id: str) -> Deletion:
        """Forget a campaign and its recipients, if all of them are settled. Raises UnknownCampaign."""
        state = self.campaign(campaign_id).state
        outcome, seconds, *counts = self._call(campaign_id, "delete", *STATES, confirm=True)
        return Deletion(outcome, state, int(seconds), dict(zip(STATES, map(int, counts), strict=True)))

    def open(self, campaign_id: str) -> bool:
        """Whether any recipient may still change without anybody's decision."""
        return bool(self._call(campaign_id, "open"))

    # Batches

    def take_batches(self, campaign_id: str, requeue_seconds: int) -> list[int]:
        """The batches to enqueue now; none of them is handed out again within `requeue_seconds`."""
        taker = secrets.token_hex(16)
        return [int(batch) for batch in self._call(campaign_id, "take", taker, LIMIT, requeue_seconds)]

    def due(self, campaign: Campaign, batch: int) -> dict[int, dict[str, str]]:
        """The columns of a batch's recipients that look sendable, by their number."""
        part = campaign.batch(batch)
        numbers = self._call(campaign.id, "due", part.start, part.stop - 1)
        if not numbers:
            return {}
        rows = self._values(campaign.id, "recipients", numbers)
        # A campaign that was deleted in between has no rows.
        return {int(number): json.loads(row) for number, row in zip(numbers, rows, strict=True) if row}

    def reschedule(self, campaign: Campaign, batch: int) -> None:
        """A worker has done what it could for a batch: it is due again with its first pending recipient."""
        part = campaign.batch(batch)
        self._call(campaign.id, "reschedule", batch, part.start, part.stop - 1)

    # Recipients

    def claim(self, campaign_id: str, number: int, owner: str, seconds: float) -> Claim | None:
        """Claim a pending recipient for `seconds`, if it is to be had."""
        attempt = int(self._call(campaign_id, "claim", number, owner, seconds))
        return Claim(campaign_id, number, owner, attempt) if attempt else None

    def begin_data(self, claim: Claim, seconds: float) -> bool:
        """Note that the mail leaves now. False if it must not: the claim is gone, the campaign cancelled.

        Raises Unconfirmed if a failover could undo the note: the mail must not leave.
        """
        args = (claim.number, claim.owner, seconds)
        return bool(self._call(claim.campaign_id, "begin_data", *args, confirm=True, insist=False))

    def settle(
        self,
        claim: Claim,
        state: str,
        reply: str,
        delay: float = 0,
        refund: bool = False,
        patience: float | None = None,
    ) -> bool:
        """Write what became of a claimed recipient; False if the claim expired and is no longer ours.

        For a return to pending: not before `delay` seconds, and `refund` takes the attempt back. What was
        sent is confirmed; any other outcome that a failover undoes ends as pending or ambiguous.
        """
        sent = state == "sent"
        # What Python quotes of a bad text may be no text itself.
        reply = reply.encode(errors="backslashreplace").decode()
        args = (claim.number, claim.owner, state, delay, reply[:REPLY_LENGTH] if sent else reply, int(refund))
        patience = max(PATIENCE_SECONDS, patience or 0)
        return bool(self._call(claim.campaign_id, "settle", *args, confirm=sent, patience=patience))

    def expire_claims(self, campaign_id: str, resend_seconds: float) -> tuple[int, int, int]:
        """Deal with claims whose worker is gone, and with doubts that are older than `resend_seconds`.

        Answers how many never reached DATA, how many are ambiguous now, how many are sent a second time.
        """
        returned, ambiguous, resent = self._call(campaign_id, "expire", LIMIT, MOST_ATTEMPTS, resend_seconds)
        return int(returned), int(ambiguous), int(resent)

    def resolve(self, campaign_id: str, numbers: Sequence[int], state: str, reply: str) -> int | None:
        """End the doubt about ambiguous recipients: they are `sent`, or `pending` once more.

        Answers how many are as decided now, None if a cancelled campaign was to send again.
        """
        resolved = 0
        for start in range(0, len(numbers), CHUNK):
            some = numbers[start : start + CHUNK]
            answer = self._call(campaign_id, "resolve", state, reply, *some, confirm=True)
            if answer is None:
                return None
            resolved += len(answer)
        return resolved

    def _now(self) -> float:
        seconds, microseconds = self._ask(lambda client: client.time())
        return float(seconds + microseconds / 1e6)


@cache
def ledger() -> Ledger:
    """This process's ledger, connected when first used."""
    return Ledger(settings.redis_url(), settings.confirm_replicas())


def _passes(error: redis.RedisError) -> bool:
    if isinstance(error, redis.AuthenticationError):
        return False
    return isinstance(error, PASSING) or str(error).partition(" ")[0] in PASSING_CODES


def _time(value: str) -> datetime:
    return datetime.fromtimestamp(float(value), UTC)
