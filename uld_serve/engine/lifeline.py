"""How processes that share a model notice that another is gone, while none of them has anything to say. Made by ranks.
Knows nothing of what they share."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

CONNECT_TIMEOUT_S = 60.0
GOODBYE = b"."


class Lifeline:
    """Sockets that a process holds open as long as it lives: the other end sees them close when it dies, whatever the
    step loop is waiting for. `on_lost` is called once, from a thread; not if the other end has said goodbye."""

    def __init__(self, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._is_over = False
        self._sockets: list[socket.socket] = []

    @classmethod
    def listening(
        cls, host: str, count: int, on_lost: Callable[[], None]
    ) -> tuple[Lifeline, tuple[str, int]]:
        """Rank 0's, and the address that `count` others connect to."""
        lifeline = cls(on_lost)
        server = socket.create_server((host, 0))
        server.settimeout(CONNECT_TIMEOUT_S)
        address = (host, int(server.getsockname()[1]))
        threading.Thread(target=lifeline._accept, args=(server, count), daemon=True).start()
        return lifeline, address

    @classmethod
    def connected(cls, address: tuple[str, int], on_lost: Callable[[], None]) -> Lifeline:
        lifeline = cls(on_lost)
        lifeline._watch(socket.create_connection(address, timeout=CONNECT_TIMEOUT_S))
        return lifeline

    def close(self) -> None:
        """Say goodbye: what closes from now on is not a loss."""
        with self._lock:
            self._is_over = True
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.sendall(GOODBYE)

    def _accept(self, server: socket.socket, count: int) -> None:
        with server:
            try:
                for _ in range(count):
                    self._watch(server.accept()[0])
            except OSError:
                self._lost()

    def _watch(self, one: socket.socket) -> None:
        one.settimeout(None)
        self._sockets.append(one)
        threading.Thread(target=self._wait, args=(one,), daemon=True).start()

    def _wait(self, one: socket.socket) -> None:
        try:
            last_word = one.recv(1)
        except OSError:
            last_word = b""
        if not last_word:
            self._lost()

    def _lost(self) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        self._on_lost()
