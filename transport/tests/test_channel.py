"""kombu's interface, without Celery and its event loop: what is taken, given back and acknowledged, in which order."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from conftest import Server, running, wait_until
from kombu import Connection, Consumer, Exchange, Queue
from kombu.exceptions import ChannelError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

import hothouse_transport
from hothouse_transport import channel as module
from hothouse_transport.health import Health

OPTIONS = {"global_keyprefix": "q:", "visibility_timeout": 60, "unacked_restore_interval": 1}


@pytest.fixture
def connect(server: Server) -> Iterator[Callable[..., Any]]:
    opened: list[Any] = []

    def connect(scheme: str = "hothouse", **options: Any) -> Any:
        url = server.url(scheme=scheme) if scheme == "hothouse" else f"redis://127.0.0.1:{server.port}/0"
        connection = Connection(url, transport_options={**OPTIONS, "unacked_restore_throttle": 1, **options})
        opened.append(connection)
        return connection

    yield connect
    for connection in opened:
        connection.release()


def put(connection: Any, queue: str, *bodies: Any, **properties: Any) -> None:
    producer = connection.Producer()
    for body in bodies:
        producer.publish(body, routing_key=queue, declare=[Queue(queue)], **properties)


def consume(connection: Any, queues: list[str], prefetch: int = 0, **arguments: Any) -> tuple[Any, list[Any]]:
    got: list[Any] = []
    channel = connection.channel()
    consumer = Consumer(
        channel,
        [Queue(name) for name in queues],
        on_message=got.append,
        prefetch_count=prefetch or None,
        **arguments,
    )
    consumer.consume()
    return consumer, got


def drain(connection: Any, until: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not until():
        assert time.monotonic() < end, "waited in vain"
        with suppress(socket.timeout):
            connection.drain_events(timeout=0.1)


def unreachable() -> Any:
    return module.Client(connection_pool=redis.ConnectionPool(host="127.0.0.1", port=1))


def bodies(messages: list[Any]) -> list[Any]:
    return [message.payload for message in messages]


def test_messages_come_in_order_and_are_noted_until_they_are_acknowledged(
    server: Server, connect: Callable[..., Any]
) -> None:
    connection = connect()
    put(connection, "one", *range(30))
    _, got = consume(connection, ["one"])
    drain(connection, lambda: len(got) == 30)
    assert bodies(got) == list(range(30))
    assert server.admin.hlen("q:unacked") == server.admin.zcard("q:unacked_index") == 30
    for message in got:
        message.ack()
    assert not server.admin.exists("q:unacked", "q:unacked_index", "q:one")


def test_queues_take_turns(connect: Callable[..., Any]) -> None:
    connection = connect()
    put(connection, "one", *["one"] * 50)
    put(connection, "two", *["two"] * 10)
    put(connection, "three", *["three"] * 10)
    _, got = consume(connection, ["one", "two", "three"], prefetch=7)

    def work() -> bool:
        for message in got:
            if not message.acknowledged:
                message.ack()
        return len(got) == 70

    drain(connection, work)
    first = Counter(bodies(got)[:30])
    assert min(first["one"], first["two"], first["three"]) >= 9, first


@pytest.mark.parametrize(("strategy", "expected"), [("priority", "two"), ("sorted", "one")])
def test_a_strict_order_of_queues_is_kept(strategy: str, expected: str, connect: Callable[..., Any]) -> None:
    connection = connect(queue_order_strategy=strategy)
    for queue in ("one", "two"):
        put(connection, queue, *[queue] * 10)
    _, got = consume(connection, ["two", "one"], prefetch=6)
    drain(connection, lambda: len(got) == 6)
    assert set(bodies(got)) == {expected}


def test_no_more_is_taken_than_the_prefetch_limit_allows(server: Server, connect: Callable[..., Any]) -> None:
    connection = connect()
    put(connection, "one", *range(20))
    _, got = consume(connection, ["one"], prefetch=3)
    drain(connection, lambda: len(got) == 3)
    for _ in range(5):
        with suppress(socket.timeout):
            connection.drain_events(timeout=0.1)
    assert len(got) == 3
    assert server.admin.llen("q:one") == 17
    got[0].ack()
    drain(connection, lambda: len(got) == 4)
    assert server.admin.llen("q:one") == 16


def test_a_message_that_comes_later_wakes_the_consumer(server: Server, connect: Callable[..., Any]) -> None:
    consuming, publishing = connect(), connect()
    _, got = consume(consuming, ["one", "two", "three"])
    with suppress(socket.timeout):
        consuming.drain_events(timeout=0.2)
    seconds = []
    for queue in ("three", "one", "two") * 3:
        put(publishing, queue, queue)
        began = time.monotonic()
        drain(consuming, lambda: got and not got[-1].acknowledged)
        seconds.append(time.monotonic() - began)
        got[-1].ack()
        with suppress(socket.timeout):  # until it has found all queues empty
            consuming.drain_events(timeout=0.1)
    # It asks every second in any case. That it does not wait for that is what the tracking is for.
    assert sorted(seconds)[4] < 0.5
    assert len(got) == 9


def test_rejected_and_requeued(server: Server, connect: Callable[..., Any]) -> None:
    connection = connect()
    put(connection, "one", "again", "never")
    _, got = consume(connection, ["one"])
    drain(connection, lambda: len(got) == 2)
    got[0].requeue()
    got[1].reject()
    drain(connection, lambda: len(got) == 3)
    assert got[2].payload == "again"
    assert got[2].headers["redelivered"] and got[2].delivery_info["redelivered"]
    got[2].ack()
    assert not server.admin.exists("q:unacked", "q:unacked_index", "q:one", "q:deliveries")


def test_closing_hands_everything_back_in_order(server: Server, connect: Callable[..., Any]) -> None:
    connection = connect()
    put(connection, "one", *range(10))
    consumer, got = consume(connection, ["one"], prefetch=4)
    drain(connection, lambda: len(got) == 4)
    got[0].ack()
    consumer.channel.close()
    assert server.admin.llen("q:one") == 9
    assert not server.admin.exists("q:unacked", "q:unacked_index", "q:deliveries")


def test_what_is_on_its_way_at_the_close_is_handed_back(server: Server, connect: Callable[..., Any]) -> None:
    connection = connect()
    consumer, got = consume(connection, ["one"], prefetch=4)
    with suppress(socket.timeout):
        connection.drain_events(timeout=0.1)
    channel = consumer.channel
    put(connect(), "one", *range(4))
    channel._woken, channel._next_ask = True, 0.0
    channel._brpop_start()
    wait_until(lambda: server.admin.zcard("q:unacked_index") == 4)
    channel.close()
    assert got == []
    waiting = [json.loads(text) for text in server.admin.lrange("q:one", 0, -1)]
    assert len(waiting) == 4 and not any(message["headers"].get("redelivered") for message in waiting)
    assert not server.admin.exists("q:unacked", "q:unacked_index")


def test_a_late_acknowledgement_through_a_closed_channel_counts(
    server: Server, connect: Callable[..., Any]
) -> None:
    connection = connect()
    put(connection, "one", 1)
    consumer, got = consume(connection, ["one"])
    drain(connection, lambda: got)
    consumer.channel.qos.restore_at_shutdown = False  # as when Redis could not be reached at that moment
    connection.release()
    assert server.admin.hlen("q:unacked") == 1
    got[0].ack()
    assert not server.admin.exists("q:unacked", "q:unacked_index")


def test_an_acknowledgement_that_failed_is_repeated(server: Server, connect: Callable[..., Any]) -> None:
    connection = connect()
    put(connection, "one", 1)
    consumer, got = consume(connection, ["one"])
    drain(connection, lambda: got)
    channel = consumer.channel
    good, channel._clients["plain"] = channel.plain, unreachable()
    got[0].ack()
    assert server.admin.hlen("q:unacked") == 1
    channel._clients["plain"] = good
    drain(connection, lambda: not server.admin.exists("q:unacked"))


def test_acknowledgements_that_are_refused_for_good_are_all_kept(
    server: Server, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = connect()
    put(connection, "one", *range(3))
    consumer, got = consume(connection, ["one"])
    drain(connection, lambda: len(got) == 3)
    channel = consumer.channel
    good, channel._clients["plain"] = channel.plain, unreachable()
    for message in got:
        message.ack()
    channel._clients["plain"] = good

    def refuse(*_: Any) -> None:
        raise ResponseError("NOPERM this user has no permissions to run the 'evalsha' command")

    with monkeypatch.context() as patch:
        patch.setattr(channel, "run", refuse)
        put(connect(), "one", "taken at the same time")
        with pytest.raises(ResponseError):
            drain(connection, lambda: False)
    assert server.admin.hlen("q:unacked") >= 3
    drain(connection, lambda: len(got) == 4 and server.admin.hlen("q:unacked") == 1)
    got[3].ack()


def scores(server: Server) -> dict[str, float]:
    return dict(server.admin.zrange("q:unacked_index", 0, -1, withscores=True))


def test_what_is_held_is_renewed_with_a_full_memory_as_well_and_nothing_else(
    server: Server, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_BATCH", 3)
    connection = connect()
    put(connection, "one", *range(10))
    consumer, got = consume(connection, ["one"])
    drain(connection, lambda: len(got) == 10)
    qos = consumer.channel.qos
    tags = [message.delivery_tag for message in got]
    got[0].ack()
    server.admin.zrem("q:unacked_index", tags[1])  # as when another worker gave it back
    server.admin.zadd("q:unacked_index", {"another's": 5, **dict.fromkeys(tags[2:], 5)})
    server.admin.config_set("maxmemory", 1)
    try:
        qos._next_renewal = 0.0
        qos.renew()
    finally:
        server.admin.config_set("maxmemory", 0)
    after = scores(server)
    assert after.pop("another's") == 5
    assert after.keys() == set(tags[2:])
    assert all(abs(score - time.time()) < 10 for score in after.values())
    # Not again before a third of the visibility timeout has passed.
    server.admin.zadd("q:unacked_index", {tags[2]: 5})
    qos.renew()
    assert scores(server)[tags[2]] == 5


def test_what_could_not_be_handed_back_is_not_renewed_for_ever(
    server: Server, connect: Callable[..., Any]
) -> None:
    connection = connect()
    put(connection, "one", 1)
    consumer, got = consume(connection, ["one"])
    drain(connection, lambda: got)
    channel = consumer.channel
    good, channel._clients["plain"] = channel.plain, unreachable()
    with pytest.raises(RedisConnectionError):
        got[0].requeue()
    channel._clients["plain"] = good
    before = scores(server)
    channel.qos._next_renewal = 0.0
    channel.qos.renew()
    assert scores(server) == before != {}


def test_an_acknowledgement_without_a_consumer_fails_loudly(
    server: Server, connect: Callable[..., Any]
) -> None:
    connection = connect()
    put(connection, "one", 1)
    channel = connection.channel()
    message = channel.basic_get("one")
    good, channel._clients["plain"] = channel.plain, unreachable()
    with pytest.raises(RedisConnectionError):
        message.ack()
    channel._clients["plain"] = good


def test_get_takes_and_notes_in_one_step_as_well(server: Server, connect: Callable[..., Any]) -> None:
    connection = connect()
    put(connection, "one", "first", "second")
    channel = connection.channel()
    message = channel.basic_get("one")
    assert message.payload == "first" and server.admin.hlen("q:unacked") == 1
    message.ack()
    assert channel.basic_get("one", no_ack=True).payload == "second"
    assert channel.basic_get("one") is None
    assert not server.admin.exists("q:unacked", "q:unacked_index")


def test_consumers_that_do_not_acknowledge_leave_nothing_behind(
    server: Server, connect: Callable[..., Any]
) -> None:
    connection = connect()
    put(connection, "one", *range(3))
    _, got = consume(connection, ["one"], no_ack=True)
    drain(connection, lambda: len(got) == 3)
    assert not server.admin.exists("q:unacked", "q:unacked_index", "q:one")


def test_purge_size_and_asking_for_a_queue_know_the_prefix(
    server: Server, connect: Callable[..., Any]
) -> None:
    connection = connect()
    put(connection, "one", *range(3))
    channel = connection.channel()
    assert channel.queue_declare("one", passive=True).message_count == 3
    assert channel.queue_purge("one") == 3
    with pytest.raises(ChannelError):
        channel.queue_declare("one", passive=True)


def test_a_message_for_two_queues_has_the_same_tag_in_both_and_is_taken_twice(
    server: Server, connect: Callable[..., Any]
) -> None:
    connection = connect()
    exchange = Exchange("both", "topic")
    queues = [Queue(name, exchange, routing_key="key") for name in ("one", "two")]
    connection.Producer().publish("x", exchange=exchange, routing_key="key", declare=queues)
    _, got = consume(connection, ["one", "two"])
    drain(connection, lambda: len(got) == 2)
    assert server.admin.hlen("q:unacked") == 2, "with kombu's own transport the second overwrites the first"
    for message in got:
        message.ack()
    assert not server.admin.exists("q:unacked", "q:unacked_index")


def test_a_header_named_like_the_tag_does_no_harm(server: Server, connect: Callable[..., Any]) -> None:
    connection = connect()
    put(connection, "one", "a", "b", headers={"delivery_tag": "mine"})
    _, got = consume(connection, ["one"])
    drain(connection, lambda: len(got) == 2)
    assert server.admin.hlen("q:unacked") == 2
    for message in got:
        message.ack()
    assert not server.admin.exists("q:unacked", "q:unacked_index")


UNREADABLE = (
    "no JSON",
    "[1]",
    '{"properties": 3}',
    '{"body": "abc", "properties": {"body_encoding": "base64"}}',
)


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_is_no_message_becomes_a_dead_letter(
    text: str, server: Server, connect: Callable[..., Any]
) -> None:
    connection = connect()
    server.admin.rpush("q:one", text)
    put(connection, "one", "a message")
    _, got = consume(connection, ["one"])
    drain(connection, lambda: got)
    [letter] = server.dead_letters()
    assert letter["queue"] == "one" and "unreadable" in letter["reason"]
    assert letter["message"] == (text if text == "no JSON" else json.loads(text))
    assert server.admin.hlen("q:unacked") == 1
    got[0].ack()


def test_a_message_without_a_tag_is_taken(server: Server, connect: Callable[..., Any]) -> None:
    server.admin.rpush("q:one", json.dumps({"body": "text", "content-type": "text/plain"}))
    connection = connect()
    _, got = consume(connection, ["one"], accept=["text/plain"])
    drain(connection, lambda: got)
    assert server.admin.hlen("q:unacked") == 1
    got[0].ack()
    assert not server.admin.exists("q:unacked", "q:unacked_index")


def test_typed_headers_arrive_as_they_were_sent(connect: Callable[..., Any]) -> None:
    connection = connect()
    headers = {"at": datetime(2030, 5, 1, tzinfo=UTC), "id": uuid4(), "raw": b"bytes"}
    put(connection, "one", "a", headers=headers)
    _, got = consume(connection, ["one"])
    drain(connection, lambda: got)
    assert got[0].headers == headers


@pytest.mark.parametrize("tag", ["", "\xff", "\u20ac"])
def test_a_message_that_came_without_a_fit_tag_is_put_aside_as_well(
    tag: str, server: Server, connect: Callable[..., Any]
) -> None:
    """Its failed deliveries are counted under the tag that it was given, and it keeps no other from coming back."""
    properties = {"delivery_info": {"exchange": "", "routing_key": "one"}, "delivery_tag": tag}
    text = json.dumps({"body": "", "headers": {"id": "odd"}, "properties": properties}, ensure_ascii=False)
    server.admin.rpush("q:one", text.encode("latin-1" if tag == "\xff" else "utf-8"))
    for vanished in range(4):
        connection = connect()
        consumer, got = consume(connection, ["one"])
        if tag == "\xff" and not vanished:
            # That is no text at all, so nobody can be given it.
            drain(connection, server.dead_letters)
            return
        drain(connection, lambda got=got: got)
        consumer.channel.qos.restore_at_shutdown = False
        connect(visibility_timeout=-1).channel().sweep(10)
    [letter] = server.dead_letters()
    assert (letter["id"], letter["deliveries"]) == ("odd", 4)
    assert not server.admin.exists("q:one", "q:unacked", "q:unacked_index", "q:deliveries")


def test_an_overdue_message_that_cannot_be_given_back_keeps_no_other(
    server: Server, connect: Callable[..., Any]
) -> None:
    connection = connect()
    put(connection, "one", "sound")
    consumer, got = consume(connection, ["one"])
    drain(connection, lambda: got)
    consumer.channel.qos.restore_at_shutdown = False
    entry = [{"body": "", "headers": {}, "properties": {"delivery_tag": "t"}}, "", "no list"]
    server.admin.set("q:no list", "text")
    server.admin.hset("q:unacked", mapping={"t": json.dumps(entry), b"\xff": json.dumps(entry)})
    server.admin.zadd("q:unacked_index", {"t": 1, b"\xff": 1})
    connect(visibility_timeout=-1).channel().sweep(10)
    assert server.admin.llen("q:one") == 1


def test_poison_in_front_keeps_no_other_however_much(server: Server, connect: Callable[..., Any]) -> None:
    """And none of it is lost: its queue may be mended."""
    poison, sound = 2 * module.OVERDUE_BATCH + 1, 20
    server.admin.set("q:broken", "text")

    def held(queue: str, number: int) -> None:
        entry = [{"body": "", "headers": {"id": number}, "properties": {}}, "", queue]
        server.admin.hset("q:unacked", f"{queue}{number}", json.dumps(entry))
        server.admin.zadd("q:unacked_index", {f"{queue}{number}": 1 if queue == "broken" else 2})

    for number in range(poison):
        held("broken", number)
    for number in range(sound):
        held("one", number)
    sweeper = connect(visibility_timeout=5, max_deliveries=0).channel()
    sweeper._active_queues.append("one")
    sweeper.qos.restore_visible()
    assert server.admin.llen("q:one") == sound
    assert server.admin.hlen("q:unacked") == poison
    server.admin.delete("q:broken")
    connect(visibility_timeout=-1).channel().sweep(2 * poison)
    assert server.admin.llen("q:broken") == poison


@pytest.mark.parametrize("strategy", ["round_robin", "priority"])
@pytest.mark.parametrize("kind", ["string", "hash"])
def test_a_queue_of_a_wrong_type_harms_no_other_queue(
    kind: str, strategy: str, server: Server, connect: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "string":
        server.admin.set("q:broken", "text")
    else:
        server.admin.hset("q:broken", "a", "b")
    connection = connect(queue_order_strategy=strategy)
    put(connection, "one", *range(3))
    put(connection, "two", *range(3))
    consumer, got = consume(connection, ["one", "broken", "two"])
    drain(connection, lambda: len(got) == 6)
    assert caplog.text.count("No messages are taken from the queue broken") == 1
    for message in got:
        message.ack()
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        put(connection, "broken", "lost?")
    server.admin.delete("q:broken")
    put(connection, "broken", "mended")
    drain(connection, lambda: len(got) == 7)
    assert got[-1].payload == "mended"
    # What cannot be handed back keeps no other, and stays noted.
    put(connection, "one", "after it")
    drain(connection, lambda: len(got) == 8)
    server.admin.set("q:broken", "text")
    consumer.channel.qos.restore_unacked()
    assert server.admin.llen("q:one") == 1 and server.admin.hlen("q:unacked") == 1


def test_what_is_moved_in_one_step_is_bounded_in_bytes(
    server: Server, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 300_000)
    monkeypatch.setattr(module, "OVERDUE_BYTES", 300_000)
    connection = connect()
    put(connection, "one", *["x" * 100_000] * 12)
    steps: list[int] = []
    note = module.Channel._note
    monkeypatch.setattr(
        module.Channel, "_note", lambda self, answer: steps.append(len(answer) // 3) or note(self, answer)
    )
    consumer, got = consume(connection, ["one"], prefetch=20)
    drain(connection, lambda: len(got) == 12)
    assert max(steps) == 3  # base64 makes three of a hundred thousand exceed it
    consumer.channel.qos.restore_at_shutdown = False
    sweeper = connect(visibility_timeout=-1, max_deliveries=0).channel()
    given_back = []
    while sweeper.sweep(100):
        given_back.append(server.admin.llen("q:one"))
    assert given_back == [3, 6, 9, 12]


@pytest.mark.parametrize("part", ["headers", "properties", "delivery_info"])
@pytest.mark.parametrize("value", [None, [], {}, "missing"], ids=str)
def test_parts_that_other_languages_leave_out_are_no_fault(
    part: str, value: Any, server: Server, connect: Callable[..., Any]
) -> None:
    message: dict[str, Any] = {"body": "text", "content-type": "text/plain", "headers": {}, "properties": {}}
    owner = message["properties"] if part == "delivery_info" else message
    owner[part] = value
    if value == "missing":
        del owner[part]
    server.admin.lpush("q:one", json.dumps(message))
    connection = connect()
    consumer, got = consume(connection, ["one"], accept=["text/plain"])
    drain(connection, lambda: got)
    assert got[0].payload == "text"
    consumer.channel.qos.restore_at_shutdown = False
    assert connect(visibility_timeout=-1).channel().sweep(10) is False
    assert server.admin.llen("q:one") == 1 and not server.dead_letters()
    drain(connection, lambda: len(got) == 2)
    assert got[1].headers["redelivered"]
    got[1].ack()


DEEP = 100_000 * "[" + 100_000 * "]"


@pytest.mark.parametrize("text", [DEEP, f'{{"headers": {{"deep": {DEEP}}}}}'], ids=["all", "header"])
def test_what_is_nested_too_deep_becomes_a_dead_letter(
    text: str, server: Server, connect: Callable[..., Any]
) -> None:
    server.admin.rpush("q:one", text)
    connection = connect()
    put(connection, "one", "a message")
    _, got = consume(connection, ["one"])
    drain(connection, lambda: got)
    [letter] = server.dead_letters()
    assert letter["queue"] == "one" and letter["message"] == text
    got[0].ack()
    # The same, taken by something else.
    server.admin.hset("q:unacked", "t", f'[{text}, "", "one"]')
    server.admin.zadd("q:unacked_index", {"t": 1})
    connect(visibility_timeout=-1).channel().sweep(10)
    assert [letter["message"] for letter in server.dead_letters()] == [text, text]


def test_any_depth_of_nesting_ends_somewhere(server: Server, connect: Callable[..., Any]) -> None:
    """Reading, writing and both around it have limits of their own."""
    connection = connect()
    depths = range(960, 1000)
    for depth in depths:
        server.admin.lpush("q:one", f'{{"headers": {{"deep": {depth * "["}{depth * "]"}}}}}')
    put(connection, "one", "last")
    consumer, got = consume(connection, ["one"])
    drain(connection, lambda: got and got[-1].body and got[-1].payload == "last")
    consumer.channel.qos.restore_at_shutdown = False
    connect(visibility_timeout=-1).channel().sweep(100)
    assert server.admin.llen("q:one") + len(server.dead_letters()) == len(depths) + 1
    assert not server.admin.exists("q:unacked")


def test_entries_that_are_no_messages_are_put_aside(server: Server, connect: Callable[..., Any]) -> None:
    entries = ["", "x", "[]", "[1]", '"text"', "null", "[1, 2, 3]", '[{"headers": 5}, "", "one"]', "a, b, c"]
    for number, entry in enumerate(entries):
        server.admin.hset("q:unacked", f"t{number}", entry)
        server.admin.zadd("q:unacked_index", {f"t{number}": number})
    connect(visibility_timeout=-1).channel().sweep(100)
    assert len(server.dead_letters()) == len(entries)
    assert not server.admin.exists("q:unacked")


def test_a_task_that_no_one_knows_is_counted_by_its_name(server: Server, connect: Callable[..., Any]) -> None:
    connection = connect()
    put(connection, "one", *"aab", headers={"task": "new", "id": "i"})
    consumer, got = consume(connection, ["one"])
    drain(connection, lambda: len(got) == 3)
    for message in got:
        name = f"new.{message.payload}"
        assert hothouse_transport.dead_letter(consumer.channel, message, "not known", unknown=name)
        assert not hothouse_transport.dead_letter(consumer.channel, message, "not known", unknown=name)
    assert server.admin.hgetall("q:unknown-task.names") == {"new.a": "2", "new.b": "1"}
    assert server.admin.llen("q:unknown-task") == 3
    assert not server.admin.exists("q:dead-letter", "q:unacked", "q:unacked_index")


@pytest.mark.parametrize(
    "name",
    ["unacked", "unacked_index", "deliveries", "dead-letter", "unknown-task.names", "mine", "a b", "a,b"],
)
def test_no_queue_takes_a_name_that_stands_for_something_else(
    name: str, server: Server, connect: Callable[..., Any]
) -> None:
    connection = connect(deliveries_key="mine")
    for attempt in (
        lambda: put(connection, name, "x"),
        lambda: connection.Producer().publish("x", routing_key=name),
        lambda: consume(connection, [name]),
        lambda: connection.channel().basic_consume(name, False, print, "tag"),
    ):
        with pytest.raises(ValueError, match="cannot be the name of a queue: it"):
            attempt()
    assert not server.admin.exists(f"q:{name}")


@pytest.mark.parametrize(("taken_by", "given_back_by"), [("redis", "hothouse"), ("hothouse", "redis")])
def test_either_transport_gives_back_what_the_other_took(
    taken_by: str, given_back_by: str, server: Server, connect: Callable[..., Any]
) -> None:
    first, second = connect(taken_by), connect(given_back_by, visibility_timeout=0)
    put(first, "one", {"numbers": [1, {}, []]})
    consumer, got = consume(first, ["one"])
    drain(first, lambda: got)
    consumer.channel.qos.restore_at_shutdown = False
    _, again = consume(second, ["one"])
    wait_until(lambda: time.time() > server.admin.zrange("q:unacked_index", 0, -1, withscores=True)[0][1])
    drain(second, lambda: again)
    assert bodies(again[:1]) == [{"numbers": [1, {}, []]}]
    assert again[0].headers["redelivered"]
    for message in again:
        message.ack()


def test_many_overdue_messages_come_back_and_none_that_was_acknowledged(
    server: Server, connect: Callable[..., Any]
) -> None:
    first = connect()
    put(first, "one", *range(250))
    consumer, got = consume(first, ["one"])
    drain(first, lambda: len(got) == 250)
    for message in got[::2]:
        message.ack()
    consumer.channel.qos.restore_at_shutdown = False
    sweeper = connect(visibility_timeout=0, max_deliveries=0).channel()
    sweeper._active_queues.append("one")
    wait_until(lambda: sweeper.qos.restore_visible() or not server.admin.exists("q:unacked"))
    waiting = [json.loads(text) for text in server.admin.lrange("q:one", 0, -1)]
    assert len(waiting) == 125 == server.admin.hlen("q:deliveries")
    assert all(message["headers"]["redelivered"] for message in waiting)
    assert server.admin.ttl("q:deliveries") > 86400


def test_runs_that_killed_a_pool_child_count_like_vanished_consumers(
    server: Server, connect: Callable[..., Any]
) -> None:
    connection = connect()
    put(connection, "one", "thrice", headers={"losses": 3})
    put(connection, "one", "twice", headers={"losses": 2})
    consumer, got = consume(connection, ["one"])
    drain(connection, lambda: len(got) == 2)
    consumer.channel.qos.restore_at_shutdown = False
    sweeper = connect(visibility_timeout=-1).channel()
    assert sweeper.sweep(10) is False
    [letter] = server.dead_letters()
    assert letter["deliveries"] == 4 and letter["message"]["headers"]["losses"] == 3
    assert server.admin.llen("q:one") == 1


def test_a_message_whose_queue_is_gone_becomes_a_dead_letter(
    server: Server, connect: Callable[..., Any]
) -> None:
    entry = [{"body": "", "headers": {}, "properties": {"delivery_tag": "t"}}, "nowhere", "key"]
    server.admin.hset("q:unacked", "t", json.dumps(entry))
    server.admin.zadd("q:unacked_index", {"t": 1})
    channel = connect().channel()
    assert channel.sweep(10) is False
    [letter] = server.dead_letters()
    assert "no queue is bound" in letter["reason"]
    assert not server.admin.exists("q:unacked", "q:unacked_index")


def test_dead_letter_moves_what_is_held_and_acknowledges_it(
    server: Server, connect: Callable[..., Any]
) -> None:
    connection = connect()
    put(connection, "one", "x", headers={"task": "t", "id": "i"})
    consumer, got = consume(connection, ["one"])
    drain(connection, lambda: got)
    assert hothouse_transport.dead_letter(consumer.channel, got[0], "its child was killed", 3)
    assert not hothouse_transport.dead_letter(consumer.channel, got[0], "twice")
    got[0].ack()
    [letter] = server.dead_letters()
    assert (letter["task"], letter["id"], letter["queue"]) == ("t", "i", "one")
    assert (letter["reason"], letter["deliveries"]) == ("its child was killed", 3)
    assert not server.admin.exists("q:unacked", "q:unacked_index", "q:one")


def test_a_server_without_rights_to_track_is_asked_every_second(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path / "redis") as server:
        server.admin.execute_command("ACL", "SETUSER", "worker", "-client|tracking")
        connection = Connection(server.url(), transport_options=OPTIONS)
        _, got = consume(connection, ["one"])
        with suppress(socket.timeout):
            connection.drain_events(timeout=0.2)
        put(connection, "one", 1)
        drain(connection, lambda: got)
        assert "refuses CLIENT TRACKING" in caplog.text
        got[0].ack()
        connection.release()


def test_a_batch_of_messages_needs_the_replicas_too(server: Server, connect: Callable[..., Any]) -> None:
    connection = connect(confirm_replicas=1, confirm_timeout=0.01)
    channel = connection.channel()
    with pytest.raises(Exception, match="0 of 1 replicas"):
        put(connection, "one", "alone")
    batch = channel.create_publish_batch(10)
    message = channel.prepare_message("x", properties={})
    batch.publish(message, exchange="", routing_key="one")
    with pytest.raises(Exception, match="uncertain"):
        batch.flush()
    batch.close()


@pytest.mark.parametrize("options", [{"priority_steps": [0, 5]}, {"ack_emulation": False}])
def test_what_it_cannot_do_is_refused(options: dict[str, Any], connect: Callable[..., Any]) -> None:
    [name] = options
    with pytest.raises(ValueError, match=f"hothouse_transport cannot do {name}"):
        connect(**options).connect()
    assert name in str(hothouse_transport.install(options))
    assert hothouse_transport.install({"priority_steps": [0]}) is None


def test_other_versions_of_kombu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hothouse_transport.KNOWN, "kombu", ((5, 8), (5, 9)))
    assert "kombu is 5.7" in str(hothouse_transport.install())
    monkeypatch.undo()
    monkeypatch.setattr(
        hothouse_transport, "version", lambda name: {"kombu": "5.7.0", "redis": "7.1.0"}[name]
    )
    assert "redis is 7.1.0, and this transport knows versions from 7.2" in str(hothouse_transport.install())
    monkeypatch.undo()
    monkeypatch.delattr("kombu.transport.redis.Channel._brpop_start")
    assert "Channel._brpop_start is not as" in str(hothouse_transport.install())


def test_addresses_are_translated() -> None:
    addresses = "redis://u:p@h:1/0", "rediss://h", "sentinel://a:1;sentinel://b:2"
    expected = "hothouse://u:p@h:1/0", "hothouses://h", "hothouse-sentinel://a:1;hothouse-sentinel://b:2"
    assert tuple(map(hothouse_transport.url, addresses)) == expected


def test_health_tells_a_standstill_from_silence_and_from_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    health = Health()
    now[0] += 1000
    assert health.stale(15) is None, "nothing consumes yet"
    health.touch()
    assert health.stale(15) is None
    now[0] += 16
    assert "stands still" in str(health.stale(15))
    health.touch()
    health.asked(1)
    now[0] += 16
    health.touch()
    health.asked(1)
    assert "not answered" in str(health.stale(15))
    health.answered(1)
    assert health.stale(15) is None


def test_a_consumer_keeps_health_up_to_date(connect: Callable[..., Any]) -> None:
    connection = connect()
    module.health._ticked = None
    _, got = consume(connection, ["one"])
    put(connection, "one", 1)
    drain(connection, lambda: got)
    assert module.health._ticked is not None
    connection.release()
    assert module.health._asked == {}
