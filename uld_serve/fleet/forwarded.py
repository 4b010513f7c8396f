"""One HTTP request as plain data, and an ASGI application's answer to it as batches of messages: what travels between
door and replica. Knows no Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope

logger = logging.getLogger(__name__)

MAX_WAITING = 256
CARRIED = (
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
)


@dataclass(frozen=True, slots=True)
class Forwarded:
    """`scope`: of ASGI, without what is of one process only. `body` is whole."""

    scope: dict[str, object]
    body: bytes

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> Forwarded:
        carried = {name: scope[name] for name in CARRIED if name in scope}
        address = {name: tuple(scope[name]) for name in ("client", "server") if scope.get(name)}
        return cls({**carried, **address}, body)


async def answer(app: ASGIApp, request: Forwarded) -> AsyncGenerator[list[Message], None]:
    """What `app` sends, in order, in batches of what is there. Closing it tells the app that its client is gone. An
    answer that the app breaks off ends without the message that would complete it."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue(MAX_WAITING)
    running = asyncio.create_task(_run(app, request, sent))
    try:
        is_over = False
        while not is_over:
            batch = [await sent.get()]
            while not sent.empty():
                batch.append(sent.get_nowait())
            is_over = batch[-1] is None
            if messages := [message for message in batch if message is not None]:
                yield messages
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _run(app: ASGIApp, request: Forwarded, sent: asyncio.Queue[Message | None]) -> None:
    inbox: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if inbox:
            return inbox.pop()
        await asyncio.Event().wait()  # until the one who reads has gone and this is cancelled
        raise AssertionError

    try:
        await app(dict(request.scope), receive, sent.put)
    except Exception:
        logger.exception("the application failed")
    await sent.put(None)
