"""The command `campaigns`.

Exit codes: 0 done, 1 refused (the input or the campaign's state does not allow it), 2 wrong usage,
3 not possible now (a setting is missing or Redis failed).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import click
import redis

from campaigns import headers, messages, recipients, settings
from campaigns.messages import Mailbox, MessageError, Template
from campaigns.recipients import Problem, Recipient, RecipientsError
from campaigns.store import STATES, Campaign, Deletion, Ledger, Record, UnknownCampaign, ledger

SHOWN_PROBLEMS = 20
SHOWN = (
    "id",
    "name",
    "sender",
    "subject",
    "state",
    "send_at",
    "started_at",
    "finished_at",
    "waiting_for",
    "if_ambiguous",
)
SHOWN_STATES = ("failed", "ambiguous")


class Refusal(click.ClickException):
    """Exit code 1."""


class NotNow(click.ClickException):
    """Exit code 3."""

    exit_code = 3


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except settings.SettingsError as error:
            raise NotNow(str(error)) from error
        except redis.RedisError as error:
            raise NotNow(f"Redis, which holds the campaigns, failed: {error}") from error
        except UnknownCampaign as error:
            raise Refusal(f"no campaign {error}: `campaigns list` shows them all") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Create e-mail campaigns and see what became of them."""


@main.command()
@click.option("--name", required=True, help="What you call it; the campaign's id begins with it.")
@click.option(
    "--sender", required=True, metavar="ADDRESS", help="'Name <name@example.com>' or the bare address."
)
@click.option(
    "--recipients",
    "list_file",
    type=click.File("rb"),
    help="CSV with a header and a column email; - is stdin.",
)
@click.option("--template", "packaged", metavar="NAME", help="A template of the package, such as welcome.")
@click.option(
    "--template-dir",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder with subject.txt, body.txt and, if wanted, body.html.",
)
@click.option(
    "--bundle", type=click.File("rb"), help="A tar of recipients.csv and the template's files; - is stdin."
)
@click.option(
    "--at", metavar="TIME", help="When to send: ISO 8601 with a zone, 2030-05-01T09:00+02:00. Default: now."
)
@click.option(
    "--ambiguous",
    type=click.Choice(settings.POLICIES),
    help="What becomes of a mail whose fate nobody knows: hold it for `resolve`, or resend it once. "
    "Default: CAMPAIGNS_AMBIGUOUS, or hold.",
)
def create(
    name: str,
    sender: str,
    list_file: Any,
    packaged: str | None,
    folder: Path | None,
    bundle: Any,
    at: str | None,
    ambiguous: str | None,
) -> None:
    """Create a campaign and print its id.

    Give --recipients with either --template or --template-dir, or all of it as one --bundle. The columns
    of the list are the variables of the template. Nothing is written unless every mail can be made.
    """
    if bundle and (list_file or packaged or folder):
        raise click.UsageError("--bundle holds the recipients and the template: leave the other options out")
    if not bundle and (not list_file or bool(packaged) == bool(folder)):
        raise click.UsageError("give --recipients and one of --template and --template-dir, or give --bundle")
    send_at = _send_at(at)
    if headers.UNWANTED.search(name) or "\t" in name or not 0 < len(name.strip()) <= 100:
        raise Refusal("the name must be 1 to 100 characters, and no control characters")
    try:
        origin = messages.sender(sender)
        if bundle:
            template, data = messages.from_bundle(bundle.read())
        else:
            template = messages.packaged(packaged) if packaged else messages.from_folder(folder or Path())
            data = list_file.read()
        people = recipients.parse(data)
        messages.check(template, people[0].fields)
    except MessageError as error:
        raise Refusal(str(error)) from error
    except RecipientsError as error:
        _refuse("the recipient list cannot be used:", error.problems, error)
    _check_mails(origin, template, people)

    policy = ambiguous or settings.ambiguous()
    campaign_id = ledger().create(
        name.strip(), sender, template, people, settings.batch_size(), send_at, policy
    )
    when = send_at.isoformat() if send_at else "now"
    click.echo(f"{len(people)} recipients, to be sent {when}", err=True)
    click.echo(campaign_id)


