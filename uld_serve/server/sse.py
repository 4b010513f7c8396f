"""Server-sent events that fail loudly: a stream that breaks sends its error as an event and is then cut off, because
clients take a clean end for success. Used by completions and chat; knows nothing of what the events say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from uld_serve.errors import UldError
from uld_serve.server.admission import wait_disconnected
from uld_serve.server.faults import error_body, internal_error
from uld_serve.server.generation import Generation

logger = logging.getLogger(__name__)

# A browser throws away what its page has not read when a connection breaks: 26 of 50 error events without a pause in
# Chromium, none of 50 with it.
LAST_WORDS_S = 0.1


class EventStream(Response):
    """Sends each body of `events` as `data: …`, then `data: [DONE]`. Closes `events` and their `source` whenever it
    ends, so that a client that leaves aborts what it asked for."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, source: Generation, headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._events = events
        self._source = source

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        gone = asyncio.create_task(wait_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            gone.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._events.aclose()
            await self._source.aclose()  # closing a generator that never began does not reach its source

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with aclosing(self._events) as events:
                async for body in events:
                    await _send_event(send, body)
        except UldError as error:
            return await _break_off(send, error)
        except Exception:
            logger.exception("a stream failed")
            return await _break_off(send, internal_error())
        await _send_event(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _break_off(send: Send, error: UldError) -> None:
    """Returns without the last body message, at which the server cuts the connection."""
    await _send_event(send, error_body(error).json_bytes())
    await asyncio.sleep(LAST_WORDS_S)


async def _send_event(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + body + b"\n\n", "more_body": True})
