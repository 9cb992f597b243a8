"""Turns a template and one recipient's columns into a mail."""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, localtime
from functools import lru_cache
from importlib import resources
from pathlib import Path, PurePosixPath
from traceback import walk_tb

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2 import Template as Jinja
from jinja2.sandbox import SandboxedEnvironment

from campaigns import headers, recipients

FILES = {"subject": "subject.txt", "text": "body.txt", "html": "body.html"}
MAX_FILE = 64 * 2**20  # bytes of one file of a bundle


# Seven bits only, so that no mail depends on the server's 8BITMIME.
POLICY = SMTP.clone(cte_type="7bit")
# A body holds no NUL (RFC 5322, 2.3), and a lone surrogate is no character.
UNWANTED = re.compile("[\0\ud800-\udfff]")
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


class MessageError(Exception):
    """A template, a sender or a mail cannot be used; the message says where and why.

    `character` is the one that is at fault, if it is one.
    """

    def __init__(self, text: str, character: str = "") -> None:
        super().__init__(text)
        self.character = character


@dataclass(frozen=True)
class Mailbox:
    """Whom a mail is from: `display_name` may be empty, `addr_spec` is the address in ASCII."""

    display_name: str
    addr_spec: str

    @property
    def domain(self) -> str:
        """What follows the `@`."""
        return self.addr_spec.rpartition("@")[2]


@dataclass(frozen=True)
class Template:
    """The parts of a mail, as sources or rendered; `html` may be empty."""

    subject: str
    text: str
    html: str = ""


_text = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
_html = SandboxedEnvironment(undefined=StrictUndefined, autoescape=True)


def packaged(name: str) -> Template:
    """Return a template that comes with the package."""
    folder = resources.files("campaigns") / "templates"
    known = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if name not in known:
        raise MessageError(f"no packaged template {name!r}, there is: {', '.join(known)}")
    return _template({file: (folder / name / file).read_bytes() for file in FILES.values()}, name)


