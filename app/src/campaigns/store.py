"""The ledger: campaigns and what became of each recipient, in Redis under `app:campaigns:`.

`app:campaigns:index` lists the campaigns by creation time, `app:campaigns:active` the unfinished ones by due
time. `app:campaigns:ID` is a campaign's hash; beside it are, by recipient number, the hashes `:recipients`,
`:attempts`, `:owners` and `:replies`, the sorted set `:batches` (when each must be enqueued) and one sorted
set per state. Every change of a state happens in ledger.lua.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any

from redis import Redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from campaigns import settings
from campaigns.messages import Template
from campaigns.recipients import Recipient

PREFIX = "app:campaigns:"
INDEX, ACTIVE = PREFIX + "index", PREFIX + "active"
OPEN = ("pending", "sending", "data")
STATES = (*OPEN, "sent", "failed", "ambiguous", "cancelled")
MOST_ATTEMPTS = 8
LIMIT = 1000  # claims expired and batches handed out in one check; the next one goes on
CHUNK = 1000  # recipients written in one round trip
UPLOAD_SECONDS = 3600  # after which an interrupted `create` leaves no trace


class UnknownCampaign(Exception):
    """There is no campaign with this id."""


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
    waiting_for: str | None  # why the mail server was last of no use

    def batch(self, number: int) -> range:
        """The numbers of a batch's recipients."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.size))


@dataclass(frozen=True)
class Record:
    """One recipient as the ledger has it; `reply` is the mail server's last word or ours."""

    number: int
    email: str
    attempts: int
    reply: str


@dataclass(frozen=True)
class Claim:
    """The right to send one mail, until it expires. The owner is one run of one task."""

    campaign_id: str
    number: int
    owner: str
    attempt: int  # from 1