@main.command("list")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def list_campaigns(as_json: bool) -> None:
    """List all campaigns, the newest first."""
    book = ledger()
    reports = [_report(book, book.campaign(campaign_id)) for campaign_id in book.ids()]
    if as_json:
        click.echo(json.dumps(reports, indent=2, ensure_ascii=False))
        return
    rows = [["ID", "STATE", "SEND AT", "RECIPIENTS", "SENT", "FAILED", "AMBIGUOUS"]]
    for report in reports:
        counts = report["counts"]
        state = "waiting" if report["waiting_for"] else report["state"]
        figures = [report["size"], counts["sent"], counts["failed"], counts["ambiguous"]]
        rows.append([report["id"], state, report["send_at"][:19] + "Z", *map(str, figures)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        words = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        click.echo("  ".join(words + numbers))


@main.command()
@click.argument("campaign_id")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(0), help="How many to list per state."
)
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(STATES),
    help="List the recipients in this state, with the mail server's reply; can be repeated.  "
    f"Default: {' and '.join(SHOWN_STATES)}.",
)
def show(campaign_id: str, as_json: bool, limit: int, states: tuple[str, ...]) -> None:
    """Show a campaign's counts and recipients: those that failed or are in doubt, or those in a --state.

    Whoever was sent to again after a doubt may have the mail twice, and is always listed.
    """
    book = ledger()
    states = states or SHOWN_STATES
    report = _report(book, book.campaign(campaign_id))
    report["resent_count"] = book.resent_count(campaign_id)
    for state in states:
        report[state] = [asdict(record) for record in book.records(campaign_id, state, limit)]
    report["resent"] = [asdict(record) for record in book.resent(campaign_id, limit)]
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for key in SHOWN:
        if report[key]:
            click.echo(f"{key.replace('_', ' ') + ':':<13} {report[key]}")
    click.echo(f"{'recipients:':<13} {report['size']}")
    for state, count in report["counts"].items():
        if count:
            click.echo(f"  {state + ':':<11} {count}")
    if report["resent_count"]:
        click.echo(f"  possibly twice: {report['resent_count']}")
    for state in states:
        for record in report[state]:
            click.echo(f"{state}: {record['email']} ({record['reply']})")
        _more(state, report["counts"][state] - len(report[state]))
    for record in report["resent"]:
        click.echo(f"possibly twice: {record['email']} (now {record['state']}: {record['reply']})")
    _more("possibly twice", report["resent_count"] - len(report["resent"]))


@main.command()
@click.argument("campaign_id")
@click.argument("addresses", nargs=-1, metavar="[RECIPIENT]...")
@click.option("--sent", "state", flag_value="sent", help="The mail arrived, or shall not be sent again.")
@click.option(
    "--resend", "state", flag_value="pending", help="Send the mail once more, perhaps a second time."
)
def resolve(campaign_id: str, addresses: tuple[str, ...], state: str | None) -> None:
    """Decide about ambiguous recipients: those named, or all. A finished campaign goes on for a --resend."""
    if not state:
        raise click.UsageError("give --sent or --resend")
    book = ledger()
    campaign = book.campaign(campaign_id)
    numbers = _in_doubt(campaign, book.records(campaign_id, "ambiguous"), addresses)
    word = "sent" if state == "sent" else "to be sent again"
    done = book.resolve(campaign_id, numbers, state, f"{word}, decided by hand")
    if done is None:
        raise Refusal(f"{campaign_id} is cancelled, it sends nothing again")
    click.echo(f"{done} {word}, {book.counts(campaign_id)['ambiguous']} still ambiguous")


@main.command()
@click.argument("campaign_id")
def cancel(campaign_id: str) -> None:
    """Stop a campaign: what has not been sent never is."""
    book = ledger()
    before = book.cancel(campaign_id)
    if before == "finished":
        raise Refusal(f"{campaign_id} is finished, there is nothing to cancel")
    counts = book.counts(campaign_id)
    leaving = _leaving(counts)
    rest = f", {leaving} on their way" if leaving else ""
    click.echo(
        f"{campaign_id} is cancelled: {counts['cancelled']} not sent, {counts['sent']} sent before{rest}"
    )


@main.command()
@click.argument("campaign_ids", nargs=-1, required=True, metavar="CAMPAIGN_ID...")
def delete(campaign_ids: tuple[str, ...]) -> None:
    """Forget campaigns that are over, with what became of their recipients. Nothing is forgotten by itself.

    Each campaign is deleted or, with the reason, kept, whatever becomes of the others.
    """
    book = ledger()
    kept = []
    for campaign_id in campaign_ids:
        try:
            deletion = book.delete(campaign_id)
        except UnknownCampaign:
            kept.append(f"no campaign {campaign_id}: `campaigns list` shows them all")
            continue
        if deletion.outcome == "deleted":
            counts = ", ".join(f"{count} {state}" for state, count in deletion.counts.items() if count)
            click.echo(f"{campaign_id} is deleted{counts and ': '}{counts}")
        else:
            kept.append(_why_kept(campaign_id, deletion))
    if kept:
        raise Refusal("\n".join(kept))