def from_folder(folder: Path) -> Template:
    """Return the template of a folder with subject.txt, body.txt and, if the mail has one, body.html."""
    contents = {}
    for name in FILES.values():
        try:
            contents[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise MessageError(f"{folder / name}: {error.strerror}") from error
    return _template(contents, str(folder))


def from_bundle(data: bytes) -> tuple[Template, bytes]:
    """Return the template and the recipient list (recipients.csv) of a tar archive, compressed or not."""
    wanted = {*FILES.values(), "recipients.csv"}
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name not in wanted or not member.isfile():
                    continue
                if name in contents:
                    raise MessageError(f"the bundle holds {name} twice")
                if member.size > MAX_FILE:
                    raise MessageError(f"{name} in the bundle is larger than {MAX_FILE // 2**20} MiB")
                file = archive.extractfile(member)
                contents[name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise MessageError(f"the bundle is not a tar archive: {error}") from error
    if "recipients.csv" not in contents:
        raise MessageError("the bundle holds no recipients.csv")
    return _template(contents, "the bundle"), contents["recipients.csv"]


def check(template: Template, columns: Iterable[str]) -> None:
    """Raise MessageError if a template is no Jinja2 or names a column that the list does not have."""
    known = sorted(columns)
    for field in fields(template):
        where, source = FILES[field.name], getattr(template, field.name)
        for found in (headers.UNWANTED if field.name == "subject" else UNWANTED).finditer(source):
            # A subject's file ends in a line break, as all files do.
            if not headers.is_line_break(found.group()):
                line = source.count("\n", 0, found.start()) + 1
                what = headers.describe(found.group())
                raise MessageError(f"{where}, line {line}: no mail can hold {what} here")
        try:
            tree = _text.parse(source)
            # It compiles the template, and so finds unknown filters and tests as well.
            unknown = meta.find_undeclared_variables(tree) - set(known)
        except TemplateSyntaxError as error:
            raise MessageError(f"{where}, line {error.lineno}: {error.message}") from error
        for node in tree.find_all(nodes.Name):
            if node.name in unknown:
                has = ", ".join(known)
                raise MessageError(
                    f"{where}, line {node.lineno}: unknown column {node.name!r}, the list has: {has}"
                )


def sender(value: str) -> Mailbox:
    """Parse `Name <address>` or a bare address. Raises MessageError.

    A name is taken as it stands. One in double quotes, as mails have it, is what the quotes hold.
    """
    name, address = "", value.strip(" ")
    if address.endswith(">"):
        name, _, address = address[:-1].rpartition("<")
        name, address = name.strip(" "), address.strip(" ")
    if quoted := QUOTED.fullmatch(name):
        name = re.sub(r"\\(.)", r"\1", quoted[1])
    elif "<" in name or ">" in name:
        raise MessageError(f"the sender {value!r} is more than one address, or its name lacks double quotes")
    try:
        headers.check(f"the name of the sender {value!r}", name)
        return Mailbox(name, recipients.checked_address(address))
    except headers.HeaderError as error:
        raise MessageError(str(error), error.character) from error
    except recipients.AddressError as error:
        raise MessageError(f"the sender {value!r}: {error}; give 'Name <name@example.com>'") from error


def message_id(campaign_id: str, email: str, domain: str) -> str:
    """Return the Message-ID that this recipient's mail has, however often it is built."""
    digest = hashlib.sha256(f"{campaign_id}\n{email.casefold()}".encode()).hexdigest()[:32]
    return f"<{digest}@{domain}>"


def render(template: Template, columns: dict[str, str]) -> Template:
    """Return a template filled with one recipient's columns. Raises MessageError.

    Values reach the subject and the text as they are, the HTML escaped. A subject is one line: a line break
    with the white space around it becomes a space, white space at both ends is left out.
    """
    parts = {}
    for part, name in FILES.items():
        try:
            parts[part] = _compile(part, getattr(template, part)).render(columns)
        except MemoryError:
            raise  # which is not the template's fault alone
        except Exception as error:  # whatever a template's expressions may raise
            raise MessageError(f"{name}{_line(error)}: {reason(error)}") from error
    parts["subject"] = " ".join(filter(None, (line.strip(" \t") for line in parts["subject"].splitlines())))
    if not parts["subject"]:
        raise MessageError(f"{FILES['subject']}: the subject is empty")
    return Template(**parts)


def build(campaign_id: str, origin: Mailbox, content: Template, columns: dict[str, str]) -> bytes:
    """Return one recipient's mail as SMTP wants it, from what `render` made. Raises MessageError."""
    head = check_mail(campaign_id, origin, content, columns)
    mail = EmailMessage(policy=POLICY)
    mail.set_content(content.text)
    if content.html:
        mail.add_alternative(content.html, subtype="html")
    return head.encode("ascii") + mail.as_bytes()


def check_mail(campaign_id: str, origin: Mailbox, content: Template, columns: dict[str, str]) -> str:
    """Return the header of one recipient's mail, but for the fields of MIME. Raises MessageError.

    What passes here, `build` makes a mail of; this takes a tenth of the time. No value can add a field: there
    are no line breaks in one.
    """
    for field in fields(content):
        unwanted = headers.UNWANTED if field.name == "subject" else UNWANTED
        if found := unwanted.search(getattr(content, field.name)):
            what = headers.describe(found.group())
            raise MessageError(f"{FILES[field.name]}: no mail can hold {what} here", found.group())
    try:
        head = [
            headers.mailbox("From", origin.display_name, origin.addr_spec),
            headers.token("To", columns["email"]),
            headers.text("Subject", content.subject),
            headers.token("Date", format_datetime(localtime())),
            headers.token("Message-ID", message_id(campaign_id, columns["email"], origin.domain)),
        ]
        if columns.get("unsubscribe"):
            head.append(headers.token("List-Unsubscribe", f"<{columns['unsubscribe']}>"))
    except ValueError as error:
        raise MessageError(str(error)) from error
    return "".join(head)


def reason(error: Exception) -> str:
    """Say what an exception says, on one line of at most 300 characters."""
    text = str(error)
    if not isinstance(error, (MessageError, TemplateError)):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split())[:300] or type(error).__name__


def _template(contents: dict[str, bytes], where: str) -> Template:
    for name in (FILES["subject"], FILES["text"]):
        if not contents.get(name, b"").strip():
            raise MessageError(f"{where} holds no {name}, or an empty one")
    sources = {}
    for field, name in FILES.items():
        try:
            sources[field] = contents.get(name, b"").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise MessageError(f"{where}: {name}, line {line}: not UTF-8") from error
    return Template(**sources)


@lru_cache(maxsize=48)
def _compile(part: str, source: str) -> Jinja:
    return (_html if part == "html" else _text).from_string(source)


def _line(error: Exception) -> str:
    """Where in a template an exception comes from, for a message."""
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return f", line {lines[-1]}" if lines else ""
