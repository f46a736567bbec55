"""A TCP proxy in front of a server: it passes bytes on, cuts every connection, or goes silent with all of them open."""

from __future__ import annotations

import contextlib
import select
import socket
import threading


class Proxy:
    """Listens on a free port of the loopback and forwards to `target`, until it is closed."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._frozen = self._cut = self._closed = False
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def freeze(self) -> None:
        """Nothing passes any more, in either direction; new connections are accepted and get no answer."""
        self._frozen = True

    def cut(self) -> None:
        """Every connection is closed, and new ones are as soon as they come."""
        self._cut = True

    def restore(self) -> None:
        """Bytes pass again; what a frozen connection had sent in the meantime arrives late."""
        self._frozen = self._cut = False

    def close(self) -> None:
        """Ends the proxy and everything that goes through it."""
        self._closed = True
        self._thread.join(5)
        self._listener.close()

    def _forward(self) -> None:
        while not self._closed:
            if self._cut:
                for one in list(self._pairs):
                    self._drop(one)
            watched = [self._listener, *([] if self._frozen else self._pairs)]
            for ready in select.select(watched, [], [], 0.05)[0]:
                if ready is self._listener:
                    self._accept()
                elif ready in self._pairs:
                    self._pass_on(ready)
        for one in list(self._pairs):
            self._drop(one)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if self._cut:
            client.close()
            return
        try:
            server = socket.create_connection(self._target, timeout=1)
        except OSError:
            client.close()
            return
        self._pairs |= {client: server, server: client}

    def _pass_on(self, one: socket.socket) -> None:
        try:
            data = one.recv(65536)
            self._pairs[one].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._drop(one)

    def _drop(self, one: socket.socket) -> None:
        other = self._pairs.pop(one, None)
        if other is not None:
            self._pairs.pop(other, None)
            for end in (one, other):
                with contextlib.suppress(OSError):
                    end.close()
