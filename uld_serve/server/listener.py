"""The socket side: uvicorn on its pure-Python parser, with deadlines for silent senders and stalled readers, and a
shutdown that lets requests finish. Used by command and by tests. Knows no route.

Measured on uvicorn as it comes: a connection that sends nothing, or half a header, lives for ever; so does a
response whose reader has stopped reading.
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar, Literal, cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from uld_serve.errors import EngineStopped, InvalidRequest
from uld_serve.server.admission import Backend
from uld_serve.server.faults import error_body
from uld_serve.server.settings import Limits

BACKLOG = 2048
KEEP_ALIVE_S = 15
START_INTERVAL_S = 0.01
END_MARGIN_S = 3  # for the error events of those that the grace did not suffice for


class Deadline:
    """Aborts a connection unless it is cleared in time."""

    def __init__(self, transport: asyncio.Transport, seconds: float) -> None:
        self._transport = transport
        self._seconds = seconds
        self._handle: asyncio.TimerHandle | None = None

    def set(self) -> None:
        """Start the clock, if it does not run: a byte now and then must not reset it."""
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(self._seconds, self._transport.abort)

    def clear(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class DeadlineProtocol(H11Protocol):
    """HTTP/1.1 whose request headers must come within read_timeout_s of their first byte (or of the connection), and
    whose writes must not stall for write_timeout_s. The body's own deadline is body.read_body's."""

    limits: ClassVar[Limits] = Limits()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stream = cast(asyncio.Transport, transport)
        self._reading = Deadline(self._stream, self.limits.read_timeout_s)
        self._writing = Deadline(self._stream, self.limits.write_timeout_s)
        super().connection_made(self._stream)
        self._reading.set()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # No request in progress: these bytes were part of a header, or a body that nobody waits for.
        if self.cycle is None or self.cycle.response_complete:
            self._reading.set()
        else:
            self._reading.clear()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing.set()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        self._reading.clear()
        self._writing.clear()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words, in its shape; we have ours
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self._stream.abort()  # garbage behind a request that is being answered
            return
        body = error_body(InvalidRequest("this is not a valid HTTP/1.1 request")).json_bytes()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self._stream.write(self.conn.send(event) or b"")
        self._stream.close()


class Listener(uvicorn.Server):
    """Serves until told to stop; then finishes what runs within grace_s and ends the rest with an error."""

    def __init__(
        self,
        app: FastAPI,
        backend: Backend,
        limits: Limits,
        *,
        on_ready: Callable[[], None] | None = None,
        on_hangup: Callable[[], None] | None = None,
        beside: Beside | None = None,
    ) -> None:
        """`on_hangup` is called in the event loop on SIGHUP; `beside` serves as long as this one."""
        super().__init__(_config(app, limits, lifespan="on"))
        self._backend = backend
        self._grace_s = limits.grace_s
        self._on_ready = on_ready
        self._on_hangup = on_hangup
        self._beside = beside
        self._serving_beside: asyncio.Task[None] | None = None

    def use_limits(self, limits: Limits) -> None:
        """For connections that come from now on."""
        self._grace_s = limits.grace_s
        for server in (self, self._beside):
            if server is not None:
                _set_limits(server.config, limits)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._beside is not None:
            self._serving_beside = asyncio.create_task(self._beside.serve())
            while not (self._beside.started or self._serving_beside.done()):
                await asyncio.sleep(START_INTERVAL_S)
        if self._on_hangup is not None and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_hangup)
        if self._on_ready is not None:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._backend.is_draining = True
        error = EngineStopped("the server is stopping; send the request again")
        end = asyncio.get_running_loop().call_later(self._grace_s, self._backend.in_flight.end_all, error)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()
            if self._beside is not None and self._serving_beside is not None:
                self._beside.should_exit = True
                await self._serving_beside


class Beside(uvicorn.Server):
    """A second application in the event loop of a Listener, which starts and stops it; signals are the Listener's."""

    def __init__(self, app: FastAPI, limits: Limits, sock: socket.socket) -> None:
        super().__init__(_config(app, limits, lifespan="off"))
        self._sock = sock

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super().serve([self._sock] if sockets is None else sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(app: FastAPI, limits: Limits, *, lifespan: Literal["on", "off"]) -> uvicorn.Config:
    protocol = type("LimitedProtocol", (DeadlineProtocol,), {"limits": limits})
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan=lifespan,
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=_shutdown_s(limits),
        h11_max_incomplete_event_size=limits.header_bytes,
    )


def _set_limits(config: uvicorn.Config, limits: Limits) -> None:
    protocol = config.http_protocol_class
    assert issubclass(protocol, DeadlineProtocol)
    protocol.limits = limits
    config.timeout_graceful_shutdown = _shutdown_s(limits)
    config.h11_max_incomplete_event_size = limits.header_bytes


def _shutdown_s(limits: Limits) -> int:
    return int(limits.grace_s) + END_MARGIN_S


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that holds the address but does not listen yet, so that a taken port shows before a model loads."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = found[0]
        with ExitStack() as on_failure:
            # With proto 0 asyncio would leave Nagle's algorithm on: 44 ms an answer instead of 2.
            sock = on_failure.enter_context(socket.socket(family, kind, proto))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            on_failure.pop_all()
    except OSError as error:
        raise InvalidRequest(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return sock


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
