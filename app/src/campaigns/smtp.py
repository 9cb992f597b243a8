"""Hands mails to the mail server over one connection, and tells apart what it is that failed."""

from __future__ import annotations

import re
import smtplib
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import TracebackType

from campaigns import settings

COMMAND_SECONDS = 60  # for a connect and for every reply but the last
SERVICE_CLOSING = 421
TOO_LARGE = 552


class Unreachable(Exception):
    """The server takes no mail from us now: no connection, no TLS, no login, or the sender is refused."""


class Refused(Exception):
    """The server refused this mail; `temporary` tells whether it may take it later."""

    def __init__(self, stage: str, code: int, reply: str) -> None:
        super().__init__(f"{stage}: {code} {reply}")
        self.temporary = code < 500


class Dropped(Exception):
    """The connection broke before the mail's content left: nothing was sent."""


class InDoubt(Exception):
    """The connection broke after the mail's content left: nobody knows whether the server took it."""


class Unsendable(Exception):
    """This mail could be handed to no server, for instance because of its address: nothing was sent."""


class Mailer:
    """One SMTP session, opened when first needed and again when it broke. Not for several threads."""

    def __init__(self, server: settings.Smtp) -> None:
        self._server = server
        self._smtp: smtplib.SMTP | None = None
        self._dropped = 0  # mails in a row

    def __enter__(self) -> Mailer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._smtp:
            with suppress(smtplib.SMTPException, OSError):
                self._smtp.docmd("QUIT")
        self._close()

    def connect(self) -> None:
        """Open the session if there is none. Raises Unreachable."""
        if self._smtp:
            return
        try:
            self._smtp = self._open()
        except smtplib.SMTPResponseException as error:
            raise Unreachable(f"{self._server}: {error.smtp_code} {_text(error.smtp_error)}") from error
        except (smtplib.SMTPException, OSError) as error:
            raise Unreachable(f"{self._server}: {error}") from error
        except ValueError as error:
            # Of smtplib, for a login or a name that is not ASCII. Its message quotes the password.
            raise Unreachable(f"{self._server}: the host, the user or the password is not ASCII") from error

    def send(self, sender: str, recipient: str, mail: bytes, begin_data: Callable[[], bool]) -> str | None:
        """Send one mail and return the server's reply, None if `begin_data` forbade it.

        `begin_data` is asked right before DATA. A session that broke before that, as idle ones do, is opened
        once more; a server that breaks those of two mails in a row is unreachable. Raises Unreachable,
        Refused, Dropped, Unsendable or InDoubt, and what `begin_data` raises.
        """
        before, self._dropped = self._dropped, 0
        self.connect()
        try:
            return self._send(sender, recipient, mail, begin_data)
        except Dropped:
            self.connect()
        try:
            return self._send(sender, recipient, mail, begin_data)
        except Dropped as error:
            self._dropped = before + 1
            if self._dropped > 1:
                raise Unreachable(f"{self._server}: {error}") from error
            raise

    def _open(self) -> smtplib.SMTP:
        server = self._server
        tls = None if server.security == "smtp" else ssl.create_default_context(cafile=server.ca_file)
        name = _own_name()
        smtp: smtplib.SMTP
        if server.security == "smtps":
            smtp = smtplib.SMTP_SSL(server.host, server.port, name, timeout=COMMAND_SECONDS, context=tls)
        else:
            smtp = smtplib.SMTP(server.host, server.port, name, timeout=COMMAND_SECONDS)
        try:
            smtp.ehlo_or_helo_if_needed()
            if server.security == "smtp+starttls":
                smtp.starttls(context=tls)
                smtp.ehlo_or_helo_if_needed()  # what it offers may differ within TLS
            if server.user is not None and server.password is not None:
                smtp.login(server.user, server.password)
        except BaseException:
            smtp.close()
            raise
        return smtp

    def _send(self, sender: str, recipient: str, mail: bytes, begin_data: Callable[[], bool]) -> str | None:
        assert self._smtp and self._smtp.sock
        smtp, sock = self._smtp, self._smtp.sock
        try:
            size = f" SIZE={len(mail)}" if smtp.has_extn("size") else ""
            code, reply = self._command("MAIL", f"FROM:<{sender}>{size}")
            if code >= 500 and code != TOO_LARGE:
                self._reset()
                raise Unreachable(f"{self._server} refuses the sender: {code} {_text(reply)}")
            self._expect(2, "MAIL", code, reply)
            self._expect(2, "RCPT", *self._command("RCPT", f"TO:<{recipient}>"))
            if not begin_data():
                self._reset()
                return None
            self._expect(3, "DATA", *self._command("DATA"))
        except (Unreachable, Refused, Dropped):
            raise
        except (smtplib.SMTPException, OSError) as error:
            self._close()
            raise Dropped(f"the connection broke before the mail was sent: {error}") from error
        except BaseException:
            # The next mail must not begin in the middle of this one.
            self._close()
            raise
        try:
            sock.settimeout(self._server.reply_seconds)
            smtp.send(re.sub(rb"(?m)^\.", b"..", mail) + b".\r\n")
            code, reply = smtp.getreply()
            sock.settimeout(COMMAND_SECONDS)
        except (smtplib.SMTPException, OSError) as error:
            self._close()
            raise InDoubt(f"the connection broke after the mail was sent: {error}") from error
        except Exception as error:
            self._close()
            raise InDoubt(f"after the mail was sent: {type(error).__name__}: {error}") from error
        if 200 <= code < 300:
            return f"{code} {_text(reply)}"
        if 400 <= code < 600 and code != SERVICE_CLOSING:
            self._reset()
        else:
            self._close()
        if not 400 <= code < 600:
            raise InDoubt(f"the server's answer to the mail was no reply: {_text(reply)}")
        raise Refused("end of data", code, _text(reply))

    def _command(self, verb: str, argument: str = "") -> tuple[int, bytes]:
        assert self._smtp
        try:
            return self._smtp.docmd(verb, argument)
        except ValueError as error:
            # Of smtplib, before it writes: a line break, or a character beyond ASCII (SMTPUTF8).
            raise Unsendable(f"{verb}: the address cannot be told to a mail server: {error}") from error

    def _expect(self, kind: int, stage: str, code: int, reply: bytes) -> None:
        """Raise Dropped if the server takes its leave, Refused on any other reply than of the kind wanted."""
        if code == SERVICE_CLOSING:
            self._close()
            raise Dropped(f"{stage}: {code} {_text(reply)}")
        if code // 100 != kind:
            self._reset()
            raise Refused(stage, code, _text(reply))

    def _reset(self) -> None:
        """End the transaction; a session that cannot is closed, the next mail opens another."""
        try:
            if self._smtp and self._smtp.rset()[0] == 250:
                return
        except (smtplib.SMTPException, OSError):
            pass
        self._close()

    def _close(self) -> None:
        if self._smtp:
            self._smtp.close()
            self._smtp = None


@cache
def _own_name() -> str:
    """This host's name for EHLO; looked up once, a resolver may take its time."""
    name = socket.getfqdn()
    return name if "." in name else "[127.0.0.1]"


def _text(reply: bytes | str) -> str:
    """A reply on one line, at most 300 characters."""
    text = reply.decode("ascii", "replace") if isinstance(reply, bytes) else reply
    return " ".join(text.split())[:300]
