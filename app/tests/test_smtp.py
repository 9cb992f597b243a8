"""The mailer, against a real SMTP server."""

from __future__ import annotations

import smtplib
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trustme
from aiosmtpd.smtp import AuthResult
from conftest import DROP, HANG, MailServer, free_port

from campaigns.settings import Smtp
from campaigns.smtp import Dropped, InDoubt, Mailer, Refused, Unreachable, Unsendable

MAIL = b"Subject: x\r\n\r\n.dot\r\n..\r\nend\r\n"


def server_of(mail_server: MailServer, **changes: Any) -> Smtp:
    values = {
        "security": "smtp",
        "host": "127.0.0.1",
        "port": mail_server.port,
        "user": None,
        "password": None,
        "ca_file": None,
        "reply_seconds": 5,
        **changes,
    }
    return Smtp(**values)


def send(mailer: Mailer, to: str = "a@example.com", allow: Callable[[], bool] = lambda: True) -> str | None:
    return mailer.send("news@example.com", to, MAIL, allow)


def test_many_mails_use_one_session_and_arrive_unchanged(mail_server: MailServer) -> None:
    with Mailer(server_of(mail_server)) as mailer:
        for number in range(3):
            assert send(mailer, f"user{number}@example.com") == "250 OK queued"
    assert mail_server.sessions == 1
    assert len(mail_server.mails) == 3
    assert mail_server.mails[0][1].get_payload() == ".dot\r\n..\r\nend\r\n"


@pytest.mark.parametrize(("reply", "temporary"), [("451 later", True), ("550 no such user", False)])
def test_a_refusal_is_told_and_the_session_goes_on(
    mail_server: MailServer, reply: str, temporary: bool
) -> None:
    mail_server.rcpt_replies["a@example.com"].append(reply)
    mail_server.data_replies["b@example.com"].append(reply)
    with Mailer(server_of(mail_server)) as mailer:
        for to in ("a@example.com", "b@example.com"):
            with pytest.raises(Refused, match=reply) as refused:
                send(mailer, to)
            assert refused.value.temporary is temporary
        assert send(mailer, "c@example.com")
    assert mail_server.sessions == 1
    assert mail_server.received() == {"c@example.com": 1}


@pytest.mark.parametrize("goodbye", [DROP, "421 too many mails here"])
def test_a_session_that_breaks_before_data_is_opened_once_more(
    mail_server: MailServer, goodbye: object
) -> None:
    mail_server.rcpt_replies["b@example.com"].append(goodbye)
    with Mailer(server_of(mail_server)) as mailer:
        send(mailer)
        assert send(mailer, "b@example.com")
    assert mail_server.sessions == 2
    assert mail_server.received() == {"a@example.com": 1, "b@example.com": 1}


def test_a_server_that_drops_every_session_before_data(mail_server: MailServer) -> None:
    mail_server.rcpt_replies["a@example.com"].extend([DROP, DROP])
    with Mailer(server_of(mail_server)) as mailer:
        with pytest.raises(Dropped):
            send(mailer)
        assert send(mailer, "b@example.com")


def test_a_server_that_drops_two_mails_in_a_row_is_unreachable(mail_server: MailServer) -> None:
    for to in ("a@example.com", "c@example.com", "d@example.com"):
        mail_server.rcpt_replies[to].extend([DROP, DROP])
    with Mailer(server_of(mail_server)) as mailer:
        with pytest.raises(Dropped):
            send(mailer)
        assert send(mailer, "b@example.com")
        with pytest.raises(Dropped):
            send(mailer, "c@example.com")
        with pytest.raises(Unreachable):
            send(mailer, "d@example.com")


@pytest.mark.parametrize("reply", [DROP, HANG, "999 what"])
def test_no_answer_after_the_mail_has_left_is_doubt(mail_server: MailServer, reply: object) -> None:
    mail_server.data_replies["a@example.com"].append(reply)
    with Mailer(server_of(mail_server, reply_seconds=0.3)) as mailer:
        with pytest.raises(InDoubt):
            send(mailer)
        assert send(mailer, "b@example.com")
    assert mail_server.sessions == 2


@pytest.mark.parametrize("to", ["jürgen@example.com", "a@example.com>\r\nRCPT TO:<eve@example.com"])
def test_an_address_that_smtp_cannot_tell_is_named_and_the_next_mail_is_sent(
    mail_server: MailServer, to: str
) -> None:
    with Mailer(server_of(mail_server)) as mailer:
        send(mailer)
        with pytest.raises(Unsendable, match=r"^RCPT: the address cannot be told to a mail server: "):
            send(mailer, to)
        assert send(mailer, "b@example.com")
    assert mail_server.received() == {"a@example.com": 1, "b@example.com": 1}


def test_an_address_is_told_as_it_is(mail_server: MailServer) -> None:
    odd = ["!#$%&'*+-/=?^_`{|}~@example.com", "=?x@example.com", "a.b+c@[127.0.0.1]"]
    with Mailer(server_of(mail_server)) as mailer:
        for to in odd:
            send(mailer, to)
    assert [address for address, _ in mail_server.mails] == odd


