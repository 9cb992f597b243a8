"""kombu's Redis transport with another way of taking messages: one script pops a message and notes it as taken.

kombu's own waits with BRPOP, which removes the message, and notes it afterwards: what is killed in between loses it.
Here nothing blocks. The connection of a channel has CLIENT TRACKING on, so Redis says when a queue that was found empty
changes, and the channel asks again. It asks every second in any case, which is how it knows that Redis still answers.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from typing import Any
from weakref import WeakSet

import redis
import redis.client
import redis.sentinel
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.url import url_to_parts
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

from hothouse_transport import names
from hothouse_transport.health import health
from hothouse_transport.messages import completed, dead_letter_of, losses_of, part
from hothouse_transport.refusals import ELSEWHERE, is_lost, refusal
from hothouse_transport.scripts import ACK, FETCH, MOVE, OVERDUE, RENEW, Script

logger = logging.getLogger(__name__)

# After how long without an answer Redis seems to be gone, in seconds.
SILENCE_SECONDS = 1.0
# How long Redis may refuse to hand out messages before the connection is dropped, in seconds.
REFUSAL_SECONDS = 5
# How long a publisher waits after a refusal, in seconds.
PUBLISH_PAUSE_SECONDS = 0.5
# How many messages are taken in one step at most, if the prefetch limit allows as many, and how many bytes of them; the
# last one may exceed these.
BATCH, BATCH_BYTES = 20, 16 * 1024**2
# How many overdue messages are looked at in one step, how many bytes of them, and for how long in one go, in seconds.
OVERDUE_BATCH, OVERDUE_BYTES, OVERDUE_SECONDS = 100, 16 * 1024**2, 1.0
# How often is said that the key of a queue is none, in seconds.
BROKEN_SECONDS = 60.0
# How many messages are renewed in one step, and how long to wait at most after that failed, in seconds.
RENEW_BATCH, RENEW_PAUSE_SECONDS = 500, 5.0
# How long failed deliveries of a message are remembered at least, in seconds.
REMEMBER_SECONDS = 7 * 24 * 3600


class Refused(RedisConnectionError):
    """Redis answers and refuses for now. A connection error, because that is what is tried again."""


def refused(code: str, error: ResponseError) -> Refused:
    text = str(error)
    return Refused(text if text.startswith(code) else f"{code} {text}")


@contextmanager
def patience() -> Iterator[None]:
    """Take a moment over a refusal: kombu tries again at once, and would be through with all tries in a second."""
    try:
        yield
    except Refused:
        time.sleep(PUBLISH_PAUSE_SECONDS)
        raise


class NotReplicated(RedisConnectionError):
    """A message was published, but too few replicas have it. Published again, it may be delivered twice."""


class _Refusals:
    """Raises refusals that pass as connection errors, and leaves the connection to a server that is no primary."""

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        try:
            return super().parse_response(connection, command_name, **options)  # type: ignore[misc]
        except ResponseError as error:
            code = refusal(error)
            if code is None:
                raise
            if code in ELSEWHERE:
                connection.disconnect()
            raise refused(code, error) from error


class Pipeline(_Refusals, stock.PrefixedRedisPipeline):
    #: What looks at the answers before they count.
    check: Callable[[list[Any]], None] | None = None

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        try:
            answers: list[Any] = super().execute(raise_on_error)
        except ResponseError as error:  # of a command in a transaction
            code = refusal(error)
            if code is None:
                raise
            raise refused(code, error) from error
        if self.check:
            self.check(answers)
        return answers


class Client(_Refusals, stock.PrefixedStrictRedis):
    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        return Pipeline(
            self.connection_pool,
            self.response_callbacks,
            transaction,
            shard_hint,
            global_keyprefix=self.global_keyprefix,
        )


class PublishBatch(stock.PublishBatch):
    """A batch counts when enough replicas have all of it."""

    def flush(self) -> None:
        if self._buffered:
            self.channel.confirm(self.pipeline)
        super().flush()


class Unsettled:
    """Acknowledgements that did not reach Redis, until a channel of the same broker and keys hears from it again."""

    def __init__(self) -> None:
        self._tags: dict[tuple[Any, ...], dict[str, bool]] = {}
        self._lock = threading.Lock()

    def add(self, broker: tuple[Any, ...], tag: str, counted: bool) -> None:
        with self._lock:
            self._tags.setdefault(broker, {})[tag] = counted

    def take(self, broker: tuple[Any, ...]) -> dict[str, bool]:
        if broker not in self._tags:
            return {}
        with self._lock:
            return self._tags.pop(broker, {})


unsettled = Unsettled()
# All pools of connections in this process.
pools: WeakSet[Any] = WeakSet()


class QoS(stock.QoS):
    """What is taken and not yet acknowledged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._next_sweep = 0.0
        self._next_renewal = 0.0

    def append(self, message: Any, delivery_tag: str) -> None:
        if delivery_tag in self.channel.noted:
            self.channel.noted.discard(delivery_tag)
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        with self.let_go(delivery_tag):
            self._settle(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        with self.let_go(delivery_tag):
            if requeue:
                self.restore_by_tag(delivery_tag, leftmost=True)
            else:
                self._settle(delivery_tag)

    @contextmanager
    def let_go(self, tag: str) -> Iterator[None]:
        """Hold a message no longer, also if Redis could not be told: renewed for ever, it would never come back."""
        try:
            yield
        finally:
            virtual.QoS.ack(self, tag)
            self.channel.credit()

    def _settle(self, tag: str) -> None:
        """Acknowledge in Redis; if it cannot be reached, when it can be again, also through another channel."""
        message = self._delivered.get(tag)
        counted = bool(message is not None and (message.headers or {}).get("redelivered"))
        channel = self.channel
        try:
            if channel.silent:
                raise RedisConnectionError("it has not answered for a while")
            channel.run(ACK, channel.books, tag, int(counted))
        except channel.connection_errors as error:
            if not channel.consumed:
                raise
            unsettled.add(channel.broker, tag, counted)
            logger.warning("Redis did not take an acknowledgement, it will be repeated: %s", error)

    def restore_unacked(self, client: Any = None) -> None:
        try:
            for tag in list(self._delivered):
                self.restore_by_tag(tag)
        except self.channel.connection_errors as error:
            logger.warning(
                "could not hand messages back, they come back after the visibility timeout: %s", error
            )
        self._delivered.clear()

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        """Hand a message back. That is no failed delivery. One that cannot be handed back keeps no other."""
        try:
            entry = self.channel.plain.hget(self.channel.books[1], tag)
            if entry is not None:
                self.channel.give_back(tag, entry, push="LPUSH" if leftmost else "RPUSH")
        except ResponseError as error:
            logger.error(
                "The message %s cannot be handed back, that is tried again after the visibility timeout: %s",
                tag,
                error,
            )

    def renew(self) -> None:
        """Say that what is held is held by a consumer that lives, however long that takes."""
        channel = self.channel
        now = time.monotonic()
        if now < self._next_renewal or not self._delivered or channel.silent:
            return
        # Tasks in other threads settle meanwhile; of a message that is settled, Redis changes nothing.
        held = [tag for tag in list(self._delivered) if tag not in self._dirty]
        self._next_renewal = now + min(channel.visibility_timeout / 10, RENEW_PAUSE_SECONDS)
        for start in range(0, len(held), RENEW_BATCH):
            channel.run(RENEW, channel.books[:1], *held[start : start + RENEW_BATCH])
        # A little less than a third, so that a timer which is a little early is not skipped.
        self._next_renewal = now + channel.visibility_timeout * 0.3

    def restore_visible(self, start: int = 0, num: int | None = None, interval: int | None = None) -> None:
        """Give back what consumers took and neither acknowledged nor gave back in the visibility timeout."""
        channel = self.channel
        now = time.monotonic()
        if now < self._next_sweep or not channel.keeps_books or channel.silent:
            return
        # A little less than the interval, so that a timer which is a little early is not skipped.
        pause = channel.unacked_restore_interval * (channel.unacked_restore_throttle or 1)
        self._next_sweep = now + pause * 0.9
        while channel.sweep(num or OVERDUE_BATCH) and time.monotonic() - now < OVERDUE_SECONDS:
            pass


class Poller(stock.MultiChannelPoller):
    """Asks for messages instead of waiting with a command that removes one."""

    #: The thread that consumes.
    thread: int | None = None

    def on_poll_start(self) -> None:
        health.touch()
        self.thread = threading.get_ident()
        super().on_poll_start()
        for channel in self._channels:
            # Also without credit: the answer says that the connection lives.
            if channel.active_queues and not channel.qos.can_consume():
                self._register_BRPOP(channel)

    def _update_brpop_polling(self) -> None:
        """Nothing is paused: an answer holds no more than there was credit for."""

    def on_readable(self, fileno: int) -> None:
        channel, kind = self._fd_to_chan.get(fileno, (None, None))
        if kind == "BRPOP":
            channel.handlers[kind]()
        else:
            super().on_readable(fileno)

    def maybe_refresh_binding_expiry(self) -> None:
        """Called every second, by the event loop's timer or by each `get` without one."""
        self.maybe_check_brpop_health()
        self.maybe_restore_messages()
        super().maybe_refresh_binding_expiry()

    def maybe_restore_messages(self) -> None:
        # All renew before any looks, or what this process holds would be overdue after its loop stood still.
        for channel in list(self._channels):
            try:
                channel.qos.renew()
            except (*channel.connection_errors, ResponseError) as error:
                logger.warning("could not renew the hold on messages, trying again: %s", error)
                return
        for channel in list(self._channels):
            try:
                channel.qos.restore_visible(num=channel.unacked_restore_limit)
            except (*channel.connection_errors, ResponseError) as error:
                logger.warning("could not look for messages of consumers that vanished: %s", error)
                return

    def maybe_check_brpop_health(self) -> None:
        now = time.monotonic()
        for channel in list(self._channels):
            if channel._in_poll and now - channel._brpop_sent_at > channel.answer_timeout:
                logger.warning("Redis has not answered for %g s, connecting anew", channel.answer_timeout)
                channel.client.connection.disconnect()
                # What else is connected has probably been cut off as well, and would hold its user for a timeout.
                for pool in list(pools):
                    pool.disconnect(inuse_connections=False)

    def get(self, callback: Any, timeout: float | None = None) -> Any:
        # Wakes up to ask again, even when the caller would wait for ever.
        return super().get(callback, timeout=1 if timeout is None else min(timeout, 1))


class Channel(stock.Channel):
    QoS = QoS

    # A server that is gone must not hold a caller for ever.
    socket_timeout = 10
    socket_connect_timeout = 5
    socket_keepalive = True
    health_check_interval = 10
    priority_steps = (0,)

    #: How long an answer of Redis to a consumer may take before the connection is dropped, in seconds.
    answer_timeout = 10.0
    #: Replicas that must have a message before publishing it has succeeded, and how long to wait for them, in seconds.
    confirm_replicas = 0
    confirm_timeout = 1.0
    #: A message whose consumers vanished that often goes to the list `dead_letter_key`.
    max_deliveries = 4
    dead_letter_key = "dead-letter"
    #: Where messages go whose task is not known, and the hash beside it that counts them by the task's name.
    unknown_task_key = "unknown-task"
    deliveries_key = "deliveries"

    from_transport_options = (
        *stock.Channel.from_transport_options,
        "answer_timeout",
        "confirm_replicas",
        "confirm_timeout",
        "max_deliveries",
        "dead_letter_key",
        "unknown_task_key",
        "deliveries_key",
    )

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        self.noted: set[str] = set()
        self.consumed = False
        self._fetched: deque[tuple[str, str, bytes]] = deque()
        self._unacknowledged_queues: set[str] = set()
        self._asked_queues: list[str] = []
        self._woken = True
        self._next_ask = 0.0
        self._refused_since: float | None = None
        self._clients: dict[str, Client] = {}
        self._parameters: dict[bool, dict[str, Any]] = {}
        self._tracked: Any = None
        self._usable: set[str] = set()
        self._broken: dict[str, float] = {}
        super().__init__(connection, **kwargs)

    # --- clients ---------------------------------------------------------------------------------------------------

    def _get_client(self) -> Callable[..., Client]:
        super()._get_client()  # refuses a redis-py that is too old
        prefix = self.global_keyprefix

        def client(**arguments: Any) -> Client:
            return Client(global_keyprefix=prefix, **arguments)

        return client

    def _create_client(self, asynchronous: bool = False) -> Any:
        """One client for each channel; kombu makes one for each command."""
        if asynchronous:
            return super()._create_client(asynchronous=True)
        client = self._clients.get("prefixed")
        if client is None:
            client = self._clients["prefixed"] = super()._create_client()
        return client

    @property
    def plain(self) -> Client:
        """A client that takes keys as they are in Redis."""
        client = self._clients.get("plain")
        if client is None:
            client = self._clients["plain"] = Client(connection_pool=self.pool)
        return client

    def _get_pool(self, asynchronous: bool = False) -> Any:
        pool = super()._get_pool(asynchronous)
        pools.add(pool)
        return pool

    def _disconnect_pools(self) -> None:
        self._clients.clear()
        super()._disconnect_pools()

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        """Also those of a channel that is closed: a task that outlives it still acknowledges."""
        if asynchronous in self._parameters:
            return dict(self._parameters[asynchronous])
        parameters: dict[str, Any] = super()._connparams(asynchronous=asynchronous)
        if asynchronous:
            # The messages by which Redis tells of changes exist in RESP3 only. Nothing blocks on this connection.
            parameters["protocol"] = 3
            parameters["socket_timeout"] = min(self.socket_timeout or 5, 5)
        self._parameters[asynchronous] = parameters
        return dict(parameters)

    def key(self, name: str) -> str:
        return f"{self.global_keyprefix}{name}"

    @property
    def books(self) -> list[str]:
        return [self.key(name) for name in (self.unacked_index_key, self.unacked_key, self.deliveries_key)]

    @property
    def broker(self) -> tuple[Any, ...]:
        """What two channels have in common if they acknowledge in the same place."""
        where = self._parameters.get(False, {})
        master = getattr(self, "master_name", None)
        return (master or (where.get("host"), where.get("port")), where.get("db"), *self.books)

    def require_usable(self, queue: str) -> None:
        """ValueError if this cannot be the name of a queue."""
        if queue in self._usable:
            return
        reason = None if isinstance(queue, str) and names.internal(queue) else names.unusable(queue)
        if not reason and self.key(queue) in {*self.books, *map(self.key, self._own_keys)}:
            reason = "it is reserved: the transport keeps something else under this name"
        if reason:
            raise ValueError(
                f"{queue!r} cannot be the name of a queue: {reason}. Give the queue another name."
            )
        self._usable.add(queue)

    @property
    def _own_keys(self) -> tuple[str, ...]:
        return (self.unacked_mutex_key, self.dead_letter_key, self.unknown_task_key, self.unknown_names_key)

    @property
    def unknown_names_key(self) -> str:
        return f"{self.unknown_task_key}.names"

    def run(self, script: Script, keys: Iterable[str], *arguments: Any) -> Any:
        keys = list(keys)
        command = ("EVALSHA", script.sha, len(keys), *keys, *arguments)
        try:
            return self.plain.execute_command(*command)
        except NoScriptError:
            self.plain.execute_command("SCRIPT LOAD", script.text)
            return self.plain.execute_command(*command)

    @property
    def silent(self) -> bool:
        """Whether Redis seems not to answer; then nothing else is asked, which would stop the consumer's loop."""
        return bool(self._in_poll) and time.monotonic() - self._brpop_sent_at > SILENCE_SECONDS

    # --- taking messages -------------------------------------------------------------------------------------------

    @property
    def keeps_books(self) -> bool:
        """Whether this channel takes messages that have to be acknowledged."""
        return any(queue not in self._unacknowledged_queues for queue in self.active_queues)

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any) -> Any:
        self.require_usable(queue)
        self.consumed = True
        if no_ack:
            self._unacknowledged_queues.add(queue)
        else:
            self._unacknowledged_queues.discard(queue)
        answer = super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        accept = self.connection._callbacks[queue]

        def receive(payload: dict[str, Any]) -> Any:
            try:
                self.decode_body(payload.get("body"), payload["properties"].get("body_encoding"))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                self._unreadable(payload["properties"]["delivery_tag"], queue, error)
                return None
            return accept(payload)

        self.connection._callbacks[queue] = receive if not no_ack else accept
        self._next_ask = 0.0
        return answer

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for messages if there may be any, or if Redis has not been heard for a while."""
        if self._fetched:
            self._deliver_fetched()
        credit = 0
        if self.qos.can_consume():
            credit = min(self.qos.can_consume_max_estimate() or 1, BATCH)
        now = time.monotonic()
        if now < self._next_ask and not (self._woken and credit and self._refused_since is None):
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        connection = self.client.connection
        if self._tracked is not connection._sock:
            self._track(connection)
        if credit:
            self._woken = False
        self._next_ask = now + (self.brpop_timeout or 1)
        self._asked_queues = queues
        self._in_poll, self._brpop_sent_at = connection, now
        health.asked(id(self))
        keys, arguments = self._fetch_arguments(queues, credit, track=True)
        connection.send_command("EVALSHA", FETCH.sha, len(keys), *keys, *arguments, check_health=False)

    def _fetch_arguments(self, queues: list[str], count: int, track: bool) -> tuple[list[str], list[Any]]:
        index, unacked, _ = self.books
        in_turn = self.queue_order_strategy == "round_robin"
        noted = ["" if queue in self._unacknowledged_queues else json.dumps(queue) for queue in queues]
        keys = [index, unacked, *map(self.key, queues)]
        return keys, [count, BATCH_BYTES, int(in_turn), int(track), *noted]

    def _track(self, connection: Any) -> None:
        """Have Redis tell of changes to keys that this connection read."""
        self._tracked = connection._sock
        connection._parser.set_invalidation_push_handler(self._on_change)
        for command in (("CLIENT", "TRACKING", "ON"), ("SCRIPT", "LOAD", FETCH.text)):
            connection.send_command(*command, check_health=False)
            try:
                connection.read_response()
            except ResponseError as error:
                if refusal(error) is None:
                    logger.error(
                        "Redis refuses %s %s, so the consumer is slow or deaf; does its user have the right? %s",
                        *command[:2],
                        error,
                    )

    def _on_change(self, _push: Any) -> None:
        self._woken = True

    def _brpop_read(self, **options: Any) -> bool:
        """Read what Redis sent: that a queue changed, an answer, or both. Raises Empty if there is no message."""
        connection = self.client.connection
        try:
            while connection.can_read(timeout=0):
                if self._read_one(connection):
                    return True
        except self.connection_errors:
            connection.disconnect()
            raise
        raise Empty()

    def _read_one(self, connection: Any) -> bool:
        """Read one thing, and deliver the messages that are in it."""
        try:
            answer = connection.read_response(push_request=True)
        except NoScriptError:
            self._answered()
            self._tracked = None  # which loads the script as well
            return False
        except ResponseError as error:
            self._answered()
            self._woken = True
            self._on_refusal(error)
            return False
        if answer is None:  # _on_change has it
            return False
        self._answered()
        self._refused_since = None
        if any(number > 0 for number in answer[::3]):
            self._woken = True  # there may be more
        self._note(answer)
        self._settle_unsettled()
        return self._deliver_fetched()

    def _answered(self) -> None:
        self._in_poll = None
        health.answered(id(self))
        self._flush_brpop_reauth()

    def _on_refusal(self, error: ResponseError) -> None:
        code = refusal(error)
        now = time.monotonic()
        if self._refused_since is None:
            self._refused_since = now
            logger.warning("Redis refuses to hand out messages, trying again every second: %s", error)
        if code is None:
            raise error
        if code in ELSEWHERE and (code != "NOREPLICAS" or now - self._refused_since > REFUSAL_SECONDS):
            self._refused_since = None
            self.client.connection.disconnect()
            raise refused(code, error) from error

    def _note(self, answer: list[Any]) -> None:
        """Keep what was taken until it is delivered."""
        for number, tag, message in zip(answer[::3], answer[1::3], answer[2::3], strict=True):
            queue = self._asked_queues[abs(number) - 1]
            if number < 0:
                self._on_broken(queue, message)
                continue
            self._queue_cycle.rotate(queue)
            self._fetched.append((queue, tag.decode(), message))

    def _on_broken(self, queue: str, error: bytes) -> None:
        """Say now and then that the key of a queue is none. The other queues are not concerned."""
        now = time.monotonic()
        if now >= self._broken.get(queue, 0):
            self._broken[queue] = now + BROKEN_SECONDS
            logger.error(
                "No messages are taken from the queue %s, its key %s in Redis is no list: %s. Look at it, and "
                "rename or delete it.",
                queue,
                self.key(queue),
                error.decode(errors="backslashreplace"),
            )

    def _deliver_fetched(self) -> bool:
        delivered = False
        while self._fetched:
            queue, tag, message = self._fetched.popleft()
            if queue not in self.connection._callbacks:  # cancelled in the meantime
                self._hand_back(queue, tag, message)
                continue
            acknowledged = queue not in self._unacknowledged_queues
            payload = self._payload(queue, tag, message)
            if payload is not None:
                if acknowledged:
                    self.noted.add(tag)
                self.connection._deliver(payload, queue)
                delivered = True
        return delivered

    def hand_back_unseen(self) -> None:
        """Put back what was taken and not yet delivered; also from another thread than the one that consumes."""
        while self._fetched:
            queue, tag, message = self._fetched.pop()
            try:
                self._hand_back(queue, tag, message)
            except ResponseError as error:
                logger.error("A message of the queue %s cannot be handed back: %s", queue, error)

    def _hand_back(self, queue: str, tag: str, message: bytes) -> None:
        """Put a message that nobody has seen where it was."""
        if queue in self._unacknowledged_queues:
            self.plain.rpush(self.key(queue), message)
        else:
            self.run(MOVE, [*self.books, self.key(queue)], tag, "", "RPUSH", message, "", 0, "")

    def _payload(self, queue: str, tag: str, message: bytes) -> dict[str, Any] | None:
        """The message with the tag under which it was noted; None if it is none, and then a dead letter."""
        try:
            payload = completed(stock.loads(message))
            payload["properties"]["delivery_tag"] = tag
        except Exception as error:  # also whatever a decoder of the application's own raises
            self._unreadable(tag, queue, error)
            return None
        return payload

    def _unreadable(self, tag: str, queue: str, error: Exception) -> None:
        self.noted.discard(tag)
        logger.error(
            "A message in the queue %s cannot be read, it goes to %s: %r", queue, self.dead_letter_key, error
        )
        self.bury(tag, f"unreadable: {error!r}")

    def _settle_unsettled(self) -> None:
        waiting = unsettled.take(self.broker)
        try:
            for tag, counted in list(waiting.items()):
                self.run(ACK, self.books, tag, int(counted))
                del waiting[tag]
        except self.connection_errors as error:
            logger.warning("Redis did not take an acknowledgement again, it will be repeated: %s", error)
        finally:
            for tag, counted in waiting.items():
                unsettled.add(self.broker, tag, counted)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        while True:
            index, unacked, _ = self.books
            name = "" if no_ack else json.dumps(queue)
            answer = self.run(FETCH, [index, unacked, self.key(queue)], 1, BATCH_BYTES, 1, 0, name)
            self._maybe_update_queues_expire(self._create_client(), queue)
            if not answer:
                return None
            if answer[0] < 0:
                raise ResponseError(answer[2].decode(errors="backslashreplace"))
            payload = self._payload(queue, answer[1].decode(), answer[2])
            if payload is None:
                continue
            message = self.Message(payload, channel=self)
            if not no_ack:
                self.noted.add(message.delivery_tag)
                self.qos.append(message, message.delivery_tag)
            return message

    def _receive_one(self, client: Any) -> Any:
        """Take what was told to all: control messages and events. One that makes no sense ends no consumer."""
        try:
            return super()._receive_one(client)
        except Empty:
            raise
        except Exception as error:
            if is_lost(error, self.connection_errors):
                raise
            logger.error("A message to all cannot be read, it is left out: %r", error)
            raise Empty() from None

    def credit(self) -> None:
        """A message was settled. If another thread's event loop sleeps, it may now ask for more."""
        connection = self.connection
        if connection and connection.loop and connection.cycle.thread != threading.get_ident():
            connection.loop.call_soon(_nothing)

    # --- giving messages back --------------------------------------------------------------------------------------

    def sweep(self, limit: int) -> bool:
        """Give back overdue messages; whether there may be more."""
        rows = self.run(OVERDUE, self.books, self.visibility_timeout, limit, OVERDUE_BYTES)
        for tag, score, deliveries, entry in zip(rows[::4], rows[1::4], rows[2::4], rows[3::4], strict=True):
            try:
                self._give_back_overdue(tag.decode(), score, int(deliveries), entry)
            except Exception as error:  # whatever is in it must not keep the others
                if is_lost(error, self.connection_errors):
                    raise
                logger.error(
                    "The overdue message %r cannot be given back, that is tried again after the visibility timeout: %r",
                    tag,
                    error,
                )
                # The others have their turn before it.
                self.run(RENEW, self.books[:1], tag)
        return len(rows) // 4 >= limit or sum(map(len, rows[3::4])) >= OVERDUE_BYTES

    def _give_back_overdue(self, tag: str, score: bytes, deliveries: int, entry: bytes) -> None:
        failed = deliveries + 1 + _losses_in(entry)
        if self.max_deliveries and failed >= self.max_deliveries:
            self.bury(tag, "its consumers vanished", failed, score=score, entry=entry)
        else:
            self.give_back(tag, entry, score=score, failed=failed)

    def give_back(
        self, tag: str, entry: bytes, push: str = "RPUSH", score: bytes = b"", failed: int = 0
    ) -> None:
        """Put a taken message into the queue that it came from, marked as redelivered."""
        try:
            message, exchange, routing_key = json.loads(entry)
            queues = self._lookup(exchange, routing_key)
            if not queues:
                raise LookupError(f"no queue is bound to {exchange!r} with {routing_key!r}")
            completed(message)["headers"]["redelivered"] = True
            message["properties"]["delivery_info"]["redelivered"] = True
            # The failed deliveries are counted under it.
            message["properties"]["delivery_tag"] = tag
            text = json.dumps(message)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            self.bury(tag, f"cannot be given back: {error!r}", failed, score=score, entry=entry)
            return
        remember = max(REMEMBER_SECONDS, int(self.visibility_timeout) * 10)
        keys = [*self.books, *map(self.key, queues)]
        moved = self.run(MOVE, keys, tag, score, push, text, "+" if failed else "", remember, "")
        if moved and failed:
            logger.warning(
                "A consumer vanished with the task %s, which is given back to %s; failed deliveries: %d",
                part(message, "headers").get("id", tag),
                ", ".join(queues),
                failed,
            )

    def bury(
        self,
        tag: str,
        reason: str,
        deliveries: int = 0,
        score: bytes = b"",
        entry: bytes | None = None,
        unknown: str = "",
    ) -> bool:
        """Move a taken message to the dead letters; False if it was settled in the meantime.

        `unknown` is the name of a task that nobody here knows: then it is set aside with others of that kind.
        """
        if entry is None:
            entry = self.plain.hget(self.books[1], tag)
            if entry is None:
                return False
        letter = self._dead_letter(entry, reason, deliveries)
        where = self.unknown_task_key if unknown else self.dead_letter_key
        keys = [*self.books, self.key(where), *([self.key(self.unknown_names_key)] if unknown else [])]
        moved = bool(self.run(MOVE, keys, tag, score, "LPUSH", json.dumps(letter), "-", 0, unknown))
        if moved:
            logger.error("The task %s (%s) goes to %s: %s", letter["id"], letter["task"], where, reason)
        return moved

    def _dead_letter(self, entry: bytes, reason: str, deliveries: int) -> dict[str, Any]:
        try:
            message, exchange, routing_key = json.loads(entry)
            letter = dead_letter_of(message, None if exchange else routing_key, reason, deliveries)
            json.dumps(letter)
        except (ValueError, TypeError, RecursionError):
            # What was taken is no JSON, or nested too deep: between the brackets, before the exchange and the queue.
            text = entry.decode(errors="backslashreplace")
            message, _, queue = text[1:-1].rsplit(", ", 2) if text.count(", ") > 1 else (text, "", "null")
            with suppress(ValueError):
                queue = json.loads(queue)
            letter = dead_letter_of(message, queue, reason, deliveries)
        return letter

    def close(self) -> None:
        if not self.closed:
            self._close_fetch()
        try:
            super().close()
        finally:
            health.answered(id(self))

    def _close_fetch(self) -> None:
        """Take in what Redis may be handing out just now, and hand all back that nobody has seen."""
        connection: Any = self._in_poll
        self._in_poll = None
        try:
            if connection:
                self._note(connection.read_response() or [])
            self.hand_back_unseen()
        except (*self.connection_errors, ResponseError) as error:
            # It is noted as taken, and comes back after the visibility timeout.
            logger.warning("could not hand back what nobody has seen: %s", error)

    def _on_connection_disconnect(self, connection: Any) -> None:
        if self._in_poll is connection:
            health.answered(id(self))
            self._woken, self._next_ask = True, 0.0
        super()._on_connection_disconnect(connection)

    # --- publishing ------------------------------------------------------------------------------------------------

    def confirm(self, pipe: Pipeline) -> None:
        """Let a pipeline that publishes succeed only if enough replicas have it."""
        if not self.confirm_replicas:
            return

        def check(answers: list[Any]) -> None:
            if int(answers[-1]) < self.confirm_replicas:
                raise NotReplicated(
                    f"{answers[-1]} of {self.confirm_replicas} replicas have it after {self.confirm_timeout:g} s"
                )

        pipe.wait(self.confirm_replicas, max(int(self.confirm_timeout * 1000), 1))
        pipe.check = check

    def create_publish_batch(self, max_size: int) -> PublishBatch:
        return PublishBatch(self, max_size)

    def queue_declare(self, queue: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if queue:
            self.require_usable(queue)
        return super().queue_declare(queue, *args, **kwargs)

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        self.require_usable(queue)
        with patience():
            self._push(queue, message, **kwargs)

    def _queue_bind(self, *args: Any) -> None:
        with patience():
            super()._queue_bind(*args)

    def _push(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        if not self.confirm_replicas or kwargs.get("_publish_batch") is not None:
            super()._put(queue, message, **kwargs)
            return
        with self._create_client().pipeline(transaction=False) as pipe:
            pipe.lpush(queue, stock.dumps(message))
            if queue in self._expires:
                pipe.pexpire(queue, self._expires[queue])
            self.confirm(pipe)
            pipe.execute()

    def _size(self, queue: str) -> int:
        """kombu asks in a transaction, which Redis refuses when its memory is full."""
        with patience():
            try:
                return int(self.plain.llen(self.key(queue)))
            except ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                # A worker declares all its queues before it takes from any: the others are not concerned.
                self._on_broken(queue, str(error).encode())
                return 0

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        """kombu asks for the key without the prefix."""
        return bool(self.plain.exists(self.key(queue)))


def _nothing() -> None:
    """What wakes an event loop up."""


def _losses_in(entry: bytes) -> int:
    try:
        return losses_of(json.loads(entry)[0]["headers"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return 0


def dead_letter(channel: Any, message: Any, reason: str, deliveries: int = 0, unknown: str = "") -> bool:
    """Move a message that this process holds to the dead letters, atomically; that also acknowledges it.

    `message` is kombu's Message. False if it was acknowledged or given back already. `unknown`: see `Channel.bury`.
    """
    with channel.qos.let_go(message.delivery_tag):
        moved: bool = channel.bury(message.delivery_tag, reason, deliveries, unknown=unknown)
    return moved


class Transport(stock.Transport):
    """hothouse://"""

    Channel = Channel
    loop: Any = None

    # kombu gives a transport up at the second error in a row unless it names the ones that pass.
    recoverable_connection_errors = stock.Transport.connection_errors
    recoverable_channel_errors: tuple[type[Exception], ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()
        options = self.client.transport_options
        for option, only in (("priority_steps", [0]), ("ack_emulation", True)):
            value = options.get(option, only)
            if (list(value) if option == "priority_steps" else value) != only:
                raise ValueError(
                    f"hothouse_transport cannot do {option}={value!r}. Leave it out of "
                    "broker_transport_options, or use kombu's own transport, redis://."
                )

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self.loop = loop
        super().register_with_event_loop(connection, loop)


class TLSChannel(Channel):
    # redis-py's own default is to verify; the scheme rediss:// of kombu does not.
    connection_class = redis.SSLConnection


class TLSTransport(Transport):
    """hothouses://"""

    Channel = TLSChannel


class SentinelChannel(Channel, stock.SentinelChannel):
    from_transport_options = (
        *Channel.from_transport_options,
        "master_name",
        "min_other_sentinels",
        "sentinel_kwargs",
        "sentinel_fanout_compat",
    )

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        # Kept, because a closed channel has no connection and may still acknowledge.
        self._sentinels = [
            (parts.hostname, parts.port or connection.default_port)
            for parts in map(url_to_parts, connection.client.alt)
            if parts.hostname
        ]
        super().__init__(connection, **kwargs)

    def _sentinel_managed_pool(self, asynchronous: bool = False) -> Any:
        parameters = self._connparams(asynchronous)
        own = (parameters.pop("host", None), parameters.pop("port", None))
        manager = redis.sentinel.Sentinel(
            self._sentinels or [own],
            min_other_sentinels=getattr(self, "min_other_sentinels", 0),
            sentinel_kwargs=getattr(self, "sentinel_kwargs", None),
            **parameters,
        )
        if asynchronous:
            self._async_sentinel_manager = manager
        else:
            self._sentinel_manager = manager
        name = getattr(self, "master_name", None)
        if name is None:
            raise ValueError(
                "broker_transport_options lacks master_name, the name that Sentinel gives the primary"
            )
        login = {key: parameters[key] for key in ("username", "password") if key in parameters}
        return manager.master_for(name, redis.Redis, **login).connection_pool


class SentinelTransport(Transport, stock.SentinelTransport):
    """hothouse-sentinel://"""

    Channel = SentinelChannel