def _why_kept(campaign_id: str, deletion: Deletion) -> str:
    counts, leaving = deletion.counts, _leaving(deletion.counts)
    if deletion.outcome == "ambiguous":
        return (
            f"{campaign_id} has ambiguous recipients ({counts['ambiguous']}): `campaigns resolve` them first"
        )
    if deletion.state == "cancelled":
        # Of a worker that was lost the next check finds it out.
        seconds = deletion.seconds + settings.check_seconds()
        again = f"delete it again when they have arrived or failed, in at most {seconds} s"
        return f"{campaign_id} is cancelled, but mails are still on their way ({leaving}): {again}"
    left = f"{counts['pending']} to be sent to, {leaving} on their way, {counts['ambiguous']} ambiguous"
    return f"{campaign_id} is not over ({left}): wait, or `campaigns cancel` it first"


def _leaving(counts: dict[str, int]) -> int:
    """How many mails are on their way."""
    return counts["sending"] + counts["data"]


def _in_doubt(campaign: Campaign, records: list[Record], addresses: tuple[str, ...]) -> list[int]:
    """The numbers of the ambiguous recipients with these addresses, of all without any."""
    if not addresses:
        return [record.number for record in records]
    known = {record.email.casefold(): record.number for record in records}
    unknown = [address for address in addresses if address.casefold() not in known]
    if unknown:
        raise Refusal(f"not ambiguous in {campaign.id}: {', '.join(unknown)}")
    return [known[address.casefold()] for address in addresses]


def _more(state: str, count: int) -> None:
    if count:
        click.echo(f"{state}: {count} more, see --limit")


def _send_at(at: str | None) -> datetime | None:
    if at is None:
        return None
    try:
        moment = datetime.fromisoformat(at)
    except ValueError as error:
        raise Refusal(f"--at {at}: not ISO 8601, give for example 2030-05-01T09:00+02:00") from error
    if moment.tzinfo is None:
        raise Refusal(f"--at {at}: add the zone, for example 2030-05-01T09:00Z or 2030-05-01T09:00+02:00")
    now = datetime.now(UTC)
    try:
        moment = moment.astimezone(UTC)
    except OverflowError as error:
        raise Refusal(f"--at {at}: there is no such time in UTC, years are 1 to 9999") from error
    if moment < now:
        raise Refusal(f"--at {at} is in the past, it is {now:%Y-%m-%dT%H:%MZ}: leave --at out to send now")
    return moment


def _check_mails(origin: Mailbox, template: Template, people: list[Recipient]) -> None:
    """Render every mail once: what fails for one recipient is known before any mail is sent."""
    problems = []
    for person in people:
        try:
            messages.check_mail("", origin, messages.render(template, person.fields), person.fields)
        except MessageError as error:
            problems.append(_mail_problem(person, error))
        except MemoryError:
            problems.append(Problem(person.line, 0, "the mail does not fit into memory"))
    if problems:
        _refuse("the mails of the recipients in these lines cannot be made:", problems)


def _mail_problem(person: Recipient, error: MessageError) -> Problem:
    """Where in the list it is that a mail cannot be made."""
    for column, value in person.fields.items():
        if error.character and error.character in value:
            return person.problem(column, f"{column} holds {headers.describe(error.character)}: {error}")
    return Problem(person.line, 0, str(error))


def _refuse(what: str, problems: list[Problem], cause: Exception | None = None) -> NoReturn:
    lines = [what, *(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS])]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(problems) - SHOWN_PROBLEMS} more problems")
    raise Refusal("\n".join(lines)) from cause


def _report(book: Ledger, campaign: Campaign) -> dict[str, Any]:
    def iso(moment: datetime | None) -> str | None:
        return moment.isoformat() if moment else None

    return {
        "id": campaign.id,
        "name": campaign.name,
        "sender": campaign.sender,
        "subject": campaign.template.subject.strip(),
        "state": campaign.state,
        "created_at": iso(campaign.created_at),
        "send_at": iso(campaign.send_at),
        "started_at": iso(campaign.started_at),
        "finished_at": iso(campaign.finished_at),
        "waiting_for": campaign.waiting_for,
        "if_ambiguous": campaign.ambiguous,
        "size": campaign.size,
        "batch_size": campaign.batch_size,
        "counts": book.counts(campaign.id),
    }


if __name__ == "__main__":
    sys.exit(main())
