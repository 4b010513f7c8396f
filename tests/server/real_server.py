"""The real application over the real engine on the tiny base, and answers of it in one form for every route."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from live_server import CREATED, LiveServer
from tiny_base import Tiny

from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.engine import Engine
from uld_serve.profiles.registry import Registry
from uld_serve.server.audit import AuditLog
from uld_serve.server.catalog import Catalog
from uld_serve.server.telemetry import Telemetry

Body = dict[str, object]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BASE = "tiny-llama"
LEAST: dict[str, Body] = {
    COMPLETIONS: {"model": BASE, "prompt": "Hi", "max_tokens": 8},
    CHAT: {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8},
}


@dataclass
class Answer:
    """What came for `body`: `whole` is the JSON of an answer, or the events of a streamed one put together."""

    server: RealServer
    path: str
    body: Body
    response: httpx.Response
    audit: list[dict[str, object]]

    def again(self, **changes: object) -> Answer:
        """The answer to the least request with these fields."""
        return self.server.ask(self.path, {**LEAST[self.path], **changes})

    @property
    def is_stream(self) -> bool:
        return self.response.headers["content-type"].startswith("text/event-stream")

    @property
    def events(self) -> list[Body]:
        lines = [line for line in self.response.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    @property
    def json(self) -> Body:
        return self.events[0] if self.is_stream else self.response.json()

    @property
    def choices(self) -> list[Body]:
        return self.json["choices"]

    @property
    def text(self) -> str:
        first = self.choices[0]
        return first["text"] if "text" in first else first["message"]["content"]

    @property
    def finish(self) -> str:
        return self.choices[0]["finish_reason"]

    @property
    def usage(self) -> dict[str, int]:
        return self.json["usage"]

    @property
    def profiles(self) -> dict[str, float]:
        return {one["name"]: one["strength"] for one in self.json["forget"]["profiles"]}


@dataclass
class RealServer:
    live: LiveServer
    engine: Engine
    audit: Path

    def ask(self, path: str, body: Body, headers: Mapping[str, str] | None = None) -> Answer:
        recorded = len(self.recorded())
        response = self.live.post(path, body, headers=headers)
        assert response.status_code == 200, response.text
        return Answer(self, path, body, response, self.recorded()[recorded:])

    def recorded(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]


@contextmanager
def real_server(tiny: Tiny, engine: Engine, audit: Path) -> Iterator[RealServer]:
    """`audit`: the file to write its audit log to."""
    catalog = Catalog(
        model=BASE,
        registry=Registry(version for _, version in tiny.profiles.values()),
        tokenizer=engine.tokenizer,
        max_model_len=engine.config.max_model_len,
        created=CREATED,
    )
    live = LiveServer.start(catalog, AsyncEngine(engine), telemetry=Telemetry(audit=AuditLog(audit)))
    try:
        yield RealServer(live, engine, audit)
    finally:
        live.stop()
