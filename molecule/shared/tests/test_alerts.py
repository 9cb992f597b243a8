"""The alerts: each kind of trouble, made on the running stack, is mailed to whoever is on call, and so is its end.

Causes are real but for three limits that are moved instead, by a run over the inventory: the disk of the machine that
runs the hosts cannot be filled, the clock belongs to its kernel, and a certificate is made for a year. That nothing
sets a clock any more, that rules fail, that no mail leaves and what takes several hosts is left to
tests/unit/test_alerts.py.
"""

from __future__ import annotations

import base64
import email
import email.policy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import REPOSITORY, Stack
from testinfra.host import Host

pytestmark = pytest.mark.scenarios("local")

MAILDIR = "/var/lib/hothouse-mail/Maildir/new"
SENDER = "celery-worker@email_senders-1.service"
# Limits that trouble of a few seconds exceeds; the first three hold of every host.
LOW_LIMITS = {
    "monitor_disk_percent": 0,
    "monitor_clock_skew_seconds": -1,
    "monitor_certificate_days": 5000,
    "monitor_backlog_messages": 20,
    "monitor_backlog_seconds": 3,
    "monitor_unacked_seconds": 3,
    "monitor_beat_late_seconds": 3,
    "monitor_reply_queues": 3,
    "monitor_runtime_seconds": {"campaigns.tasks.send_batch": 1},
}
Trouble = Callable[[Stack], AbstractContextManager[None]]


@dataclass
class Mails:
    """What has arrived for whoever is on call since the tests of this file began."""

    host: Host
    since: float

    def read(self) -> list[tuple[str, str]]:
        """Subject and text of each, in the order of their arrival."""
        listing = self.host.check_output(
            f"find {MAILDIR} -type f -newermt @{self.since} -exec "
            'sh -c \'for file; do echo "$file $(base64 --wrap=0 "$file")"; done\' - {} +'
        )
        found = []
        for name, content in (line.split() for line in listing.splitlines()):
            message = email.message_from_bytes(base64.b64decode(content), policy=email.policy.default)
            # SECONDS.MMICROSECONDSP…
            arrival = tuple(int(number) for number in re.findall(r"/(\d+)\.M(\d+)P", name)[0])
            if "oncall@example.com" in message["To"]:
                text = message.get_body(("plain",)).get_content()
                found.append((arrival, message["Subject"], text))
        return [(subject, text) for _, subject, text in sorted(found)]

    def fired(self, after: int = 0) -> set[str]:
        """Alerts that a mail said fire, all but the first mails only."""
        return {name for _, text in self.read()[after:] for name in re.findall(r"FIRING \w+ (\w+):", text)}

    def open(self) -> set[str]:
        """Alerts whose last mail does not say that all of them are resolved."""
        state = {}
        for subject, _ in self.read():
            status, name = re.findall(r"\[(firing|resolved)\] (\w+):", subject)[0]
            state[name] = status
        return {name for name, status in state.items() if status == "firing"}


def mailed(wait: Callable[..., Any], mails: Mails, after: int, expected: set[str]) -> None:
    """Waits until a mail after the first ones has told of each of these alerts."""
    missing = set(expected)

    def arrived() -> bool:
        missing.difference_update(mails.fired(after))
        return not missing

    try:
        wait(arrived, "the mails about the trouble", 60)
    except AssertionError as error:
        raise AssertionError(f"no mail about {', '.join(sorted(missing))}") from error


@pytest.fixture(scope="module")
def mails(stack: Stack) -> Mails:
    host = stack.first("mail")
    return Mails(host, float(host.check_output("date +%s.%N")))


@pytest.fixture(scope="module")
def low_limits(stack: Stack) -> Iterator[Callable[[], None]]:
    """Moves the limits, and moves them back when it is called, at the latest after the last test."""
    moved = True

    def restore() -> None:
        nonlocal moved
        if moved:
            moved = False
            stack.playbook("playbooks/monitor.yml")

    stack.playbook("playbooks/monitor.yml", "--extra-vars", json.dumps(LOW_LIMITS))
    yield restore
    restore()


def python(stack: Stack, script: str, background: bool = False) -> None:
    """Runs Python with the application's settings on its host."""
    command = f"hothouse-run python -c '{script}'"
    if background:
        command = f"({command}) >/dev/null 2>&1 </dev/null &"
    stack.first("app").check_output(command)


