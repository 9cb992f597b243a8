"""A campaign: every recipient gets one mail, whatever the mail server does meanwhile."""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import REPOSITORY, Stack
from testinfra.host import Host

# On several hosts the scenario faults sends campaigns.
pytestmark = pytest.mark.scenarios("local")

MAILDIR = "/var/lib/hothouse-mail/Maildir/new"


def fresh_domain(name: str) -> str:
    """A mail domain of this run alone, so that a second run on the same hosts counts its own mails."""
    return f"{name}-{uuid.uuid4().hex[:8]}.example.com"


def create(host: Host, name: str, recipients: list[str]) -> str:
    """Create a campaign as an operator would, the list on standard input; its id."""
    rows = "\\n".join(["email,name", *(f"{address},Reader" for address in recipients)])
    done = host.run(
        f"printf '{rows}\\n' | hothouse-run campaigns create --name {name} --template welcome "
        "--sender 'News <news@example.com>' --recipients -"
    )
    assert done.rc == 0, done.stderr
    return done.stdout.split()[-1]


def show(host: Host, campaign: str) -> dict[str, Any]:
    return json.loads(host.check_output(f"hothouse-run campaigns show --json {campaign}"))


def delivered(stack: Stack, domain: str) -> list[str]:
    """Addresses of this domain that mail arrived for, one per message; the server notes the envelope in it."""
    text = stack.first("mail").run(f"grep -rhi '^X-RcptTo:' {MAILDIR}").stdout
    return sorted(re.findall(rf"[\w.+-]+@{re.escape(domain)}", text))


@pytest.fixture
def stopped_mail_server(stack: Stack) -> Iterator[Host]:
    host = stack.first("mail")
    host.check_output("systemctl stop mail.service")
    yield host
    host.check_output("systemctl start mail.service")


def test_every_recipient_gets_exactly_one_mail(stack: Stack, wait: Callable[..., Any]) -> None:
    domain = fresh_domain("once")
    recipients = sorted(f"reader{number}@{domain}" for number in range(250))
    host = stack.first("app")
    campaign = create(host, "once", recipients)
    report = wait(
        lambda: (found := show(host, campaign)) and found["state"] == "finished" and found, "the end", 120
    )
    assert report["counts"]["sent"] == len(recipients)
    assert delivered(stack, domain) == recipients
    replies = json.loads(
        host.check_output(f"hothouse-run campaigns show --json --state sent --limit 9 {campaign}")
    )
    assert [record["reply"][:3] for record in replies["sent"]] == ["250"] * 9


def test_a_campaign_waits_for_an_unreachable_mail_server_and_loses_nothing(
    stack: Stack, wait: Callable[..., Any], stopped_mail_server: Host
) -> None:
    domain = fresh_domain("patient")
    recipients = sorted(f"reader{number}@{domain}" for number in range(20))
    host = stack.first("app")
    campaign = create(host, "patient", recipients)
    report = wait(lambda: (found := show(host, campaign)) and found["waiting_for"] and found, "the wait", 60)
    assert report["counts"]["sent"] == 0
    stopped_mail_server.check_output("systemctl start mail.service")
    report = wait(
        lambda: (found := show(host, campaign)) and found["state"] == "finished" and found, "the end", 120
    )
    assert report["counts"] | {"sent": 0} == dict.fromkeys(report["counts"], 0)
    assert delivered(stack, domain) == recipients


def test_a_worker_killed_in_the_middle_costs_no_mail_and_doubles_none(
    stack: Stack, wait: Callable[..., Any]
) -> None:
    """Killed while it sends: at worst a mail is listed as ambiguous, none is sent twice, none is missing."""
    domain = fresh_domain("killed")
    recipients = sorted(f"reader{number}@{domain}" for number in range(600))
    host = stack.first("app")
    campaign = create(host, "killed", recipients)
    wait(lambda: len(delivered(stack, domain)) > 20, "the first mails", 60)
    for name in stack.group("worker"):
        stack.host(name).run(
            "systemctl kill --kill-whom=all --signal=KILL 'celery-worker@email_senders-*.service'"
        )
    wait(lambda: settled(show(host, campaign), len(recipients)), "the end", 240)
    arrived = delivered(stack, domain)
    assert len(arrived) == len(set(arrived))
    report = show(host, campaign)
    assert report["counts"]["sent"] + report["counts"].get("ambiguous", 0) == len(recipients)
    assert len(arrived) >= report["counts"]["sent"]
    # Nobody sends again what is in doubt; an operator decides.
    done = host.run(f"hothouse-run campaigns resolve {campaign} --sent")
    assert (done.rc, done.stdout.split(", ")[1]) == (0, "0 still ambiguous\n"), done.stderr
    assert show(host, campaign)["counts"]["sent"] == len(recipients)
    # The counters of restarts, which other tests read, begin anew with a restart by hand.
    for name in stack.group("worker"):
        stack.host(name).check_output("systemctl restart 'celery-worker@email_senders-*.service'")


def settled(report: dict[str, Any], size: int) -> bool:
    return report["counts"]["sent"] + report["counts"].get("ambiguous", 0) == size


def test_bad_input_is_refused_with_line_and_column(stack: Stack) -> None:
    done = stack.first("app").run(
        "printf 'email,name\\nfine@example.com,A\\nnot-an-address,B\\n' | hothouse-run campaigns create --name bad "
        "--template welcome --sender news@example.com --recipients -"
    )
    assert done.rc != 0
    assert "line 3" in done.stderr and "column" in done.stderr


@pytest.mark.scenarios("prod")
def test_headers_read_back_as_given_on_every_debian(stack: Stack) -> None:
    """Thousands of subjects and names, on the Python of each worker's host: 3 seconds a host."""
    script = base64.b64encode((REPOSITORY / "app/tests/mailreader.py").read_bytes()).decode()
    command = f"echo {script} | base64 -d | hothouse-run python -"
    said = [stack.host(name).check_output(command).split(" ", 1) for name in stack.group("worker")]
    versions, tried = zip(*said, strict=True)
    assert len({version.rpartition(".")[0] for version in versions}) > 1, "nothing to compare"
    assert re.match(r"5\d{3} subjects and 5\d{3} names in 16 scripts", tried[0])
    assert len(set(tried)) == 1, "each Debian writes the same"
