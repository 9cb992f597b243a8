from __future__ import annotations

import email
import email.policy
import io
import random
import re
import tarfile
from email.message import EmailMessage
from pathlib import Path
from typing import cast

import mailreader
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
    with pytest.raises(MessageError, match=r"^body.txt, line 2: "):
        messages.render(Template("s", f"x\n{source}"), {"name": "x"})


def test_thousands_of_subjects_and_names_read_back_as_given() -> None:
    """By a reader of its own. With other versions of Python: molecule/shared/tests/test_campaign.py."""
    tried = mailreader.try_all(seed=1)
    assert re.fullmatch(r"5\d{3} subjects and 5\d{3} names in 16 scripts, .*", tried)


@pytest.mark.parametrize(
    ("rendered", "subject"),
    [
        ("a  b   c", "a  b   c"),
        ("  Hi \n", "Hi"),
        ("Hi \r\n\n\t there", "Hi there"),
        ("\tx\ty", "x\ty"),
        ("\u3000x\u00a0", "\u3000x\u00a0"),
        ("👨\u200d👩\u200d👧 ف\u200cک", "👨\u200d👩\u200d👧 ف\u200cک"),
        ("=?utf-8?q?x?=", "=?utf-8?q?x?="),
    ],
)
def test_a_subject_is_one_line_and_keeps_its_spaces(rendered: str, subject: str) -> None:
    columns = {"email": "a@example.com", "subject": rendered}
    content = messages.render(Template("{{ subject }}", "t"), columns)
    head = mailreader.read_head(messages.build("c", SENDER, content, columns))
    assert mailreader.read_text(head["Subject"])[0] == subject


@pytest.mark.parametrize(
    ("subject", "text", "message"),
    [
        ("\u200b\x07", "t", r"^subject.txt: no mail can hold the control character U\+0007 here"),
        ("a\x85b\x9f", "t", r"^subject.txt: no mail can hold the control character U\+009F here"),
        ("{{ '\\ud800' }}", "t", r"^subject.txt: no mail can hold half of a character \(U\+D800\) here"),
        ("{{ email[9:] }} ", "t", r"^subject.txt: the subject is empty"),
        ("s", "a\0", r"^body.txt: no mail can hold the control character U\+0000 here"),
        ("s", "{{ '\\udfff' }}", r"^body.txt: no mail can hold half of a character \(U\+DFFF\) here"),
    ],
)
def test_what_cannot_become_a_mail_is_refused(subject: str, text: str, message: str) -> None:
    columns = {"email": "a@b.de"}
    with pytest.raises(MessageError, match=message):
        messages.build("c", SENDER, messages.render(Template(subject, text), columns), columns)


def test_a_template_with_a_control_character_is_refused_with_file_and_line() -> None:
    messages.check(Template("s\r\n", "\x07\x0b\x85\u2028"), [])
    for template, message in (
        (Template("s\n\x07", "t"), "subject.txt, line 2: no mail can hold the control character U+0007 here"),
        (Template("s", "\n\nt\0"), "body.txt, line 3: no mail can hold the control character U+0000 here"),
    ):
        with pytest.raises(MessageError) as error:
            messages.check(template, [])
        assert str(error.value) == message


def test_any_body_becomes_a_mail_that_reads_back_or_is_refused() -> None:
    choose = random.Random(1)
    pieces = [
        "a",
        "\n",
        "\r",
        "\r\n",
        ".",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x85",
        "\u2028",
        "ü",
        "中",
        "🎉",
        "From ",
        " ",
    ]
    pieces += ["x" * 997, "x" * 1200, "ф" * 500, "\x07", "\x7f", "\t", "=", " \n", "--", "\0", "\udc80"]
    refused = 0
    for _ in range(1000):
        text, html = ("".join(choose.choices(pieces, k=choose.randint(0, 20))) for _ in range(2))
        try:
            data = messages.build("c", SENDER, Template("s", text, html), {"email": "a@example.com"})
        except MessageError:
            assert re.search("[\0\udc80]", text + html)
            refused += 1
            continue
        assert data.isascii()
        assert b"\0" not in data
        assert not re.search(rb"\r(?!\n)|(?<!\r)\n", data)
        assert max(map(len, data.split(b"\r\n"))) <= 998
        mail = cast(EmailMessage, email.message_from_bytes(data, policy=email.policy.default))
        for kind, given in (("plain", text), ("html", html)):
            if given:
                lines = re.split(r"\r\n|\r|\n", given)
                assert body(mail, kind).removesuffix("\n") == "\n".join(lines).removesuffix("\n")
    assert 100 < refused < 900


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("news@example.com", ""),
        ("<news@example.com>", ""),
        (" News  of the day < news@example.com > ", "News  of the day"),
        ('"Doe, Jane" <news@example.com>', "Doe, Jane"),
        ("Doe, Jane <news@example.com>", "Doe, Jane"),
        (r'"Jane \"JD\" Doe \\" <news@example.com>', 'Jane "JD" Doe \\'),
        ('Jane "JD" Doe <news@example.com>', 'Jane "JD" Doe'),
        ('"a <b@c.example>" <news@example.com>', "a <b@c.example>"),
        ("info@shop.example <news@example.com>", "info@shop.example"),
        ("=?utf-8?q?x?= <news@example.com>", "=?utf-8?q?x?="),
        ("👨\u200d👩\u200d👧 & Söhne <news@example.com>", "👨\u200d👩\u200d👧 & Söhne"),
        ('"" <news@example.com>', ""),
    ],
)
def test_a_sender_is_one_mailbox_that_reads_as_given(value: str, name: str) -> None:
    origin = messages.sender(value)
    data = messages.build("c", origin, Template("s", "t"), {"email": "a@example.com"})
    assert (origin.display_name, origin.addr_spec) == (name, "news@example.com")
    read = mailreader.read_mailbox(mailreader.read_head(data)["From"])
    assert (read[0], read[2]) == (name, "news@example.com")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("A <a@example.com>, B <b@example.com>", "more than one address"),
        ("<script> <a@example.com>", "more than one address, or its name lacks double quotes"),
        ("a@example.com, b@example.com", "not an e-mail address"),
        ("x\nBcc: eve@example.com <a@example.com>", r"holds a line break \(U\+000A\)"),
        ("x\x1b <a@example.com>", r"holds the control character U\+001B"),
        ("\udcff <a@example.com>", r"'\\udcff <a@example.com>' holds half of a character \(U\+DCFF\)"),
        ("x <=?utf-8?q?adam?=@example.com>", r"RFC 2047"),
    ],
)
def test_a_sender_that_is_no_mailbox_is_refused(value: str, message: str) -> None:
    with pytest.raises(MessageError, match=message):
        messages.sender(value)


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
