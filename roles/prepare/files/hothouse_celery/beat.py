"""RedBeat's scheduler for several hosts: one schedules, the others stand by, and no due time is served twice.

RedBeat's own lock is waited for once, at the start, and a scheduler that loses it, or Redis, ends. This one asks for
the lock at every tick, so that it outlives a failover, and takes over within a second of the lock's end.
"""

from __future__ import annotations

import socket
import uuid
from typing import Any

from celery.beat import SchedulingError
from celery.utils.log import get_logger
from redbeat.schedulers import RedBeatScheduler, get_redis
from redis import RedisError

from hothouse_celery import notify_systemd
from hothouse_celery.logs import said
from hothouse_celery.schedule import Entry, instant, refusals

logger = get_logger(__name__)

STANDBY_SECONDS = 1.0
# A dead scheduler's claim on a due time ends after this. No publishing may last longer, or somebody sends it as well.
CLAIM_SECONDS = 60
# How long it is remembered that a due time was served; longer than a scheduler may be late in noting it in the entry.
SERVED_SECONDS = 3600

# KEYS: lock, schedulers. ARGV: token, lock in ms, host, seconds after which a scheduler is forgotten.
# Returns whether this one may schedule, which it holds the lock for.
LEAD = """
if not redis.call('set', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
  if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
  redis.call('pexpire', KEYS[1], ARGV[2])
end
local now = tonumber(redis.call('time')[1])
for _, host in ipairs(redis.call('zrangebyscore', KEYS[2], '-inf', now - ARGV[4])) do
  redis.call('zrem', KEYS[2], host)
end
redis.call('zadd', KEYS[2], now, ARGV[3])
return 1
"""
# KEYS: lock, schedulers. ARGV: token, host.
RESIGN = """
if redis.call('get', KEYS[1]) == ARGV[1] then redis.call('del', KEYS[1]) end
redis.call('zrem', KEYS[2], ARGV[2])
"""
# KEYS: slot, entry. ARGV: the entry's state as it was when it fell due, token, seconds.
# Nobody may have served this due time: neither is it noted in the entry, nor has anybody claimed it.
CLAIM = """
if (redis.call('hget', KEYS[2], 'meta') or '') ~= ARGV[1] then return 'past' end
if redis.call('set', KEYS[1], ARGV[2], 'NX', 'EX', ARGV[3]) then return 'claimed' end
return redis.call('get', KEYS[1])
"""
# KEYS: slot. ARGV: token. A claim that nothing came of.
RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then redis.call('del', KEYS[1]) end"


