"""The command, against a real Redis."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import (
    DROP,
    MailServer,
    Redis,
    campaign_of,
    forget_settings,
    run_queue,
    run_until_finished,
    wait_until,
)

from campaigns import cli, store
from campaigns.store import STATES, Ledger
from campaigns.tasks import check_scheduled_campaigns, send_batch

LIST = "email,name\nada@example.com,Ada\ngrace@example.com,Grace\n"
WELCOME = ("--template", "welcome", "--recipients", "-")


def run(*args: str, stdin: str | bytes = LIST) -> Result:
    return CliRunner().invoke(cli.main, args, input=stdin)


def create(*args: str, stdin: str | bytes = LIST) -> Result:
    return run("create", "--name", "Spring", "--sender", "News <news@example.com>", *args, stdin=stdin)


def refused(result: Result, *texts: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    for text in texts:
        assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_create_prints_the_id_alone_on_stdout(book: Ledger) -> None:
    result = create(*WELCOME)
    assert result.exit_code == 0, result.output
    [campaign_id] = book.ids()
    assert result.stdout == f"{campaign_id}\n"
    assert result.stderr == "2 recipients, to be sent now\n"
    campaign = book.campaign(campaign_id)
    assert (campaign.name, campaign.sender) == ("Spring", "News <news@example.com>")
    assert campaign.template.subject == "Welcome, {{ name }}\n"


def test_create_reads_a_folder_and_a_file_and_a_time(book: Ledger, tmp_path: Path) -> None:
    (tmp_path / "subject.txt").write_text("Hi {{ name }}")
    (tmp_path / "body.txt").write_text("Hi")
    (tmp_path / "list.csv").write_text(LIST)
    at = "2100-05-01T09:00+02:00"
    result = create("--template-dir", str(tmp_path), "--recipients", str(tmp_path / "list.csv"), "--at", at)
    assert result.exit_code == 0, result.output
    assert book.campaign(result.stdout.strip()).send_at.isoformat() == "2100-05-01T07:00:00+00:00"


def test_create_reads_everything_from_one_bundle(book: Ledger) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, text in {"subject.txt": "s", "body.txt": "{{ name }}", "recipients.csv": LIST}.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    result = create("--bundle", "-", stdin=data.getvalue())
    assert result.exit_code == 0, result.output
    assert book.campaign(result.stdout.strip()).size == 2


def test_a_bad_list_is_refused_with_lines_and_columns(book: Ledger) -> None:
    refused(
        create(*WELCOME, stdin="email,name\nada,Ada\ngrace@example.com\n"),
        "the recipient list cannot be used:",
        "line 2, column 1: 'ada' is not an e-mail address",
        "line 3, column 2: 1 fields, but the header has 2",
    )
    assert book.ids() == []


def test_of_very_many_problems_only_the_first_are_printed(book: Ledger) -> None:
    result = create(*WELCOME, stdin="email,name\n" + "x,y\n" * 50)
    refused(result, "line 21, column 1", "and 30 more problems")
    assert "line 22" not in result.stderr


def test_a_template_that_names_an_unknown_column_is_refused(book: Ledger) -> None:
    refused(
        create(*WELCOME, stdin="email,first_name\nada@example.com,Ada\n"),
        "subject.txt, line 1: unknown column 'name', the list has: email, first_name",
    )


def test_a_template_that_fails_for_one_recipient_is_refused_with_the_line(
    book: Ledger, tmp_path: Path
) -> None:
    (tmp_path / "subject.txt").write_text("s")
    (tmp_path / "body.txt").write_text("{{ 6 // (name | int) }}")
    result = create(
        "--template-dir",
        str(tmp_path),
        "--recipients",
        "-",
        stdin="email,name\na@b.example,1\nc@b.example,0\n",
    )
    refused(
        result,
        "the mails of the recipients in these lines cannot be made:",
        "line 3: body.txt, line 1: ZeroDivisionError: ",
    )
    assert book.ids() == []


def test_a_value_that_no_mail_can_hold_is_refused_with_line_and_column(book: Ledger) -> None:
    rows = ['ada@example.com,"Ada\n"', "bob@example.com,Bob", "eve@example.com,E\x07e", "x@example.com,\x80"]
    refused(
        create(*WELCOME, stdin="\n".join(["email,name", *rows])),
        "line 5, column 2: name holds the control character U+0007: subject.txt: no mail can hold ",
        "line 6, column 2: name holds the control character U+0080: subject.txt: no mail can hold ",
    )
    refused(
        create(*WELCOME, stdin="email,name\n=?utf-8?q?adam?=@example.com,Adam\n"),
        "line 2, column 1: '=?utf-8?q?adam?=@example.com' is not an e-mail address to write to",
    )
    assert book.ids() == []


def test_a_template_that_no_mail_can_hold_is_refused_with_file_and_line(book: Ledger, tmp_path: Path) -> None:
    for subject, text, place in (
        ("a\n\x1b[1m", "t", "subject.txt, line 2: no mail can hold the control character U+001B"),
        ("s", "a\nb\0", "body.txt, line 2: no mail can hold the control character U+0000"),
        ("s", "a\n{{ '\\ud800' }}", "line 2: body.txt: no mail can hold half of a character (U+D800)"),
        ("{{ name if name != 'Grace' }}", "t", "line 3: subject.txt: the subject is empty"),
        ("s", "{{ 'x' * 10 ** 15 }}", "line 2: the mail does not fit into memory"),
    ):
        (tmp_path / "subject.txt").write_text(subject)
        (tmp_path / "body.txt").write_text(text)
        refused(create("--template-dir", str(tmp_path), "--recipients", "-"), place)
    assert book.ids() == []


def test_names_of_any_script_are_taken(book: Ledger) -> None:
    name = "👨\u200d👩\u200d👧 \u0646\u0645\u06cc\u200c\u062e"
    result = run("create", "--name", name, "--sender", f'"{name}" <news@example.com>', *WELCOME)
    assert book.campaign(result.stdout.strip()).name == name


@pytest.mark.parametrize(
    ("at", "text"),
    [
        ("2001-01-01T00:00Z", "is in the past"),
        ("2100-01-01T00:00", "add the zone"),
        ("2100-01-01", "add the zone"),
        ("tomorrow", "not ISO 8601"),
        ("9999-12-31T23:59-02:00", "there is no such time in UTC"),
    ],
)
def test_a_time_that_is_past_or_unclear_is_refused(book: Ledger, at: str, text: str) -> None:
    refused(create(*WELCOME, "--at", at), f"--at {at}", text)
    assert book.ids() == []


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--recipients", "-"),
        ("--template", "welcome"),
        ("--recipients", "-", "--template", "welcome", "--template-dir", "."),
        ("--bundle", "-", "--template", "welcome"),
        ("--recipients", "/does/not/exist", "--template", "welcome"),
    ],
)
def test_wrong_usage_has_its_own_exit_code(book: Ledger, args: tuple[str, ...]) -> None:
    refused(create(*args), "Usage:", code=2)


@pytest.mark.parametrize(
    ("name", "sender"),
    [
        ("", "a@example.com"),
        ("a\nb", "a@example.com"),
        ("\udcff", "a@example.com"),
        ("a", "b"),
        ("a", "\udcff <a@example.com>"),
        ("a", "=?utf-8?q?x?=@example.com"),
    ],
)
def test_a_bad_name_or_sender_is_refused(book: Ledger, name: str, sender: str) -> None:
    refused(run("create", "--name", name, "--sender", sender, *WELCOME), "Error: the ")


def test_list_shows_the_newest_first(book: Ledger) -> None:
    first, second = campaign_of(book, 3).id, campaign_of(book, 4).id
    book.wait(second, 60, "no server")
    lines = run("list").stdout.splitlines()
    assert lines[0].split() == ["ID", "STATE", "SEND", "AT", "RECIPIENTS", "SENT", "FAILED", "AMBIGUOUS"]
    assert lines[1].split()[:2] == [second, "waiting"]
    assert lines[2].split()[:2] == [first, "sending"]
    assert [report["id"] for report in json.loads(run("list", "--json").stdout)] == [second, first]


def test_list_of_nothing(book: Ledger) -> None:
    assert run("list").exit_code == 0
    assert json.loads(run("list", "--json").stdout) == []


def test_show_names_failures_and_doubts(book: Ledger, celery: Any, mail_server: MailServer) -> None:
    mail_server.rcpt_replies["user0@example.com"].append("550 no such user")
    mail_server.rcpt_replies["user1@example.com"].append("550 no such user")
    mail_server.data_replies["user2@example.com"].append(DROP)
    campaign = campaign_of(book, 5)
    run_until_finished(celery, book, campaign.id)

    text = run("show", campaign.id).stdout
    assert "state:        finished" in text
    assert "failed: user0@example.com (RCPT: 550 no such user)" in text
    assert "ambiguous: user2@example.com (the connection broke after the mail was sent" in text
    text = run("show", campaign.id, "--limit", "1").stdout
    assert "user1" not in text
    assert "failed: 1 more, see --limit" in text

    report = json.loads(run("show", campaign.id, "--json").stdout)
    assert report["counts"] == {
        "pending": 0, "sending": 0, "data": 0, "sent": 2, "failed": 2, "ambiguous": 1, "cancelled": 0,
    }  # fmt: skip
    assert [record["email"] for record in report["failed"]] == ["user0@example.com", "user1@example.com"]
    assert report["finished_at"].endswith("+00:00")


def test_show_lists_the_queue_ids_of_what_was_sent(book: Ledger, mail_server: MailServer) -> None:
    mail_server.data_replies["user0@example.com"].append("250 2.0.0 Ok: queued as 4F1C9A2E")
    campaign = campaign_of(book, 2)
    send_batch(campaign.id, 0)
    text = run("show", campaign.id, "--state", "sent").stdout
    assert "sent: user0@example.com (250 2.0.0 Ok: queued as 4F1C9A2E)" in text
    report = json.loads(run("show", campaign.id, "--json", "--state", "sent", "--state", "failed").stdout)
    assert [record["state"] for record in report["sent"]] == ["sent", "sent"]
    assert report["failed"] == []
    assert "ambiguous" not in report


def test_the_policy_is_the_settings_unless_the_command_says_otherwise(
    book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert book.campaign(create(*WELCOME).stdout.strip()).ambiguous == "hold"
    monkeypatch.setenv("CAMPAIGNS_AMBIGUOUS", "resend")
    campaign_id = create(*WELCOME).stdout.strip()
    assert "if ambiguous: resend" in run("show", campaign_id).stdout
    assert book.campaign(create(*WELCOME, "--ambiguous", "hold").stdout.strip()).ambiguous == "hold"
    refused(create(*WELCOME, "--ambiguous", "x"), "'x' is not one of 'hold', 'resend'", code=2)
    monkeypatch.setenv("CAMPAIGNS_AMBIGUOUS", "x")
    refused(create(*WELCOME), "CAMPAIGNS_AMBIGUOUS must be hold or resend, not 'x'", code=3)


@pytest.fixture
def in_doubt(book: Ledger, celery: Any, mail_server: MailServer) -> str:
    """A finished campaign of 5 with 3 ambiguous recipients."""
    for number in range(3):
        mail_server.data_replies[f"user{number}@example.com"].append(DROP)
    campaign = campaign_of(book, 5)
    run_until_finished(celery, book, campaign.id)
    return campaign.id


def test_resolve_ends_doubts_of_a_finished_campaign(
    book: Ledger, celery: Any, mail_server: MailServer, in_doubt: str
) -> None:
    result = run("resolve", in_doubt, "USER0@example.com", "--sent")
    assert result.stdout == "1 sent, 2 still ambiguous\n"
    result = run("resolve", in_doubt, "--resend")
    assert result.stdout == "2 to be sent again, 0 still ambiguous\n"
    assert run_until_finished(celery, book, in_doubt)["sent"] == 5
    assert mail_server.received() == {
        **{f"user{number}@example.com": 1 for number in range(5)},
        "user1@example.com": 2,
        "user2@example.com": 2,
    }
    text = run("show", in_doubt).stdout
    assert "possibly twice: user1@example.com (now sent: 250 OK queued)" in text
    assert "  possibly twice: 2\n" in text
    assert "possibly twice: 1 more, see --limit" in run("show", in_doubt, "--limit", "1").stdout


def test_resolve_refuses_what_it_cannot_do(book: Ledger, in_doubt: str) -> None:
    refused(run("resolve", in_doubt), "give --sent or --resend", code=2)
    refused(run("resolve", in_doubt, "--sent", "user4@example.com", "x"), "not ambiguous", "user4@", "x")
    assert book.counts(in_doubt)["ambiguous"] == 3
    campaign = campaign_of(book, 1)
    claim = book.claim(campaign.id, 0, "me", 60)
    assert claim
    book.settle(claim, "ambiguous", "lost")
    book.cancel(campaign.id)
    refused(run("resolve", campaign.id, "--resend"), "is cancelled, it sends nothing again")


def test_show_says_why_a_campaign_waits(book: Ledger, mail_server: MailServer) -> None:
    mail_server.stop()
    campaign = campaign_of(book, 1)
    send_batch(campaign.id, 0)
    assert "waiting for:  smtp://127.0.0.1" in run("show", campaign.id).stdout


def test_cancel_says_what_it_stopped(book: Ledger, celery: Any, mail_server: MailServer) -> None:
    campaign = campaign_of(book, 15)
    send_batch(campaign.id, 0)
    for _ in range(2):
        result = run("cancel", campaign.id)
        assert result.stdout == f"{campaign.id} is cancelled: 5 not sent, 10 sent before\n"
    run_until_finished(celery, book, campaign.id)
    assert len(mail_server.mails) == 10


def test_a_finished_campaign_cannot_be_cancelled(book: Ledger, celery: Any, mail_server: MailServer) -> None:
    campaign = campaign_of(book, 1)
    run_until_finished(celery, book, campaign.id)
    refused(run("cancel", campaign.id), "is finished")


def test_delete_forgets_what_is_over(
    book: Ledger, redis_server: Redis, celery: Any, mail_server: MailServer, in_doubt: str
) -> None:
    refused(run("delete", in_doubt), f"{in_doubt} has ambiguous recipients", "campaigns resolve")
    run("resolve", in_doubt, "--resend")
    refused(
        run("delete", in_doubt),
        f"{in_doubt} is not over (3 to be sent to, 0 on their way, 0 ambiguous): wait, or `campaigns cancel`",
    )
    run_until_finished(celery, book, in_doubt)
    stopped = campaign_of(book, 2)
    run("cancel", stopped.id)
    run_until_finished(celery, book, stopped.id)
    kept = campaign_of(book, 1)
    result = run("delete", in_doubt, "nope", kept.id, stopped.id)
    assert result.exit_code == 1
    assert result.stdout == f"{in_doubt} is deleted: 5 sent\n{stopped.id} is deleted: 2 cancelled\n"
    assert "no campaign nope" in result.stderr
    assert f"{kept.id} is not over (1 to be sent to" in result.stderr
    assert book.ids() == [kept.id]
    left = redis_server.admin.keys("app:*")
    assert [key for key in left if in_doubt in key or stopped.id in key] == []
    refused(run("delete", in_doubt), f"no campaign {in_doubt}")
    # A call that is repeated for want of an answer.
    assert book._call(in_doubt, "delete", *STATES, confirm=True) == ["deleted", 0, *[0] * len(STATES)]
    assert redis_server.admin.keys("app:*") == left


def test_delete_right_after_cancel_deletes_what_has_nothing_on_its_way(
    book: Ledger, celery: Any, mail_server: MailServer
) -> None:
    campaign = campaign_of(book, 25)
    check_scheduled_campaigns()
    send_batch(campaign.id, 0)
    assert run("cancel", campaign.id).stdout == f"{campaign.id} is cancelled: 15 not sent, 10 sent before\n"
    assert run("delete", campaign.id).stdout == f"{campaign.id} is deleted: 10 sent, 15 cancelled\n"
    # The batches that are still in the queue are no failures.
    run_queue(celery)
    assert book.ids() == book.due_ids() == []
    assert len(mail_server.mails) == 10


def test_delete_right_after_cancel_says_what_is_on_its_way(
    book: Ledger, celery: Any, mail_server: MailServer
) -> None:
    campaign = campaign_of(book, 5)
    said: list[str] = []

    def meanwhile(address: str) -> None:
        if address.startswith("user2"):
            for command in ("cancel", "delete"):
                result = run(command, campaign.id)
                said.append(result.stdout + result.stderr)

    mail_server.on_data = meanwhile
    send_batch(campaign.id, 0)
    assert said[0] == f"{campaign.id} is cancelled: 2 not sent, 2 sent before, 1 on their way\n"
    assert re.fullmatch(
        f"Error: {campaign.id} is cancelled, but mails are still on their way \\(1\\): "
        r"delete it again when they have arrived or failed, in at most (901|900) s\n",
        said[1],
    )
    assert run("delete", campaign.id).stdout == f"{campaign.id} is deleted: 3 sent, 2 cancelled\n"


def test_delete_says_what_a_lost_worker_left_behind(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = campaign_of(book, 3)
    claims = [book.claim(campaign.id, number, "lost", 0.2) for number in range(2)]
    assert claims[0] and book.begin_data(claims[0], 0.2)
    run("cancel", campaign.id)
    refused(run("delete", campaign.id), "mails are still on their way (2)", "in at most 2 s")
    wait_until(lambda: sum(book.expire_claims(campaign.id, 60)[:2]) or not book.open(campaign.id))
    wait_until(lambda: book.expire_claims(campaign.id, 60) == (0, 0, 0) and not book.open(campaign.id))
    refused(run("delete", campaign.id), f"{campaign.id} has ambiguous recipients (1): `campaigns resolve`")
    run("resolve", campaign.id, "--sent")
    assert run("delete", campaign.id).stdout == f"{campaign.id} is deleted: 1 sent, 2 cancelled\n"


@pytest.mark.parametrize("command", ["show", "cancel", "resolve --sent", "delete"])
def test_an_unknown_campaign_is_refused(book: Ledger, command: str) -> None:
    refused(run(*command.split(), "nope"), "no campaign nope")


def test_a_missing_setting_is_named(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    forget_settings()
    refused(create(*WELCOME), "redis_url", "CREDENTIALS_DIRECTORY", code=3)


def test_a_redis_that_does_not_answer_is_named(
    book: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.3)
    (tmp_path / "redis_url").write_text("redis://app:secret@127.0.0.1:1/0")
    forget_settings()
    result = run("list")
    refused(result, "Redis, which holds the campaigns, failed: ", code=3)
    assert "secret" not in result.stderr
