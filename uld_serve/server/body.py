"""Reads a request's body under a size and a time limit and checks its media type. Called by admission and by uploads.
Knows no JSON and no field."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from uld_serve.errors import InvalidRequest, PayloadTooLarge


class UnsupportedMediaType(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class BodyTimeout(InvalidRequest):
    status = 408
    code = "request_timeout"


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body. 415 unless it is plain JSON, 413 above max_bytes, 408 when it does not arrive in time."""
    _require_json(request)
    return await read_bytes(request, max_bytes=max_bytes, timeout_s=timeout_s)


async def read_bytes(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The same of any media type; whoever calls has looked at it."""
    _require_plain(request)
    _require_announced_size(request, max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                _require_size(size, max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {timeout_s:g} s") from None
    return b"".join(chunks)


def _require_json(request: Request) -> None:
    # Asking for the type also stops a web page from posting here without a CORS preflight.
    media_type, _, parameters = request.headers.get("content-type", "").lower().partition(";")
    if media_type.strip() != "application/json":
        raise UnsupportedMediaType("send the body with Content-Type: application/json")
    if parameters.strip() and parameters.replace('"', "").replace(" ", "") not in (
        "charset=utf-8",
        "charset=utf8",
    ):
        raise UnsupportedMediaType("the only charset is UTF-8")


def _require_plain(request: Request) -> None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed bodies are not accepted")


def _require_announced_size(request: Request, max_bytes: int) -> None:
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and announced.isascii():
        _require_size(int(announced[:18]), max_bytes)


def _require_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise PayloadTooLarge(f"the body is larger than {max_bytes} bytes")