@pytest.mark.parametrize(
    ("after", "outcome"), [(b"RCPT", RuntimeError), (b"DATA", RuntimeError), (b"Subject", InDoubt)]
)
def test_what_nobody_foresaw_leaves_no_half_mail_behind(
    mail_server: MailServer, monkeypatch: pytest.MonkeyPatch, after: bytes, outcome: type[Exception]
) -> None:
    write = smtplib.SMTP.send

    def send_and_fail(self: smtplib.SMTP, data: str | bytes) -> None:
        write(self, data)
        if (data if isinstance(data, bytes) else data.encode()).startswith(after):
            monkeypatch.undo()
            raise RuntimeError("nobody knows")

    monkeypatch.setattr(smtplib.SMTP, "send", send_and_fail)
    with Mailer(server_of(mail_server)) as mailer:
        with pytest.raises(outcome, match="nobody knows"):
            send(mailer)
        assert send(mailer, "b@example.com")
    assert mail_server.received()["b@example.com"] == 1
    assert mail_server.sessions == 2


def test_goodbye_instead_of_an_acceptance_is_a_temporary_refusal(mail_server: MailServer) -> None:
    mail_server.data_replies["a@example.com"].append("421 shutting down")
    with Mailer(server_of(mail_server)) as mailer, pytest.raises(Refused) as refused:
        send(mailer)
    assert refused.value.temporary


def test_nothing_is_sent_when_begin_data_forbids_it(mail_server: MailServer) -> None:
    with Mailer(server_of(mail_server)) as mailer:
        assert send(mailer, allow=lambda: False) is None
        assert send(mailer, "b@example.com")
    assert mail_server.sessions == 1
    assert mail_server.received() == {"b@example.com": 1}


def test_a_refused_sender_is_no_recipients_fault(mail_server: MailServer) -> None:
    mail_server.mail_replies.extend(["550 not you", "451 not now", "552 too large"])
    with Mailer(server_of(mail_server)) as mailer:
        with pytest.raises(Unreachable, match="refuses the sender: 550 not you"):
            send(mailer)
        for _ in range(2):
            with pytest.raises(Refused):
                send(mailer)
        assert send(mailer)


def test_no_server_is_unreachable(mail_server: MailServer) -> None:
    with (
        Mailer(server_of(mail_server, port=free_port())) as mailer,
        pytest.raises(Unreachable, match="refused"),
    ):
        send(mailer)


def test_a_server_that_greets_with_a_refusal_is_unreachable(mail_server: MailServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(b"554 go away\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        server = server_of(mail_server, port=listener.getsockname()[1])
        with Mailer(server) as mailer, pytest.raises(Unreachable, match="554 go away"):
            send(mailer)
        thread.join()


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, str]:
    """A server's TLS context for 127.0.0.1 and the file of the CA behind it."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    file = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    return context, str(file)


def authenticate(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
    return AuthResult(success=(data.login, data.password) == (b"ada", b"secret"), handled=False)


def secured(mail_server: MailServer, context: ssl.SSLContext, scheme: str) -> MailServer:
    mail_server.stop()
    if scheme == "smtps":
        mail_server.options = {"ssl_context": context}
    else:
        mail_server.options = {"tls_context": context, "require_starttls": True}
    mail_server.options |= {
        "authenticator": authenticate,
        "auth_required": True,
        "auth_require_tls": scheme != "smtps",
    }
    mail_server.start()
    return mail_server


# The server cannot know that it is within TLS from the first byte on.
@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
@pytest.mark.parametrize("scheme", ["smtps", "smtp+starttls"])
def test_a_login_over_tls(mail_server: MailServer, tls: tuple[ssl.SSLContext, str], scheme: str) -> None:
    context, ca_file = tls
    secured(mail_server, context, scheme)
    login = {"user": "ada", "password": "secret"}
    with Mailer(server_of(mail_server, security=scheme, ca_file=ca_file, **login)) as mailer:
        assert send(mailer)
        assert send(mailer, "b@example.com")

    with (
        Mailer(server_of(mail_server, security=scheme, ca_file=ca_file, user="ada", password="x")) as mailer,
        pytest.raises(Unreachable, match="535") as refused,
    ):
        send(mailer)
    with (
        Mailer(server_of(mail_server, security=scheme, ca_file=ca_file, user="ada", password="é")) as mailer,
        pytest.raises(Unreachable, match="is not ASCII") as unsaid,
    ):
        send(mailer)
    assert "é" not in str(unsaid.value)
    assert "x" not in str(refused.value).split()
    with (
        Mailer(server_of(mail_server, security=scheme, **login)) as mailer,
        pytest.raises(Unreachable, match="certificate"),
    ):
        send(mailer)


def test_required_tls_is_never_left_out(mail_server: MailServer) -> None:
    with (
        Mailer(server_of(mail_server, security="smtp+starttls")) as mailer,
        pytest.raises(Unreachable, match="STARTTLS"),
    ):
        send(mailer)
    assert mail_server.mails == []
