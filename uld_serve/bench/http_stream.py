"""One streamed completion over HTTP/1.1 with the time of every event. Called by load. Knows nothing of when requests
are sent or how times are summed up.

Written on h11, which the server needs anyway: a full HTTP client would cost as much processor time as the tokens.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

import h11

READ_BYTES = 65536


class RequestFailed(Exception):
    """`kind` is what errors are counted by: "http 429", "error event", "broken stream"."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclass(slots=True)
class Streamed:
    """`event_times` (of time.perf_counter) are those of events with text; the others carry only usage. `event_tokens`
    are the tokens drawn up to each: a server holds text back that may still change, and sends it with a later token's.
    """

    event_times: list[float] = field(default_factory=list)
    event_tokens: list[int] = field(default_factory=list)
    completion_tokens: int = 0

    @property
    def gaps_s(self) -> list[float]:
        """Seconds a token, between one event and the next, as often as the later one brings tokens."""
        gaps: list[float] = []
        events = list(zip(self.event_times, self.event_tokens, strict=True))
        for (before, known), (after, tokens) in pairwise(events):
            new = max(tokens - known, 1)
            gaps += [(after - before) / new] * new
        return gaps


async def stream_completion(url: str, body: Mapping[str, object], headers: Mapping[str, str]) -> Streamed:
    """POST to `url` and read server-sent events to their end. Raises RequestFailed, OSError."""
    streamed, is_done = Streamed(), False
    async with aclosing(_lines(url, json.dumps(body).encode(), headers)) as lines:
        async for line in lines:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]":
                is_done = True
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RequestFailed("error event", str(event["error"])[:200])
            if event.get("usage"):
                streamed.completion_tokens = int(event["usage"]["completion_tokens"])
            if event.get("choices"):
                streamed.event_times.append(time.perf_counter())
                # A server that does not count as it goes sends one token an event, as far as anybody can tell.
                tokens = streamed.completion_tokens if event.get("usage") else len(streamed.event_times)
                streamed.event_tokens.append(tokens)
    if not is_done or not streamed.event_times:
        raise RequestFailed("broken stream", f"{len(streamed.event_times)} events and no [DONE]")
    return streamed


async def _lines(url: str, body: bytes, headers: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
    """Lines of the response's body as they come; a connection of its own, closed at the end."""
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    context = ssl.create_default_context() if is_tls else None
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
    try:
        connection = h11.Connection(h11.CLIENT)
        sent = {
            "Host": parts.netloc,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **headers,
        }
        request = h11.Request(method="POST", target=parts.path, headers=list(sent.items()))
        for event in (request, h11.Data(data=body), h11.EndOfMessage()):
            writer.write(connection.send(event) or b"")
        await writer.drain()
        rest = b""
        async for chunk in _body(connection, reader):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line.rstrip(b"\r")
    finally:
        writer.close()


async def _body(connection: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Raises RequestFailed for a status other than 200, or when the connection is cut."""
    status, refusal = 0, b""
    while True:
        try:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(READ_BYTES))
        except (h11.RemoteProtocolError, ConnectionError) as error:
            raise RequestFailed("broken stream", str(error)) from error
        if isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data) and status == 200:
            yield bytes(event.data)
        elif isinstance(event, h11.Data):
            refusal += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            if status != 200:
                raise RequestFailed(f"http {status}", refusal[:200].decode(errors="replace"))
            return
