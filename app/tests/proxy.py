"""A TCP proxy whose connections can be frozen, as when a network drops every packet, or cut."""

from __future__ import annotations

import contextlib
import socket
import threading


class Proxy:
    """Forwards connections to a port of this machine."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._frozen: set[socket.socket] = set()
        self._deaf = False
        self._start(self._listen, self._listener)

    @staticmethod
    def _start(function: object, *arguments: object) -> None:
        threading.Thread(target=function, args=arguments, daemon=True).start()  # type: ignore[arg-type]

    def _listen(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near = listener.accept()[0]
                if self._deaf:
                    self._frozen.add(near)
                    continue
                far = socket.create_connection(("127.0.0.1", self.target))
                self._open |= {near, far}
                self._start(self._pump, near, far)
                self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source not in self._frozen:
                    sink.sendall(data)
        if source not in self._frozen:
            self._end({source, sink})

    def _end(self, ends: set[socket.socket]) -> None:
        self._open -= ends
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes up who reads from it
            end.close()

    def freeze(self, new: bool = False) -> int:
        """Forward nothing more on the connections that there are, and close none; how many those were.

        With `new` the same goes for those to come.
        """
        self._deaf = new
        self._frozen |= self._open
        return len(self._frozen) // 2

    def cut(self) -> None:
        """Close all connections and accept no more."""
        self._end({self._listener})
        self._end(set(self._open))

    def mend(self) -> None:
        """Accept and forward new connections again, after cut() or freeze(new=True)."""
        self._deaf = False
        if self._listener.fileno() >= 0:
            return
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._start(self._listen, self._listener)

    def close(self) -> None:
        self.cut()
        self._end(self._frozen)