class Scheduler(RedBeatScheduler):
    """Sends what is due while it holds the lock, and each due time once, even if it does not hold it alone."""

    Entry = Entry

    def __init__(self, app: Any, **options: Any) -> None:
        self.token = uuid.uuid4().hex
        self.host = socket.gethostname()
        self.leading = self.closed = False
        self.trouble = ""
        # What this process published last, for each entry: its slot, also if nobody could note that in Redis.
        self.sent: dict[str, str] = {}
        super().__init__(app, **options)
        # Without a key of the lock RedBeat leaves it to this class.
        self.lock_name, self.lock_key = self.lock_key, None

    @property
    def lock_keys(self) -> list[str]:
        """The lock, and who schedules: hosts, with the time by Redis' clock of their last tick."""
        return [self.lock_name, f"{self.app.redbeat_conf.key_prefix}schedulers"]

    def run(self, script: str, keys: list[str], *arguments: Any) -> Any:
        """Run a script in Redis."""
        return get_redis(self.app).register_script(script)(keys, arguments)

    def tick(self, *arguments: Any, **options: Any) -> float:
        notify_systemd("WATCHDOG=1")
        try:
            pause = super().tick(*arguments, **options) if self.leads() else STANDBY_SECONDS
        except RedisError as error:
            # A failover, most of the time. The next tick finds out who schedules after it.
            if str(error) != self.trouble:
                logger.warning("beat: Redis does not answer as it should, trying again: %r", error)
            self.trouble = str(error)
            return STANDBY_SECONDS
        if self.trouble:
            logger.info("beat: Redis answers again")
            self.trouble = ""
        return pause

    def setup_schedule(self) -> None:
        """Store the application's entries. One that cannot be sent keeps none of the others from being sent."""
        refused = refusals(self.app)
        for name, reason in refused.items():
            logger.error("Scheduler: The entry %r is not sent: %s", name, reason)
        if refused:
            schedule = self.app.conf.beat_schedule
            self.app.conf.beat_schedule = {name: schedule[name] for name in schedule.keys() - refused.keys()}
        super().setup_schedule()

    def leads(self) -> bool:
        """Take the lock, or hold it for longer; False if somebody else has it."""
        milliseconds, seconds = int(self.lock_timeout * 1000), int(self.lock_timeout)
        leading = bool(self.run(LEAD, self.lock_keys, self.token, milliseconds, self.host, seconds))
        if leading is not self.leading:
            logger.info("beat: %s", "schedules" if leading else "stands by")
        self.leading = leading
        return leading

    def maybe_due(self, entry: Any, **options: Any) -> float:
        try:
            is_due, pause = entry.is_due()
            if is_due:
                self.apply_async(entry, **options)
            return float(self.max_interval if pause is None else pause)
        except RedisError:
            raise
        except SchedulingError as error:
            logger.error("Scheduler: Could not send, trying again: %s", error)
        except (Exception, SystemExit) as error:  # whatever a schedule of the application's own raises
            if self.closed:  # the signal that ends beat closes it first
                raise
            logger.error("Scheduler: The schedule of %r fails, trying again: %s", entry.name, said(error))
        return STANDBY_SECONDS

    def apply_async(self, entry: Any, producer: Any = None, advance: bool = True, **options: Any) -> Any:
        """Send an entry that is due, unless somebody else does. Only then is it noted in the entry.

        What this process has sent and could not note, as in the midst of a failover, it only notes at the next try.
        """
        redis = get_redis(self.app)
        meta = redis.hget(entry.key, "meta") or ""
        last = Entry.decode_meta(meta)["last_run_at"]
        # In UTC: Python takes no time of an hour that comes twice for that of another zone.
        if (last and instant(entry, last)) != (entry.last_run_at and instant(entry, entry.last_run_at)):
            return None
        slot = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{entry.name} {self.due(entry)}"))
        key = f"{self.app.redbeat_conf.key_prefix}slot:{slot}"
        claim = self.run(CLAIM, [key, entry.key], meta, self.token, CLAIM_SECONDS)
        result = None
        sent = self.sent.get(entry.name) == slot
        # Also if the answer to an earlier claim was lost, or it could not be given back.
        if claim in ("claimed", self.token) and not sent:
            logger.info("Scheduler: Sending due task %s (%s)", entry.name, entry.task)
            entry.options = {"task_id": slot, **entry.options}
            try:
                result = super().apply_async(entry, producer=producer, advance=False, **options)
            except Exception:
                self.run(RELEASE, [key], self.token)
                raise
            self.sent[entry.name] = slot
            sent = True
        if sent and claim in ("claimed", self.token):
            redis.set(key, "served", ex=SERVED_SECONDS)
            claim = "served"
        if claim == "served":
            self.reserve(entry)
        return result

    def due(self, entry: Any) -> str:
        """What tells this due time of an entry from its others: when it ran last, for all schedulers the same."""
        if entry.last_run_at:
            return instant(entry, entry.last_run_at).isoformat()
        redis = get_redis(self.app)
        redis.hsetnx(entry.key, "born", uuid.uuid4().hex)
        return str(redis.hget(entry.key, "born"))

    def close(self) -> None:
        self.closed = True
        try:
            self.run(RESIGN, self.lock_keys, self.token, self.host)
        except RedisError as error:
            logger.warning("beat: could not give up the lock, it ends by itself: %r", error)
        super().close()
