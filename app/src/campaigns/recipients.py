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
# An encoded word (RFC 2047, 2) and what tolerant readers take for one. The standard allows none in addresses
# and URLs, so what looks like one is ordinary text, but some programs decode it all the same.
LIKE_ENCODED_WORD = re.compile(r"=\?[^?]*\?[^?]*\?.*\?=")
FIELD = re.compile(r'(?:"(?:[^"]|"")*+"|(?!")[^,\r\n]*),')  # of a row of CSV, with its comma
LINE_BREAK = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Recipient:
    """One row of the list: `fields` holds every column, `email` among them.

    `line` is where the row begins; `lines`, if it is not empty, where each of its fields does.
    """

    line: int
    email: str
    fields: dict[str, str]
    lines: tuple[int, ...] = ()

    def problem(self, column: str, text: str) -> Problem:
        """What is wrong with a column of this recipient."""
        at = list(self.fields).index(column)
        return Problem(self.lines[at] if self.lines else self.line, at + 1, text)


@dataclass(frozen=True)
class Problem:
    """What is wrong at one place of the list; lines and columns count from 1, column 0 is no certain one."""

    line: int
    column: int
    text: str

    def __str__(self) -> str:
        place = f"line {self.line}, column {self.column}" if self.column else f"line {self.line}"
        return f"{place}: {self.text}"


class AddressError(ValueError):
    """A text is no e-mail address that can be written to; the message says why."""


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
    for line, row in rows:
        lines = _lines(line, row) if any("\n" in value or "\r" in value for value in row) else ()
        if len(row) != len(columns):
            at = min(len(row), len(columns))
            place = lines[at] if at < len(lines) else line
            problems.append(Problem(place, at + 1, f"{len(row)} fields, but the header has {len(columns)}"))
            continue
        fields = dict(zip(columns, (value.strip() for value in row), strict=True))
        person = Recipient(line, fields["email"], fields, lines)
        try:
            email = checked_address(person.email)
        except AddressError as error:
            problems.append(person.problem("email", str(error)))
            continue
        earlier = first_seen.setdefault(email.casefold(), line)
        if earlier != line:
            problems.append(person.problem("email", f"{email} is already in line {earlier}"))
            continue
        if fault := _unsubscribe_fault(fields.get("unsubscribe", "")):
            problems.append(person.problem("unsubscribe", fault))
            continue
        recipients.append(Recipient(line, email, fields | {"email": email}, lines))
    if not recipients and not problems:
        problems.append(Problem(line, 1, "the list holds no recipients, only a header"))
    if problems:
        raise RecipientsError(problems)
    return recipients


def address(value: str) -> str | None:
    """Return an address as SMTP wants it (an international domain in its ASCII form), None if it is none."""
    try:
        return checked_address(value)
    except AddressError:
        return None


def checked_address(value: str) -> str:
    """Return an address as SMTP wants it (an international domain in its ASCII form). Raises AddressError."""
    fault = AddressError(f"{value!r} is not an e-mail address")
    local, at, domain = value.rpartition("@")
    if not domain.isascii():
        try:
            domain = domain.encode("idna").decode()
        except UnicodeError:
            raise fault from None
    result = f"{local}{at}{domain}"
    if not local.isascii() and ADDRESS.fullmatch(f"x@{domain}"):
        raise AddressError(f"{fault}: what is before the @ must be ASCII, many servers take nothing else")
    if not ADDRESS.fullmatch(result):
        raise fault
    if len(local) > 64 or len(result) > 254:
        raise AddressError(f"{fault}: the most are 64 characters before the @ and 254 in all")
    if LIKE_ENCODED_WORD.search(local):
        raise AddressError(f"{fault} to write to: some programs would decode it (RFC 2047) to another one")
    return result


def _unsubscribe_fault(url: str) -> str:
    if not url.isascii() or len(url) > 900:
        return "unsubscribe must be ASCII and at most 900 characters long"
    if url and not UNSUBSCRIBE.fullmatch(url):
        return "unsubscribe must be a https:, http: or mailto: URL"
    if LIKE_ENCODED_WORD.search(url):
        return "unsubscribe would be decoded by some programs (RFC 2047): write %3D for = and %3F for ?"
    return ""


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
            raise RecipientsError([Problem(*_fault(text, line), f"not CSV: {error}")]) from error
        for at, value in enumerate(row):
            if "\0" in value:
                place = _lines(line, row)[at]
                raise RecipientsError([Problem(place, at + 1, "the field holds a NUL character")])
        if any(value.strip() for value in row):
            yield line, row


def _lines(line: int, row: list[str]) -> tuple[int, ...]:
    """The line that each field of a row begins on, when the row begins on `line`."""
    lines = []
    for value in row:
        lines.append(line)
        line += len(LINE_BREAK.findall(value))
    return tuple(lines)


def _fault(text: str, line: int) -> tuple[int, int]:
    """Line and column of the first field that is not CSV, in the row that begins on `line`."""
    row = "".join(list(io.StringIO(text, newline=""))[line - 1 :])
    at, column = 0, 1
    while (field := FIELD.match(row, at)) and len(field.group()) <= csv.field_size_limit():
        at, column = field.end(), column + 1
    return line + len(LINE_BREAK.findall(row[:at])), column


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
