"""Where a fleet's requests come in: reads the body, names what could share its cache, hands both to a replica and its
answer back. It authenticates, decides and generates nothing: that is the replica's. Knows no Ray; its caller does."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from uld_serve.errors import UldError
from uld_serve.fleet.affinity import route_key
from uld_serve.fleet.forwarded import Forwarded
from uld_serve.server.body import read_bytes
from uld_serve.server.faults import error_body, error_response
from uld_serve.server.settings import Limits

logger = logging.getLogger(__name__)

Batches: TypeAlias = AsyncGenerator[list[Message], None]
BODILESS = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True, slots=True)
class Door:
    """`send_to(key, request)` has a replica answer; `error_of` puts its failures into our words."""

    send_to: Callable[[str, Forwarded], Batches]
    error_of: Callable[[Exception], UldError]
    limits: Limits
    prefix_chars: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application for HTTP."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            await self._pass(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun: list[Message] = []
        try:
            body = await self._body(scope, receive)
            key = route_key(scope["headers"], body, prefix_chars=self.prefix_chars)
            async with aclosing(self.send_to(key, Forwarded.of(scope, body))) as batches:
                async for batch in batches:
                    for message in batch:
                        begun = begun or [message]
                        await send(message)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - of whatever kind, the client is told in our words
            known = error if isinstance(error, UldError) else self.error_of(error)
            if not begun:
                await error_response(known)(scope, receive, send)
            elif _is_event_stream(begun[0]):
                event = b"data: " + error_body(known).json_bytes() + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": True})
            # An answer that has begun is left incomplete: the server cuts the connection, so that nobody takes its end
            # for a success.

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        if scope["method"] in BODILESS:
            return b""
        return await read_bytes(
            Request(scope, receive), max_bytes=self.limits.body_bytes, timeout_s=self.limits.read_timeout_s
        )


async def _live(receive: Receive, send: Send) -> None:
    """Nothing of the door's needs to be started or stopped."""
    while True:
        kind = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{kind}.complete"})
        if kind == "shutdown":
            return


def _is_event_stream(start: Message) -> bool:
    return any(
        name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"]
    )
