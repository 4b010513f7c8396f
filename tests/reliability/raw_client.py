"""One HTTP/1.1 request on a connection of its own, without a client library: what came is told as it came, also when
it broke off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

Body = Mapping[str, object]


@dataclass
class Reply:
    """`status` 0: nothing came. `is_whole`: the message ended as HTTP says that it ends."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    is_whole: bool = False

    @property
    def json(self) -> dict[str, object]:
        return json.loads(self.data)

    @property
    def events(self) -> list[dict[str, object]]:
        """Of a stream, but for [DONE]; a last one that was cut short is left out."""
        found = [
            one for one in self.data.decode(errors="replace").split("\n\n")[:-1] if one != "data: [DONE]"
        ]
        return [json.loads(one.removeprefix("data: ")) for one in found]

    @property
    def is_done(self) -> bool:
        return self.data.endswith(b"data: [DONE]\n\n")


def request_bytes(path: str, body: Body | bytes, *, method: str = "POST", close: bool = True) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n" + ("Connection: close\r\n" if close else "")
    return head.encode() + b"\r\n" + data


async def ask(port: int, path: str, body: Body | bytes, *, method: str = "POST") -> Reply:
    """Cancelling it closes the connection. Raises OSError if there is none."""
    reply = Reply()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes(path, body, method=method))
        await _read(reader, reply)
    except (asyncio.IncompleteReadError, ConnectionError, ValueError):
        pass  # what came before is in the reply
    finally:
        writer.close()
    return reply


async def _read(reader: asyncio.StreamReader, reply: Reply) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    reply.status = int(head[0].split()[1])
    reply.headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])
    }
    if "content-length" in reply.headers:
        reply.data = await reader.readexactly(int(reply.headers["content-length"]))
    else:
        while size := int(await reader.readline() or b"x", 16):
            reply.data += (await reader.readexactly(size + 2))[:-2]
    reply.is_whole = True