def firing(stack: Stack) -> set[str]:
    """What Prometheus says, and what Alertmanager has heard of it so far."""
    alerts = stack.request("/prometheus/api/v1/alerts", stack.login).json()["data"]["alerts"]
    heard = stack.request("/alertmanager/api/v2/alerts", stack.login).json()
    found = [alert for alert in alerts if alert["state"] == "firing"] + heard
    return {alert["labels"]["alertname"] for alert in found}


def reachable(stack: Stack, wait: Callable[..., Any]) -> None:
    """For some seconds after it was reloaded Prometheus knows no Alertmanager, and what it tells nobody is late."""
    path = "/prometheus/api/v1/alertmanagers"
    wait(lambda: stack.request(path, stack.login).json()["data"]["activeAlertmanagers"], "Alertmanager", 30)


def rules(stack: Stack) -> list[dict[str, Any]]:
    """Recording rules and alerts, with their state."""
    groups = stack.request("/prometheus/api/v1/rules", stack.login).json()["data"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


@contextmanager
def stopped(stack: Stack, noun: str, unit: str) -> Iterator[None]:
    """Stopped by hand, and started by hand, which sets the counter of restarts to 0."""
    stack.first(noun).check_output(f"systemctl stop {unit}")
    try:
        yield
    finally:
        stack.first(noun).check_output(f"systemctl start {unit}")


@contextmanager
def backlog(stack: Stack) -> Iterator[None]:
    """Tasks come to a queue that nobody consumes, 30 at first and then one after the other."""
    with stopped(stack, "worker", SENDER):
        python(
            stack,
            "import time; from hothouse_celery import app\n"
            "for number in range(120):\n"
            '    app.send_task("hothouse.ping", queue="email_senders", ignore_result=True)\n'
            "    time.sleep(0 if number < 30 else 0.3)",
            background=True,
        )
        yield


@contextmanager
def orphaned_replies(stack: Stack) -> Iterator[None]:
    names = [f"lost{number}" for number in range(5)]
    stack.redis("SADD", "q:_kombu.binding.reply.celery.pidbox", *names)
    try:
        yield
    finally:
        stack.redis("SREM", "q:_kombu.binding.reply.celery.pidbox", *names)


@contextmanager
def refused_command(stack: Stack) -> Iterator[None]:
    assert "NOPERM" in stack.redis("FLUSHALL", user="worker")
    stack.redis("ACL", "LOG", "RESET")
    yield


@contextmanager
def little_memory(stack: Stack) -> Iterator[None]:
    limit = stack.redis("CONFIG", "GET", "maxmemory").split()[1]
    found = re.search(r"^used_memory:(\d+)", stack.redis("INFO", "memory"), re.MULTILINE)
    assert found
    stack.redis("CONFIG", "SET", "maxmemory", str(int(found[1]) * 5 // 4))
    try:
        yield
    finally:
        stack.redis("CONFIG", "SET", "maxmemory", limit)


@contextmanager
def unwritable_disk(stack: Stack) -> Iterator[None]:
    """The append-only file cannot be rewritten; what is open is still appended to."""
    folder = "/var/lib/redis/appendonlydir"
    mode = stack.first("redis").check_output(f"stat --format=%a {folder}")
    stack.first("redis").check_output(f"chmod 500 {folder}")
    try:
        stack.redis("BGREWRITEAOF")
        assert "aof_last_bgrewrite_status:err" in stack.redis("INFO", "persistence")
        yield
    finally:
        stack.first("redis").check_output(f"chmod {mode} {folder}")
        stack.redis("BGREWRITEAOF")


@contextmanager
def unexpected_worker(stack: Stack) -> Iterator[None]:
    """A replica too many, which is killed again and again."""
    host, unit = stack.first("worker"), "celery-worker@extra-1.service"
    file = "/etc/hothouse/worker-extra-1.env"
    host.check_output(f"cp /etc/hothouse/worker-default-1.env {file}")
    try:
        host.check_output(f"systemctl start {unit}")
        yield
    finally:
        host.check_output(
            f"systemctl stop {unit}; rm {file}; systemctl reset-failed {unit} 2>/dev/null || true"
        )


@contextmanager
def open_door(stack: Stack) -> Iterator[None]:
    """nginx asks nobody for a login and does not lead to Flower."""
    host = stack.first("nginx")
    host.check_output("cp --preserve /etc/nginx/nginx.conf /etc/nginx/nginx.conf.kept")
    try:
        host.check_output(
            "sed --in-place 's/auth_basic .*;/auth_basic off;/; s/server .*:5555;/server 127.0.0.1:1;/' "
            "/etc/nginx/nginx.conf && systemctl reload nginx"
        )
        yield
    finally:
        host.check_output("mv /etc/nginx/nginx.conf.kept /etc/nginx/nginx.conf && systemctl reload nginx")


@contextmanager
def blind_exporter(stack: Stack) -> Iterator[None]:
    """The user of the exporter lacks a right that its script needs."""
    stack.redis("ACL", "SETUSER", "exporter", "-zrange")
    try:
        yield
    finally:
        stack.redis("ACL", "SETUSER", "exporter", "+zrange")
        stack.redis("ACL", "LOG", "RESET")


@contextmanager
def refused_configuration(stack: Stack) -> Iterator[None]:
    host, file = stack.first("monitor"), "/etc/prometheus/hothouse/alertmanager.yml"
    host.check_output(f"cp --preserve {file} {file}.kept && echo nonsense >>{file}")
    try:
        host.check_output("systemctl reload prometheus-alertmanager")
        yield
    finally:
        host.check_output(f"mv {file}.kept {file} && systemctl reload prometheus-alertmanager")


@contextmanager
def dead_letters(stack: Stack) -> Iterator[None]:
    stack.redis("LPUSH", "q:dead-letter", "{}")
    try:
        yield
    finally:
        stack.redis("DEL", "q:dead-letter")


@contextmanager
def unknown_task(stack: Stack) -> Iterator[None]:
    stack.redis("LPUSH", "q:unknown-task", "{}")
    stack.redis("HSET", "q:unknown-task.names", "campaigns.tasks.new", "1")
    try:
        yield
    finally:
        stack.redis("DEL", "q:unknown-task", "q:unknown-task.names")


@contextmanager
def ambiguous_recipients(stack: Stack) -> Iterator[None]:
    stack.redis("ZADD", "app:campaigns:ambiguous", "1", "test/1")
    try:
        yield
    finally:
        stack.redis("ZREM", "app:campaigns:ambiguous", "test/1")


@contextmanager
def another_scheduler(stack: Stack) -> Iterator[None]:
    """One whose clock is ahead, so that it does not expire."""
    stack.redis("ZADD", "redbeat:schedulers", "4102444800", "elsewhere")
    try:
        yield
    finally:
        stack.redis("ZREM", "redbeat:schedulers", "elsewhere")


@contextmanager
def failed_renewal(stack: Stack) -> Iterator[None]:
    """What nginx-acme records when the CA gives nothing."""
    host, file = stack.first("nginx"), "/var/lib/prometheus/node-exporter/acme.prom"
    host.check_output(f"echo hothouse_acme_renewal_failed 1 >{file}")
    try:
        yield
    finally:
        host.check_output(f"rm {file}")


@contextmanager
def neglected_host(stack: Stack) -> Iterator[None]:
    """What hothouse-upkeep.service records, which no local host does, when nobody did what it asks for."""
    host = stack.first("app")
    host.check_output(
        "printf '%s 1\\n' 'hothouse_restart_needed{name=\"nginx.service\"}' hothouse_reboot_needed_since_seconds "
        "hothouse_security_updates_timestamp_seconds | /opt/hothouse/lib/hothouse_textfile.py upkeep"
    )
    try:
        yield
    finally:
        host.check_output("rm /var/lib/prometheus/node-exporter/upkeep.prom")


@contextmanager
def half_deployed(stack: Stack) -> Iterator[None]:
    """A second release in service, and ours since a time at which no service has started yet."""
    host, file = stack.first("app"), "/var/lib/prometheus/node-exporter/release.prom"
    host.check_output(f"cp --preserve {file} {file}.kept")
    try:
        host.check_output(
            'sed --in-place --expression \'/^hothouse_release_info/ {p; s/release="[^"]*"/release="other"/}\' '
            f"--expression '/^hothouse_release_moved_seconds/ s/ .*/ 4102444800/' {file}"
        )
        yield
    finally:
        host.check_output(f"mv {file}.kept {file}")


@contextmanager
def without_redis(stack: Stack) -> Iterator[None]:
    """What lost its connection begins anew afterwards, and so does the counter of restarts."""
    try:
        with stopped(stack, "redis", "redis-server.service"):
            yield
    finally:
        stack.first("worker").check_output("systemctl restart 'celery-worker@*' celery-beat")


# While the limits are low, and while they are what they are.
LIMITED: dict[str, tuple[list[Trouble], set[str]]] = {
    "a host": (
        [lambda stack: stopped(stack, "monitor", "prometheus-node-exporter.service"), another_scheduler],
        {"HostDown", "TwoSchedulers"},
    ),
    "queues and Redis": (
        [
            lambda stack: stopped(stack, "beat", "celery-beat.service"),
            backlog,
            orphaned_replies,
            refused_command,
            little_memory,
            unwritable_disk,
            dead_letters,
            unknown_task,
            ambiguous_recipients,
            half_deployed,
            neglected_host,
        ],
        {
            "WorkersMissing", "QueueWithoutConsumer", "QueueGrowing", "QueueLong", "QueueOld", "BeatDown", "BeatLate",
            "ReplyQueuesOrphaned", "DeadLetters", "UnknownTasks", "AppGaugeHigh", "RedisAccessDenied",
            "RedisMemoryHigh", "RedisPersistenceFailing", "ReleasesDiffer", "ServiceOutdated", "RebootNeeded",
            "RestartNeeded", "SecurityUpdatesFailing",
        },
    ),
}  # fmt: skip
UNLIMITED: dict[str, tuple[list[Trouble], set[str]]] = {
    "the door and the monitoring": (
        [
            open_door,
            blind_exporter,
            refused_configuration,
            failed_renewal,
            lambda stack: stopped(stack, "nginx", "prometheus-nginx-exporter.service"),
            lambda stack: stopped(stack, "nginx", "hothouse-firewall.service"),
        ],
        {"DoorOpen", "PublicUrlFailing", "MetricsMissing", "MonitoringBroken", "ExporterDown"}
        | {"CertificateRenewalFailing", "FirewallDown"},
    ),
    "services": (
        [
            without_redis,
            lambda stack: stopped(stack, "nginx", "nginx.service"),
            lambda stack: stopped(stack, "flower", "celery-flower.service"),
        ],
        {"RedisDown", "NginxDown", "FlowerDown"},
    ),
}
# What takes more than one host.
SEVERAL_HOSTS = {
    "HostCertificateExpiring", "RedisFailedOver", "RedisNoPrimary", "RedisNoReplica", "RedisReplicaMissing",
    "RedisUnreachable", "SentinelMissing", "SentinelWithoutQuorum",
}  # fmt: skip
# Made where a certificate comes from an ACME server, a service hung, a key has another type, a task is unknown, hosts
# talk to each other, or security updates install themselves.
SOMETIMES = {
    "haproxy_backend_active_servers", "hothouse_acme_expiry_timestamp_seconds", "hothouse_acme_renewal_failed",
    "hothouse_certificate_expiry_timestamp_seconds", "hothouse_hung_service", "hothouse_redis_unreadable",
    "hothouse_reboot_needed_since_seconds", "hothouse_redis_unknown_task", "hothouse_restart_needed",
    "hothouse_security_updates_timestamp_seconds", "hothouse_unknown_task",
}  # fmt: skip
# Their mails hold back others, or are held back.
IN_THE_WAY = {"HostDown", "NginxDown", "FlowerDown", "DoorOpen", "PublicUrlFailing"}


def make(
    troubles: list[Trouble], expected: set[str], stack: Stack, wait: Callable[..., Any], mails: Mails
) -> None:
    """All of it at once, until each alert is mailed."""
    before = len(mails.read())
    with ExitStack() as made:
        for trouble in troubles:
            made.enter_context(trouble(stack))
        mailed(wait, mails, before, expected)
    over = expected & IN_THE_WAY
    wait(lambda: not over & mails.open(), f"the end of {sorted(over)}", 90)


def test_prometheus_evaluates_every_rule_and_nothing_is_wrong(
    stack: Stack, wait: Callable[..., Any], mails: Mails
) -> None:
    wait(lambda: not firing(stack), "a stack without trouble", 90)
    assert len(rules(stack)) > 50
    assert [rule for rule in rules(stack) if rule["health"] != "ok"] == []


def test_every_metric_that_a_rule_asks_for_exists(stack: Stack) -> None:
    known = set(stack.request("/prometheus/api/v1/label/__name__/values", stack.login).json()["data"])
    pattern = r"\b(?:node|redis|nginx|haproxy|probe|flower|prometheus|alertmanager|hothouse)[_:][\w:]+"
    asked = {name for rule in rules(stack) for name in re.findall(pattern, rule["query"])}
    assert len(asked) > 40
    assert asked - known - SOMETIMES == set()


def restarts(worker: Host) -> int:
    """How often systemd has started the worker that is too many, and it runs."""
    shown = worker.check_output(
        "systemctl show --property=NRestarts,ActiveState celery-worker@extra-1.service"
    )
    values = dict(line.split("=") for line in shown.splitlines())
    return int(values["NRestarts"]) if values["ActiveState"] == "active" else -1


def create_campaign(stack: Stack) -> str:
    """A campaign of one mail; its id."""
    created = stack.first("app").check_output(
        "printf 'email,name\\nreader@alerts.example.com,Reader\\n' | hothouse-run campaigns create --name alerts "
        "--template welcome --sender 'News <news@example.com>' --recipients -"
    )
    return str(created.split()[-1])


@pytest.mark.parametrize("batch", LIMITED)
def test_trouble_is_mailed(
    stack: Stack, wait: Callable[..., Any], mails: Mails, low_limits: Callable[[], None], batch: str
) -> None:
    reachable(stack, wait)
    make(*LIMITED[batch], stack, wait, mails)


def test_a_task_that_takes_longer_than_it_may_is_mailed(
    stack: Stack, wait: Callable[..., Any], mails: Mails, low_limits: Callable[[], None]
) -> None:
    """The mail server says nothing for a while."""
    before = len(mails.read())

    def held() -> float:
        oldest = stack.redis("ZRANGE", "q:unacked_index", "0", "0", "WITHSCORES").split()
        return int(stack.redis("TIME").split()[0]) - float(oldest[1]) if oldest else 0

    stack.first("mail").check_output("systemctl kill --signal=STOP mail.service")
    try:
        create_campaign(stack)
        wait(lambda: "send_batch" in stack.redis("HVALS", "q:unacked"), "the batch at the worker", 30)
        wait(lambda: held() > 8, "a batch that takes long", 30)
    finally:
        stack.first("mail").check_output("systemctl kill --signal=CONT mail.service")
    mailed(wait, mails, before, {"TaskSlow"})


def test_a_worker_that_hangs_and_one_too_many_are_mailed(
    stack: Stack, wait: Callable[..., Any], mails: Mails, low_limits: Callable[[], None]
) -> None:
    """The one hangs with a task that it has begun, until the watchdog ends it."""
    worker, before = stack.first("worker"), len(mails.read())
    expected = {"WorkerUnexpected", "ServiceRestarting", "WorkerUnseen", "UnackedStuck"}
    with unexpected_worker(stack):
        # The mail server says nothing until the worker is frozen, so the task is still running then.
        stack.first("mail").check_output("systemctl kill --signal=STOP mail.service")
        try:
            create_campaign(stack)
            wait(lambda: "send_batch" in stack.redis("HVALS", "q:unacked"), "the batch at the worker", 30)
            worker.check_output(f"systemctl kill --signal=STOP {SENDER}")
        finally:
            stack.first("mail").check_output("systemctl kill --signal=CONT mail.service")
        try:
            stack.first("flower").check_output("systemctl restart celery-flower")
            for number in range(1, 4):
                worker.check_output(
                    "systemctl kill --kill-whom=all --signal=KILL celery-worker@extra-1.service"
                )
                wait(lambda count=number: restarts(worker) == count, "the next start of the worker", 30)
            mailed(wait, mails, before, expected)
            mailed(wait, mails, before, {"ServiceHung"})
        finally:
            worker.check_output(f"systemctl kill --signal=CONT {SENDER}")


def test_limits_of_the_inventory_are_those_of_the_alerts(
    stack: Stack, wait: Callable[..., Any], mails: Mails, low_limits: Callable[[], None]
) -> None:
    """A full disk, a wrong clock and an old certificate, which cannot be made here; afterwards the limits are back."""
    mailed(wait, mails, 0, {"DiskFull", "ClockSkew", "CertificateExpiring"})
    low_limits()
    reachable(stack, wait)


@pytest.mark.parametrize("batch", UNLIMITED)
def test_trouble_within_the_limits_is_mailed(
    stack: Stack, wait: Callable[..., Any], mails: Mails, batch: str
) -> None:
    make(*UNLIMITED[batch], stack, wait, mails)


def test_a_lost_schedule_is_mailed(stack: Stack, wait: Callable[..., Any], mails: Mails) -> None:
    """Beat writes it when it starts, so nothing is late while it is gone."""
    before = len(mails.read())
    with stopped(stack, "beat", "celery-beat.service"):
        stack.redis("DEL", "redbeat::schedule")
        mailed(wait, mails, before, {"BeatScheduleMissing"})


def test_tasks_that_fail_are_mailed(stack: Stack, wait: Callable[..., Any], mails: Mails) -> None:
    """2 of 62 are too many, 22 of 82 are far too many."""
    campaign = create_campaign(stack)
    wait(
        lambda: "finished" in stack.first("app").check_output(f"hothouse-run campaigns show {campaign}"),
        "it",
        60,
    )
    for good, bad, alert in ((60, 2, "TaskFailures"), (0, 20, "TaskSuccessLow")):
        before = len(mails.read())
        python(
            stack,
            "from hothouse_celery import app\n"
            f'for arguments in [("{campaign}", 0)] * {good} + [()] * {bad}:\n'
            '    app.send_task("campaigns.tasks.send_batch", arguments)',
        )
        mailed(wait, mails, before, {alert})


def test_every_alert_has_been_mailed_and_is_resolved(
    stack: Stack, wait: Callable[..., Any], mails: Mails
) -> None:
    text = (REPOSITORY / "roles/monitor/templates/alerts.yml.j2").read_text()
    assert mails.fired() >= set(re.findall(r"- alert: (\w+)", text)) - SEVERAL_HOSTS
    wait(lambda: not firing(stack), "a stack without trouble", 90)
    wait(lambda: not mails.open(), "a mail that says so of each", 90)


def test_a_mail_says_what_is_wrong_how_bad_it_is_and_where_to_read_on(mails: Mails) -> None:
    texts = [text for subject, text in mails.read() if subject.startswith("[firing] RedisMemoryHigh:")]
    assert re.search(
        r"^FIRING warning RedisMemoryHigh: Redis on local1 fills \d\d % of its memory\n"
        r"It may be 70.* %;.*\n"
        r"Runbook: https://localhost/runbook.html#redismemoryhigh\n",
        texts[0],
        re.MULTILINE,
    )


HOOK = """
import http.server, sys
class Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        print(self.path, body, flush=True)
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", 8099), Hook).serve_forever()
"""


def test_a_webhook_gets_what_the_mails_say(stack: Stack, wait: Callable[..., Any]) -> None:
    host = stack.first("monitor")
    script = base64.b64encode(HOOK.encode()).decode()
    host.check_output(
        "systemd-run --quiet --collect --unit=webhook-test "
        f"python3 -c 'import base64; exec(base64.b64decode(\"{script}\"))'"
    )

    def told(status: str) -> bool:
        lines = host.check_output("journalctl --unit=webhook-test --output=cat --no-pager").splitlines()
        bodies = [json.loads(line.partition(" ")[2]) for line in lines if line.startswith("/hook-")]
        return any(
            alert["labels"]["alertname"] == "BeatDown" and alert["status"] == status
            for body in bodies
            for alert in body["alerts"]
        )

    try:
        urls = {"monitor_webhook_urls": ["http://127.0.0.1:8099/hook-of-a-secret-name"]}
        done = stack.playbook("playbooks/monitor.yml", "--diff", "--extra-vars", json.dumps(urls))
        assert "hook-of-a-secret-name" not in done.stdout
        reachable(stack, wait)
        with stopped(stack, "beat", "celery-beat.service"):
            wait(lambda: told("firing"), "the alert at the webhook", 60)
        wait(lambda: told("resolved"), "its end at the webhook", 60)
    finally:
        host.check_output("systemctl stop webhook-test.service")
        stack.playbook("playbooks/monitor.yml")
