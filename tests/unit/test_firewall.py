"""What the firewall lets in, whom it would lock out, and how far clocks are apart, worked out without a host."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from conftest import BUNDLE, Play, load_plugin

filters = load_plugin("filter/hothouse")
action = load_plugin("action/hothouse_firewall")
ask = load_plugin("action/hothouse_ask")
firewall = load_plugin("modules/hothouse_firewall")

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


@pytest.mark.parametrize("text", ["Welcome to this host", "192.0.2.7 50000"])
def test_a_greeting_is_not_taken_for_a_connection(text: str) -> None:
    assert action.parse_session(text) is None


def way(transport: str, said: str) -> Any:
    """The action with a connection of this kind, over which the host says this."""
    found = action.ActionModule.__new__(action.ActionModule)
    found._connection = SimpleNamespace(transport=transport)
    found._task = SimpleNamespace(check_mode=False, diff=False)
    found._low_level_execute_command = lambda *_, **__: {"stdout_lines": [said]}
    found.validate_argument_spec = lambda _: (None, {"accepts": []})
    return found


def test_on_the_machine_itself_the_login_of_who_deploys_is_no_connection_to_it() -> None:
    assert way("local", "192.0.2.7 50000 10.0.0.1 22")._session() is None
    assert way("ssh", "192.0.2.7 50000 10.0.0.1 22")._session().port == 22


def test_rules_that_cannot_be_held_against_the_connection_are_not_applied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(action.ActionBase, "run", lambda *_: {})
    with pytest.raises(AnsibleActionFail, match=r"its SSH_CONNECTION is empty.* were not applied"):
        way("ssh", "").run(None, {"inventory_hostname": "host1"})


@pytest.mark.parametrize(
    ("nouns", "answers", "left"),
    [(["app"], ["redis ours"], True), (["app", "redis"], ["redis ours"], False), (["app"], [], False)],
)
def test_a_redis_that_is_to_go_but_runs_is_noticed(
    play: Callable[..., Play], nouns: list[str], answers: list[str], left: bool
) -> None:
    assert prepared(play, "__prepare_redis_is_left", 12, *answers, prepare_nouns=nouns) is left


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


# What they know is in $FAKE: `kernel` is the table that is loaded, `timer` the command of the timer. `stopping`, if it
# is there, is what happens before systemctl stops something.
STAND_INS = {
    "nft": """
        case $1 in
        --check) cat >/dev/null ;;
        --stateless) cat "$FAKE/kernel" ;;
        --file) sed -E '/^(delete )?table inet hothouse$/d' "$2" >"$FAKE/kernel" ;;
        esac
    """,
    "systemd-run": """
        [ ! -e "$FAKE/timer" ] || { echo "Unit hothouse-firewall-rollback.timer was already loaded." >&2; exit 1; }
        while [ "$1" != /usr/sbin/nft ]; do shift; done
        shift
        echo "nft $*" >"$FAKE/timer"
    """,
    "systemctl": """
        if [ "$1" = show ]; then
            [ -e "$FAKE/timer" ] && echo loaded || echo not-found
            echo
            echo not-found
            exit
        fi
        [ ! -e "$FAKE/stopping" ] || . "$FAKE/stopping"
        case $2 in *.timer) rm "$FAKE/timer" 2>/dev/null || exit 5 ;; *) exit 5 ;; esac
    """,
}


class Host:
    """A host whose kernel and service manager are files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "firewall.nft"
        self.path.write_text("old")
        self.load("old\n")

    def load(self, text: str) -> None:
        (self.folder / "kernel").write_text(text)

    @property
    def loaded(self) -> str:
        return (self.folder / "kernel").read_text()

    @property
    def is_timed(self) -> bool:
        return (self.folder / "timer").exists()

    def when_stopping(self, script: str) -> None:
        (self.folder / "stopping").write_text(script)

    def elapse(self) -> None:
        """The timer is due."""
        subprocess.run(["sh", "-e", self.folder / "timer"], check=True)
        (self.folder / "timer").unlink()

    def phase(self, phase: str, rules: str) -> None:
        firewall.run(
            {"phase": phase, "rules": rules, "path": str(self.path), "rollback_seconds": 60}, check_mode=False
        )


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setattr(firewall, "STATE", tmp_path / "state")
    return Host(tmp_path)


def test_rules_that_were_reached_are_kept(host: Host) -> None:
    host.phase("try", "new\n")
    assert host.loaded == "new\n" and host.path.read_text() == "old" and host.is_timed
    host.phase("confirm", "new\n")
    assert host.loaded == host.path.read_text() == "new\n" and not host.is_timed
    assert host.path.with_name("firewall.nft.listing").read_text() == "new\n"
    host.phase("try", "newer\n")
    host.elapse()
    assert host.loaded == "new\n"


