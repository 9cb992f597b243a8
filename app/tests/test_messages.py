from __future__ import annotations

import email
import email.policy
import io
import tarfile
from email.message import EmailMessage
from pathlib import Path
from typing import cast

import pytest

from campaigns import messages
from campaigns.messages import MessageError, Template

SENDER = messages.sender("Jürgen Müller <news@example.com>")


def mail_of(template: Template, columns: dict[str, str]) -> EmailMessage:
    content = messages.render(template, columns)
    data = messages.build("spring", SENDER, content, columns)
    return cast(EmailMessage, email.message_from_bytes(data, policy=email.policy.default))


def body(mail: EmailMessage, kind: str) -> str:
    part = mail.get_body((kind,))
    assert part
    return str(part.get_content()).replace("\r\n", "\n")


def test_columns_fill_subject_text_and_escaped_html() -> None:
    template = Template("Hi {{ name }}", "Dear {{ name }}", "<b>{{ name }}</b>")
    mail = mail_of(template, {"email": "a@example.com", "name": "<Ä & Co>"})
    assert mail["Subject"] == "Hi <Ä & Co>"
    assert body(mail, "plain") == "Dear <Ä & Co>\n"
    assert body(mail, "html") == "<b>&lt;Ä &amp; Co&gt;</b>\n"
    assert mail["To"] == "a@example.com"
    assert mail["From"].addresses[0].display_name == "Jürgen Müller"


def test_a_mail_without_html_is_plain_text() -> None:
    mail = mail_of(Template("s", "t"), {"email": "a@example.com"})
    assert mail.get_content_type() == "text/plain"


def test_the_message_id_depends_on_campaign_and_recipient_only() -> None:
    columns = {"email": "a@example.com"}
    first, second = (mail_of(Template(subject, "t"), columns)["Message-ID"] for subject in "ab")
    assert first == second == messages.message_id("spring", "A@example.com", "example.com")
    assert first != messages.message_id("autumn", "a@example.com", "example.com")
    assert first != messages.message_id("spring", "b@example.com", "example.com")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\x0b", "\u2028", "\x85"])
def test_a_value_cannot_add_a_header(newline: str) -> None:
    mail = mail_of(
        Template("Hi {{ name }}", "t"), {"email": "a@example.com", "name": f"x{newline}Bcc: eve@example.com"}
    )
    assert mail["Bcc"] is None
    assert mail["Subject"] == "Hi x Bcc: eve@example.com"


def test_mails_need_no_eight_bit_server_and_no_long_lines() -> None:
    template = Template("Grüße " * 50, "Größe " * 300, "<p>" + "ß" * 2000)
    data = messages.build("c", SENDER, template, {"email": "a@example.com"})
    assert data.isascii()
    assert max(map(len, data.split(b"\r\n"))) <= 998
    assert b"\n" not in data.replace(b"\r\n", b"")


def test_a_long_unsubscribe_url_arrives_whole() -> None:
    url = "https://example.com/unsubscribe?token=" + "a1b2" * 60
    columns = {"email": "a@example.com", "unsubscribe": url}
    data = messages.build("c", SENDER, Template("s", "t"), columns)
    assert f"\r\nList-Unsubscribe: <{url}>\r\n".encode() in data


def test_no_unsubscribe_header_without_a_value() -> None:
    mail = mail_of(Template("s", "t"), {"email": "a@example.com", "unsubscribe": ""})
    assert mail["List-Unsubscribe"] is None


def test_an_unknown_column_is_named_with_file_and_line() -> None:
    template = Template("s", "Hello\n{{ name }}\n{{ nmae }}", "")
    with pytest.raises(MessageError) as error:
        messages.check(template, ["email", "name"])
    assert str(error.value) == "body.txt, line 3: unknown column 'nmae', the list has: email, name"


def test_variables_of_the_template_itself_are_no_columns() -> None:
    messages.check(Template("{% for i in range(3) %}{{ i }}{% endfor %}{% set x = name %}", "t"), ["name"])


def test_a_template_with_a_syntax_error_is_refused_with_file_and_line() -> None:
    with pytest.raises(MessageError, match=r"^body.html, line 2: "):
        messages.check(Template("s", "t", "<p>\n{{ name"), ["name"])


@pytest.mark.parametrize(
    "source",
    [
        "{{ name.__class__.__mro__ }}",
        "{{ name.x }}",
        "{{ 1 // 0 }}",
        "{{ name | int + name }}",
        "{{ missing }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(source: str) -> None:
    with pytest.raises(MessageError, match=r"^body.txt: "):
        messages.render(Template("s", source), {"name": "x"})


@pytest.mark.parametrize("value", ["", "news", "News <news>", "a@example.com\nBcc: b@example.com", "a@b@c"])
def test_a_bad_sender_is_refused(value: str) -> None:
    with pytest.raises(MessageError, match="not an e-mail address"):
        messages.sender(value)


def test_the_packaged_template_fits_its_columns() -> None:
    template = messages.packaged("welcome")
    messages.check(template, ["email", "name"])
    assert messages.render(template, {"email": "a@example.com", "name": "Ada"}).html


def test_an_unknown_packaged_template_names_those_there_are() -> None:
    for name in ("nope", "../welcome", "/etc"):
        with pytest.raises(MessageError, match="there is: welcome"):
            messages.packaged(name)


def test_a_folder_without_html_is_a_template(tmp_path: Path) -> None:
    (tmp_path / "subject.txt").write_text("s")
    (tmp_path / "body.txt").write_text("t")
    assert messages.from_folder(tmp_path) == Template("s", "t", "")


def test_a_folder_without_a_subject_is_refused(tmp_path: Path) -> None:
    (tmp_path / "body.txt").write_text("t")
    with pytest.raises(MessageError, match=r"holds no subject.txt"):
        messages.from_folder(tmp_path)


def test_a_template_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "subject.txt").write_text("s")
    (tmp_path / "body.txt").write_bytes(b"a\n\xff")
    with pytest.raises(MessageError, match=r"body.txt, line 2: not UTF-8"):
        messages.from_folder(tmp_path)


def bundle(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:  # type: ignore[call-overload]  # wants a literal
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


FILES = {"./x/subject.txt": b"s", "./x/body.txt": b"t", "./x/recipients.csv": b"email\n", "./x/README": b""}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_bundle_carries_list_and_template(mode: str) -> None:
    assert messages.from_bundle(bundle(FILES, mode)) == (Template("s", "t", ""), b"email\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a tar archive"),
        (b"email\na@example.com\n", "not a tar archive"),
        (bundle(FILES)[:60], "not a tar archive"),
        (bundle({"subject.txt": b"s", "body.txt": b"t"}), "no recipients.csv"),
        (bundle({"subject.txt": b"s", "recipients.csv": b"x"}), "no body.txt"),
        (bundle({**FILES, "y/body.txt": b"t"}), "body.txt twice"),
    ],
    ids=["nothing", "no archive", "cut off", "no list", "no text", "two texts"],
)
def test_a_bad_bundle_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(MessageError, match=message):
        messages.from_bundle(data)
