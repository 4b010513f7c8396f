"""Around every request of an application: a scope for what it holds, closed when its answer has been sent or its client
is gone, and a count of answers by status. Installed by app and admin. Knows no route."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uld_serve.server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Edge:
    KEY: ClassVar[str] = "uld.holds"

    app: ASGIApp
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.http_responses.labels(str(message["status"])).inc()
            await send(message)

        with ExitStack() as holds:
            try:
                await self.app({**scope, self.KEY: holds}, receive, counting)
            except Exception:
                self.metrics.http_responses.labels("failed").inc()
                raise


def holds_of(request: Request) -> ExitStack:
    """What is entered here is left when the request is over."""
    holds = request.scope[Edge.KEY]
    assert isinstance(holds, ExitStack)
    return holds
