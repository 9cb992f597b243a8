"""Reads a recipient list: CSV, UTF-8, comma separated, with a header line and a column `email`."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
ADDRESS = re.compile(rf"(?P<local>{ATOM}(\.{ATOM})*)@(?P<domain>{LABEL}(\.{LABEL})*)")
UNSUBSCRIBE = re.compile(r"(https?://|mailto:)[!-;=?-~]{1,900}")


@dataclass(frozen=True)
class Recipient:
    """One line of the list: `fields` holds every column, `email` among them."""

    line: int
    email: str
    fields: dict[str, str]


@dataclass(frozen=True)
class Problem:
    """What is wrong at one place of the list; lines and columns count from 1."""

    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.text}"


class RecipientsError(Exception):
    """The list cannot be used; `problems` holds all that is wrong with it, in the list's order."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def parse(data: bytes) -> list[Recipient]:
    """Return the recipients of a list. Raises RecipientsError with every problem, not only the first."""
    text = _decode(data)
    rows = _rows(text)
    try:
        line, header = next(rows)
    except StopIteration:
        raise RecipientsError([Problem(1, 1, "empty: expected a header with a column email")]) from None
    columns = _columns(line, header)

    recipients: list[Recipient] = []
    problems: list[Problem] = []
    first_seen: dict[str, int] = {}
    email_column = columns.index("email") + 1
    for line, row in rows:
        if len(row) != len(columns):
            at = min(len(row), len(columns)) + 1
            problems.append(Problem(line, at, f"{len(row)} fields, but the header has {len(columns)}"))
            continue
        fields = dict(zip(columns, (value.strip() for value in row), strict=True))
        email = address(fields["email"])
        if email is None:
            problems.append(Problem(line, email_column, f"{fields['email']!r} is not an e-mail address"))
            continue
        earlier = first_seen.setdefault(email.casefold(), line)
        if earlier != line:
            problems.append(Problem(line, email_column, f"{email} is already in line {earlier}"))
            continue
        if fields.get("unsubscribe") and not UNSUBSCRIBE.fullmatch(fields["unsubscribe"]):
            at = columns.index("unsubscribe") + 1
            problems.append(Problem(line, at, "unsubscribe must be a https:, http: or mailto: URL"))
            continue
        recipients.append(Recipient(line, email, fields | {"email": email}))
    if not recipients and not problems:
        problems.append(Problem(line, 1, "the list holds no recipients, only a header"))
    if problems:
        raise RecipientsError(problems)
    return recipients


def address(value: str) -> str | None:
    """Return an address as SMTP wants it (an international domain in its ASCII form), None if it is none."""
    local, at, domain = value.rpartition("@")
    if not domain.isascii():
        try:
            domain = domain.encode("idna").decode()
        except UnicodeError:
            return None
    result = f"{local}{at}{domain}"
    if not ADDRESS.fullmatch(result) or len(local) > 64 or len(result) > 254:
        return None
    return result


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The error counts from behind the byte order mark, when there is one.
        before = error.object[: error.start]
        line_start = before.rfind(b"\n") + 1
        character = len(before[line_start:].decode()) + 1
        byte = error.object[error.start]
        text = f"byte 0x{byte:02x} at character {character} is not UTF-8: save the list as UTF-8"
        column = before[line_start:].count(b",") + 1
        raise RecipientsError([Problem(before.count(b"\n") + 1, column, text)]) from error


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield every row that is not blank with the line that it starts on."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise RecipientsError([Problem(line, 1, f"not CSV: {error}")]) from error
        for column, value in enumerate(row, 1):
            if "\0" in value:
                raise RecipientsError([Problem(line, column, "the field holds a NUL character")])
        if any(value.strip() for value in row):
            yield line, row


def _columns(line: int, header: list[str]) -> list[str]:
    """Return the names that templates use: "First Name" becomes `first_name`."""
    names = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in header]
    problems = []
    for column, (name, original) in enumerate(zip(names, header, strict=True), 1):
        if not name.isidentifier():
            problems.append(
                Problem(line, column, f"{original!r} is no variable name: use letters, digits, _")
            )
        elif names.index(name) + 1 != column:
            problems.append(Problem(line, column, f"column {name} is already column {names.index(name) + 1}"))
    if "email" not in names:
        has = ", ".join(header)
        problems.insert(0, Problem(line, 1, f"no column email, only {has} (commas separate columns)"))
    if problems:
        raise RecipientsError(problems)
    return names
