"""What the firewall lets in, whom it would lock out, and how far clocks are apart, worked out without a host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Play, load_plugin

filters = load_plugin("filter/hothouse")
action = load_plugin("action/hothouse_firewall")
ask = load_plugin("action/hothouse_ask")

REDIS = {"name": "redis", "port": 6379, "clients": ["b", "c"], "client_addresses": ["10.0.0.2", "10.0.0.3"]}


def test_each_port_is_open_to_those_who_need_it_and_no_others() -> None:
    rules = filters.firewall_rules(
        [REDIS], 2222, ["192.0.2.0/24", "2001:db8::1"], [443], [{"port": "60000-60010", "protocol": "udp"}]
    )
    assert filters.nft_rules(rules) == [
        'ip saddr { 192.0.2.0/24 } tcp dport 2222 accept comment "ssh"',
        'ip6 saddr { 2001:db8::1 } tcp dport 2222 accept comment "ssh"',
        'tcp dport 443 accept comment "public"',
        'ip saddr { 10.0.0.2, 10.0.0.3 } tcp dport 6379 accept comment "redis"',
        'udp dport 60000-60010 accept comment "own"',
    ]


def test_a_network_swallows_what_is_in_it_because_nft_refuses_both() -> None:
    rules = filters.firewall_rules([], 22, ["10.1.2.3", "10.0.0.0/8", "10.1.2.3/16"], [], [])
    assert filters.nft_rules(rules) == ['ip saddr { 10.0.0.0/8 } tcp dport 22 accept comment "ssh"']


@pytest.mark.parametrize(
    ("connection", "addresses", "port", "accepted"),
    [
        ("192.0.2.7 50000 10.0.0.1 22", [], 22, True),
        ("192.0.2.7 50000 10.0.0.1 22", ["192.0.2.0/24"], 22, True),
        ("192.0.2.7 50000 10.0.0.1 22", ["192.0.2.1"], 22, False),
        ("192.0.2.7 50000 10.0.0.1 2222", ["192.0.2.0/24"], 22, False),
        ("192.0.2.7 50000 10.0.0.1 2222", ["192.0.2.0/24"], 2222, True),
        ("2001:db8::7 50000 2001:db8::1 22", ["192.0.2.0/24"], 22, False),
        ("fe80::7%eth0 50000 fe80::1%eth0 22", ["fe80::/10"], 22, True),
    ],
)
def test_the_connection_of_a_run_is_held_against_the_new_rules(
    connection: str, addresses: list[str], port: int, accepted: bool
) -> None:
    session = action.parse_session(connection)
    assert session.source == 50000
    # Its own port may be let in from elsewhere, and others from where it comes: neither helps.
    own = [{"port": 22, "protocol": "udp"}, {"port": "1-21"}]
    rules = filters.firewall_rules([REDIS], port, addresses, [80], own)
    assert action.is_accepted(session, rules) is accepted


def test_a_rule_of_the_users_own_may_be_what_lets_a_run_in() -> None:
    session = action.parse_session("192.0.2.7 50000 10.0.0.1 2022")
    rules = filters.firewall_rules([], 22, [], [], [{"port": "2000-2100", "from": ["192.0.2.7"]}])
    assert action.is_accepted(session, rules)


def test_what_is_no_connection_of_ssh_cannot_be_locked_out() -> None:
    assert action.parse_session("") is None


def test_the_time_that_a_command_and_the_connection_take_is_no_skew() -> None:
    # The connection takes 0.7 s, the command 5 s, the answer 0.1 s; the host's clock is 0.5 s ahead.
    clock = ask.bounds(100.0, 105.8, [101.2, 106.2])
    assert clock.least == pytest.approx(0.4) and clock.most == pytest.approx(1.2)
    assert clock.narrowed(ask.Bounds(0.45, 0.55)) == ask.Bounds(0.45, 0.55)
    # Set in between: the newer one counts.
    assert clock.narrowed(ask.Bounds(-0.1, 0.1)) == ask.Bounds(-0.1, 0.1)


@pytest.mark.parametrize(
    ("clocks", "said"),
    [
        ({"a": [-0.1, 0.1], "b": [1.7, 1.9]}, []),
        ({"a": [-1.6, -1.5], "b": [1.5, 1.6]}, ["a -1.6 s", "b +1.6 s"]),  # each is near the controller's
        ({"a": [2.1, 2.3]}, ["a +2.2 s"]),
        ({"a": [0.0, 3.0]}, []),  # may be right
        ({"a": [0.0, 0.1], "b": [60.0, 60.2], "c": [0.0, 0.1]}, ["a +0.1 s", "c +0.1 s", "b +60.1 s"]),
    ],
)
def test_clocks_that_are_certainly_too_far_apart_are_named(
    clocks: dict[str, list[float]], said: list[str]
) -> None:
    assert filters.clock_skew({name: {"clock": clock} for name, clock in clocks.items()}, 2.0) == said


TASKS = [
    {"hothouse_ask": {"command": "echo os debian; sleep 1; echo done"}, "register": "asked"},
    {"ansible.builtin.debug": {"msg": "{{ {inventory_hostname: asked} | clock_skew(2) }}"}},
]


@pytest.mark.parametrize("ahead", [0, 30, -3])
def test_a_clock_that_lies_is_found_by_asking_it(
    play: Callable[..., Play], tmp_path: Path, ahead: int
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "date").write_text(f'#!/bin/sh\nexec /usr/bin/date --date="{ahead} seconds" "$@"\n')
    (folder / "date").chmod(0o755)
    asked, compared = play(TASKS, PATH=f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin").results
    assert asked["stdout_lines"] == ["os debian", "done"] and not asked["changed"]
    least, most = asked["clock"]
    assert least - 0.01 <= ahead <= most + 0.01 and most - least < 1
    assert bool(compared["msg"]) is (ahead != 0)