@pytest.mark.parametrize("rules", ["locked out\n", "other\n"])
def test_a_second_run_does_not_take_the_first_ones_way_back(host: Host, rules: str) -> None:
    host.phase("try", "locked out\n")
    with pytest.raises(
        firewall.FirewallError, match=r"another run tries rules right now; wait (60|59) seconds"
    ):
        host.phase("try", rules)
    assert host.loaded == "locked out\n"
    host.elapse()
    assert host.loaded == "old\n" and host.path.read_text() == "old"
    host.phase("try", rules)


def test_rules_of_another_run_keep_their_timer(host: Host) -> None:
    host.phase("try", "new\n")
    with pytest.raises(firewall.FirewallError, match="not being tried any more"):
        host.phase("confirm", "other\n")
    assert host.is_timed
    host.elapse()
    assert host.loaded == "old\n" and host.path.read_text() == "old"


def test_rules_that_something_else_replaced_keep_their_timer(host: Host) -> None:
    host.phase("try", "new\n")
    host.load("changed by hand\n")
    with pytest.raises(firewall.FirewallError, match="other rules are loaded"):
        host.phase("confirm", "new\n")
    assert host.is_timed and host.path.read_text() == "old"


def test_a_connection_after_the_timer_is_too_late(host: Host) -> None:
    with pytest.raises(firewall.FirewallError, match="too late"):
        host.phase("confirm", "new\n")  # the host was started anew
    host.phase("try", "new\n")
    host.elapse()
    with pytest.raises(firewall.FirewallError, match="too late"):
        host.phase("confirm", "new\n")
    assert host.loaded == "old\n" and host.path.read_text() == "old"


@pytest.mark.parametrize(
    "stopping",
    [
        'rm -f "$FAKE/timer"',  # it was due just now, and its command is not done yet
        'echo changed >"$FAKE/kernel"',
        "exit 1",
    ],
)
def test_whatever_happens_after_the_comparison_the_old_rules_come_back(host: Host, stopping: str) -> None:
    host.phase("try", "new\n")
    host.when_stopping(stopping)
    with pytest.raises(firewall.FirewallError, match="the old rules are back"):
        host.phase("confirm", "new\n")
    assert host.loaded == "old\n" and host.path.read_text() == "old"


def test_rules_that_cannot_be_kept_on_disk_are_not_kept_in_the_kernel(host: Host) -> None:
    host.phase("try", "new\n")
    host.path = host.folder / "missing" / "firewall.nft"
    with pytest.raises(firewall.FirewallError, match="the old rules are back"):
        host.phase("confirm", "new\n")
    assert host.loaded == "old\n" and not host.is_timed


@pytest.mark.parametrize(
    ("release", "leap_seconds"),
    [(12, "leapsectz right/UTC"), (13, "leapseclist /usr/share/zoneinfo/leap-seconds.list")],
)
def test_chrony_learns_of_leap_seconds_from_what_the_release_has(
    play: Callable[..., Play], release: int, leap_seconds: str
) -> None:
    text = prepared(
        play, f"lookup('ansible.builtin.template', '{PREPARE}/templates/chrony.conf.j2')", release
    )
    assert [line for line in text.splitlines() if line.startswith("leap")] == [leap_seconds]


@pytest.mark.parametrize(
    ("nouns", "answers", "stopped"),
    [
        (["redis", "app"], ["haproxy ours"], True),
        (["redis", "app"], [], False),  # there is none, or one of somebody else's
        (["app", "haproxy"], ["haproxy ours"], False),
    ],
)
def test_haproxy_leaves_its_port_before_redis_takes_it(
    play: Callable[..., Play], nouns: list[str], answers: list[str], stopped: bool
) -> None:
    units = prepared(play, "__prepare_units", 12, *answers, prepare_nouns=nouns)
    found = [unit for unit in units if unit["name"] == "haproxy.service"]
    assert found == ([{"name": "haproxy.service", "enabled": False, "state": "stopped"}] if stopped else [])


PREPARE = BUNDLE / "roles" / "prepare"


def prepared(
    play: Callable[..., Play], expression: str, release: int, *answers: str, **variables: Any
) -> Any:
    """What the role makes of a host that gave these answers."""
    asked = {"stdout_lines": [f"os debian {release}", *answers]}
    tasks = [
        {"ansible.builtin.include_vars": f"{PREPARE}/{folder}/main.yml"} for folder in ("defaults", "vars")
    ]
    show = {"ansible.builtin.debug": {"msg": f"{{{{ {expression} }}}}"}}
    run = play([*tasks, {**show, "vars": {"__prepare_host": asked, "prepare_nouns": [], **variables}}])
    assert run.code == 0, run.output
    return run.results[-1]["msg"]
