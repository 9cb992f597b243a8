"""Redis transports for kombu and Celery whose consumers lose nothing when they are killed.

import hothouse_transport

reason = hothouse_transport.install()
if reason is None:
    app.conf.broker_url = hothouse_transport.url("redis://…")   # hothouse://…
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from hothouse_transport.health import Health, health

__all__ = ["Health", "dead_letter", "health", "install", "url"]

SCHEMES = {"redis": "hothouse", "rediss": "hothouses", "sentinel": "hothouse-sentinel"}
CLASSES = {"hothouse": "Transport", "hothouses": "TLSTransport", "hothouse-sentinel": "SentinelTransport"}

# Versions whose private interface this was written for, from and below.
# Earlier redis-py does not say for which reason Redis refused something.
KNOWN = {"kombu": ((5, 7), (5, 8)), "redis": ((7, 2), (9,))}
# What of kombu.transport.redis is extended or called, and the names of the arguments.
INTERFACE = {
    "Channel": {
        "_brpop_start": ["self", "timeout"],
        "_brpop_read": ["self", "options"],
        "_connparams": ["self", "asynchronous"],
        "_create_client": ["self", "asynchronous"],
        "_disconnect_pools": ["self"],
        "_get_client": ["self"],
        "_maybe_update_queues_expire": ["self", "client", "queue"],
        "_on_connection_disconnect": ["self", "connection"],
        "_put": ["self", "queue", "message", "kwargs"],
        "_has_queue": ["self", "queue", "kwargs"],
        "_flush_brpop_reauth": ["self"],
        "basic_consume": ["self", "queue", "args", "kwargs"],
        "close": ["self"],
    },
    "SentinelChannel": {"_sentinel_managed_pool": ["self", "asynchronous"]},
    "QoS": {
        "append": ["self", "message", "delivery_tag"],
        "ack": ["self", "delivery_tag"],
        "reject": ["self", "delivery_tag", "requeue"],
        "restore_unacked": ["self", "client"],
        "restore_by_tag": ["self", "tag", "client", "leftmost"],
        "restore_visible": ["self", "start", "num", "interval"],
    },
    "MultiChannelPoller": {
        "_register_BRPOP": ["self", "channel"],
        "_update_brpop_polling": ["self"],
        "on_poll_start": ["self"],
        "on_readable": ["self", "fileno"],
        "maybe_refresh_binding_expiry": ["self"],
        "maybe_check_brpop_health": ["self"],
        "maybe_restore_messages": ["self"],
        "get": ["self", "callback", "timeout"],
    },
    "PublishBatch": {"flush": ["self"]},
    "Transport": {"register_with_event_loop": ["self", "connection", "loop"]},
}


def install(options: Mapping[str, Any] | None = None) -> str | None:
    """Make the schemes hothouse, hothouses and hothouse-sentinel known to kombu.

    `options` are the broker_transport_options, if they are known. Returns None, or why this transport cannot be used
    here, and then changes nothing; kombu's own transport goes on working.
    """
    reason = _unknown_version() or _unknown_interface() or _unsupported(options or {})
    if reason is None:
        from kombu.transport import TRANSPORT_ALIASES

        for scheme, name in CLASSES.items():
            TRANSPORT_ALIASES[scheme] = f"hothouse_transport.channel:{name}"
    return reason


def url(broker: str) -> str:
    """The same broker by this transport: redis, rediss and sentinel become hothouse, hothouses, hothouse-sentinel."""
    return re.sub(
        r"(^|;)(redis|rediss|sentinel)://", lambda match: f"{match[1]}{SCHEMES[match[2]]}://", broker
    )


def dead_letter(channel: Any, message: Any, reason: str, deliveries: int = 0, unknown: str = "") -> bool:
    """See `hothouse_transport.channel.dead_letter`."""
    from hothouse_transport.channel import dead_letter as move

    return move(channel, message, reason, deliveries, unknown)


def _unknown_version() -> str | None:
    for name, (first, beyond) in KNOWN.items():
        found = version(name)
        numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
        if not first <= numbers < beyond:
            known = f"{'.'.join(map(str, first))} up to {'.'.join(map(str, beyond))}"
            return f"{name} is {found}, and this transport knows versions from {known}"
    return None


def _unknown_interface() -> str | None:
    from kombu.transport import redis as stock
    from redis._parsers.base import PushNotificationsParser

    for name, methods in INTERFACE.items():
        for method, arguments in methods.items():
            function = getattr(getattr(stock, name, None), method, None)
            if function is None or list(inspect.signature(function).parameters) != arguments:
                return f"kombu's {name}.{method} is not as this transport knows it"
    if not hasattr(PushNotificationsParser, "set_invalidation_push_handler"):
        return "redis-py does not hand on messages of CLIENT TRACKING"
    return None


def _unsupported(options: Mapping[str, Any]) -> str | None:
    if list(options.get("priority_steps", [0])) != [0]:
        return "broker_transport_options asks for priorities (priority_steps), which this transport does not have"
    if not options.get("ack_emulation", True):
        return "broker_transport_options switches acknowledgements off (ack_emulation)"
    return None