class Ledger:
    """The campaigns of one Redis database. Thread-safe; raises redis.RedisError if Redis does not answer."""

    def __init__(self, url: str) -> None:
        # The client's types do not know that decode_responses makes every reply text.
        self._redis: Any = Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=10,
            socket_connect_timeout=3,
            socket_keepalive=True,
            health_check_interval=30,
            retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=1), 5),
            driver_info=None,  # spares CLIENT SETINFO, which Redis 7.0 does not know
        )
        source = (resources.files("campaigns") / "ledger.lua").read_text()
        self._script = self._redis.register_script(source)

    def _call(self, campaign_id: str, operation: str, *args: str | float) -> Any:
        return self._script(keys=[PREFIX + campaign_id, ACTIVE], args=[operation, *args])

    # Campaigns

    def create(
        self,
        name: str,
        sender: str,
        template: Template,
        recipients: Sequence[Recipient],
        batch_size: int,
        send_at: datetime | None = None,
    ) -> str:
        """Write a campaign and return its id; until all of it is written nobody sees any of it."""
        now = self._now()
        due = send_at.timestamp() if send_at else now
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32].strip("-") or "campaign"
        while True:
            campaign_id = f"{slug}-{secrets.token_hex(4)}"
            key = PREFIX + campaign_id
            if self._redis.hsetnx(key, "name", name):
                self._redis.expire(key, UPLOAD_SECONDS)
                break
        parts = [key, f"{key}:recipients", f"{key}:pending", f"{key}:batches"]
        for start in range(0, len(recipients), CHUNK):
            numbers = range(start, min(start + CHUNK, len(recipients)))
            with self._redis.pipeline(transaction=False) as pipe:
                rows = {n: json.dumps(recipients[n].fields, ensure_ascii=False) for n in numbers}
                pipe.hset(f"{key}:recipients", mapping=rows)
                pipe.zadd(f"{key}:pending", dict.fromkeys(numbers, due))
                pipe.zadd(f"{key}:batches", {number // batch_size: due for number in numbers})
                for part in parts:
                    pipe.expire(part, UPLOAD_SECONDS)
                pipe.execute()
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(
                key,
                mapping={
                    **asdict(template),
                    "sender": sender,
                    "state": "scheduled",
                    "size": len(recipients),
                    "batch_size": batch_size,
                    "send_at": due,
                    "created_at": now,
                },
            )
            for part in parts:
                pipe.persist(part)
            pipe.zadd(INDEX, {campaign_id: now})
            pipe.zadd(ACTIVE, {campaign_id: due})
            pipe.execute()
        return campaign_id

    def ids(self) -> list[str]:
        """All campaigns, the newest first."""
        return list(self._redis.zrange(INDEX, 0, -1))[::-1]

    def due_ids(self) -> list[str]:
        """The campaigns that are due and not finished."""
        return list(self._redis.zrangebyscore(ACTIVE, "-inf", self._now()))

    def campaign(self, campaign_id: str) -> Campaign:
        """Return a campaign. Raises UnknownCampaign."""
        row = self._redis.hgetall(PREFIX + campaign_id)
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
        )

    def counts(self, campaign_id: str) -> dict[str, int]:
        """The number of recipients in each state."""
        with self._redis.pipeline(transaction=True) as pipe:
            for state in STATES:
                pipe.zcard(f"{PREFIX}{campaign_id}:{state}")
            return dict(zip(STATES, pipe.execute(), strict=True))

    def records(self, campaign_id: str, state: str, limit: int) -> list[Record]:
        """Up to `limit` recipients in a state, the earliest first."""
        key = PREFIX + campaign_id
        numbers = self._redis.zrange(f"{key}:{state}", 0, limit - 1) if limit > 0 else []
        if not numbers:
            return []
        parts = ("recipients", "attempts", "replies")
        columns = [self._redis.hmget(f"{key}:{part}", numbers) for part in parts]
        return [
            Record(int(number), json.loads(row)["email"], int(attempts or 0), reply or "")
            for number, row, attempts, reply in zip(numbers, *columns, strict=True)
        ]

    def start(self, campaign_id: str) -> None:
        """Let a campaign begin, if it has not."""
        self._call(campaign_id, "start")

    def wait(self, campaign_id: str, seconds: float, reason: str) -> None:
        """Hand out none of a campaign's batches for a while: the mail server is of no use to it now."""
        self._call(campaign_id, "wait", seconds, reason)

    def stop_waiting(self, campaign_id: str) -> None:
        """The mail server works."""
        self._redis.hdel(PREFIX + campaign_id, "waiting_until", "waiting_for")

    def cancel(self, campaign_id: str) -> str:
        """Stop what is not on its way and return the state before. Raises UnknownCampaign."""
        state = self._call(campaign_id, "cancel", campaign_id)
        if state is None:
            raise UnknownCampaign(campaign_id)
        return str(state)

    def finish(self, campaign_id: str) -> bool:
        """Write a campaign's totals and finishing time; False if it is open or was finished before."""
        return bool(self._call(campaign_id, "finish", campaign_id))

    # Batches

    def take_batches(self, campaign_id: str, requeue_seconds: int) -> list[int]:
        """The batches to enqueue now; none of them is handed out again within `requeue_seconds`."""
        return [int(batch) for batch in self._call(campaign_id, "take", LIMIT, requeue_seconds)]

    def due(self, campaign: Campaign, batch: int) -> dict[int, dict[str, str]]:
        """The columns of a batch's recipients that look sendable, by their number."""
        part = campaign.batch(batch)
        numbers = self._call(campaign.id, "due", part.start, part.stop - 1)
        if not numbers:
            return {}
        rows = self._redis.hmget(f"{PREFIX}{campaign.id}:recipients", numbers)
        return {int(number): json.loads(row) for number, row in zip(numbers, rows, strict=True)}

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
        """Note that the mail leaves now. False if it must not: the claim is gone, the campaign cancelled."""
        return bool(self._call(claim.campaign_id, "begin_data", claim.number, claim.owner, seconds))

    def settle(self, claim: Claim, state: str, reply: str, delay: float = 0, refund: bool = False) -> bool:
        """Write what became of a claimed recipient; False if the claim expired and is no longer ours.

        For a return to pending: not before `delay` seconds, and `refund` takes the attempt back.
        """
        args = (claim.number, claim.owner, state, delay, reply, int(refund))
        return bool(self._call(claim.campaign_id, "settle", *args))

    def expire_claims(self, campaign_id: str) -> tuple[int, int]:
        """Deal with claims whose worker is gone: how many never reached DATA, how many are ambiguous."""
        returned, ambiguous = self._call(campaign_id, "expire", LIMIT, MOST_ATTEMPTS)
        return int(returned), int(ambiguous)

    def _now(self) -> float:
        seconds, microseconds = self._redis.time()
        return float(seconds + microseconds / 1e6)


@cache
def ledger() -> Ledger:
    """This process's ledger, connected when first used."""
    return Ledger(settings.redis_url())


def _time(value: str) -> datetime:
    return datetime.fromtimestamp(float(value), UTC)
