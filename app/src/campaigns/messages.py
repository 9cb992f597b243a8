"""Turns a template and one recipient's columns into a mail."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from email.headerregistry import Address, BaseHeader, HeaderRegistry, UniqueUnstructuredHeader
from email.message import EmailMessage
from email.policy import SMTP, Policy
from email.utils import localtime, parseaddr
from functools import lru_cache
from importlib import resources
from pathlib import Path, PurePosixPath

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes
from jinja2 import Template as Jinja
from jinja2.sandbox import SandboxedEnvironment

from campaigns import recipients

FILES = {"subject": "subject.txt", "text": "body.txt", "html": "body.html"}
MAX_FILE = 64 * 2**20  # bytes of one file of a bundle


class MessageError(Exception):
    """A template or sender cannot be used; the message says where and why."""


class _Unfolded(UniqueUnstructuredHeader, BaseHeader):  # type: ignore[misc]  # as HeaderRegistry does
    """A header that stays on one line: folding would tear a long URL into encoded words."""

    def fold(self, *, policy: Policy) -> str:
        return f"{self.name}: {self}{policy.linesep}"


_headers = HeaderRegistry()
_headers.map_to_type("list-unsubscribe", _Unfolded)
# Seven bits only, so that no mail depends on the server's 8BITMIME.
POLICY = SMTP.clone(cte_type="7bit", header_factory=_headers)


@dataclass(frozen=True)
class Template:
    """The parts of a mail, as sources or rendered; `html` may be empty."""

    subject: str
    text: str
    html: str = ""


@dataclass(frozen=True)
class _Compiled:
    subject: Jinja
    text: Jinja
    html: Jinja | None


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


def sender(value: str) -> Address:
    """Parse `Name <address>` or a bare address."""
    name, spec = parseaddr(value)
    spec = recipients.address(spec) or ""
    if not spec or any(ord(character) < 32 for character in value):
        raise MessageError(f"the sender {value!r} is not an e-mail address: give 'Name <name@example.com>'")
    return Address(display_name=name, addr_spec=spec)


def message_id(campaign_id: str, email: str, domain: str) -> str:
    """Return the Message-ID that this recipient's mail has, however often it is built."""
    digest = hashlib.sha256(f"{campaign_id}\n{email.casefold()}".encode()).hexdigest()[:32]
    return f"<{digest}@{domain}>"


def render(template: Template, columns: dict[str, str]) -> Template:
    """Return a template filled with one recipient's columns. Raises MessageError.

    Values reach the subject and the text as they are, the HTML escaped.
    """
    compiled = _compile(template)
    part = "subject"
    try:
        subject = compiled.subject.render(columns)
        part = "text"
        text = compiled.text.render(columns)
        part = "html"
        html = compiled.html.render(columns) if compiled.html else ""
    except Exception as error:  # whatever a template's expressions may raise
        raise MessageError(f"{FILES[part]}: {error}") from error
    return Template(subject, text, html)


def build(campaign_id: str, origin: Address, content: Template, columns: dict[str, str]) -> bytes:
    """Return one recipient's mail as SMTP wants it, from what `render` made.

    No value can add a header: line breaks in the subject become spaces, addresses and URLs were checked when
    the list was read.
    """
    mail = EmailMessage(policy=POLICY)
    mail["From"] = origin
    mail["To"] = Address(addr_spec=columns["email"])
    mail["Subject"] = "".join(c if c.isprintable() else " " for c in " ".join(content.subject.split()))
    mail["Date"] = localtime()
    mail["Message-ID"] = message_id(campaign_id, columns["email"], origin.domain)
    if columns.get("unsubscribe"):
        mail["List-Unsubscribe"] = f"<{columns['unsubscribe']}>"
    mail.set_content(content.text)
    if content.html:
        mail.add_alternative(content.html, subtype="html")
    return mail.as_bytes()


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


@lru_cache(maxsize=16)
def _compile(template: Template) -> _Compiled:
    return _Compiled(
        subject=_text.from_string(template.subject),
        text=_text.from_string(template.text),
        html=_html.from_string(template.html) if template.html else None,
    )
