"""An HTTP proxy for a local host that has IPv6 alone, where the machine reaches Debian's packages by IPv4 alone.

It runs in a container of its own, beside the hosts; see create.yml. apt asks it for whole addresses, and gets what the
server answers. usage: proxy.py PORT
"""

from __future__ import annotations

import http.client
import shutil
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP = {
    "connection",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
}  # of one connection, not of the message


class Handler(BaseHTTPRequestHandler):
    """One connection of apt."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Ask the server and hand on its answer, as far as it comes."""
        url = urlsplit(self.path)
        if url.scheme != "http" or not url.hostname:
            self.send_error(400, "only whole http:// addresses are served")
            return
        server = http.client.HTTPConnection(url.hostname, url.port or 80, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        try:
            server.request("GET", url._replace(scheme="", netloc="").geturl() or "/", headers=headers)
            answer = server.getresponse()
        except OSError as error:
            self.send_error(502, explain=f"{url.hostname}: {error}")
            return
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        if answer.length is None and answer.status not in (204, 304):  # its end is that of the connection
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        shutil.copyfileobj(answer, self.wfile)
        server.close()


class Server(ThreadingHTTPServer):
    """Listens on IPv6."""

    address_family = socket.AF_INET6


if __name__ == "__main__":
    Server(("::", int(sys.argv[1])), Handler).serve_forever()
