"""GET / and /playground/{name}: the playground, static files that need no key. The page is a client like any other: it
asks the API with the key that is typed into it. Knows no request, catalog or engine, so it cannot generate."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Header
from starlette.responses import HTMLResponse, Response

from uld_serve.errors import NotFound

FOLDER = Path(__file__).with_name("playground")
INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing but these files and this server's API: no inline code, no other host, no frame around it, and no text that
# becomes markup.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-cache",
}

IfNoneMatch = Annotated[str | None, Header()]


def add_routes(app: FastAPI) -> None:
    """The files are read here, once: a request names one of them, never a path."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in MEDIA_TYPES}

    async def playground(if_none_match: IfNoneMatch = None) -> Response:
        """The playground: a page that asks with and without forgetting, side by side. Its requests need a key."""
        return _response(INDEX, files[INDEX], if_none_match)

    async def playground_file(name: str, if_none_match: IfNoneMatch = None) -> Response:
        """Its styles and scripts, by name."""
        if name not in files:
            raise NotFound("there is no such file")
        return _response(name, files[name], if_none_match)

    app.add_api_route("/", playground, methods=["GET"], response_class=HTMLResponse)
    app.add_api_route(
        "/playground/{name}",
        playground_file,
        methods=["GET"],
        response_class=Response,
        include_in_schema=False,
    )


def _response(name: str, content: bytes, known: str | None) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}
    if known == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=MEDIA_TYPES[Path(name).suffix])
