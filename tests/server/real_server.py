"""The real application over the real engine on the tiny base, and answers of it in one form for every route."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
from live_server import CREATED, LiveServer
from tiny_base import Tiny

from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.engine import Engine
from uld_serve.profiles.registry import Registry
from uld_serve.server.catalog import Catalog

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
    lines: list[str] = field(default_factory=list)

    def ask(self, path: str, body: Body, headers: Mapping[str, str] | None = None) -> Answer:
        del self.lines[:]
        response = self.live.post(path, body, headers=headers)
        assert response.status_code == 200, response.text
        return Answer(self, path, body, response, [json.loads(line) for line in self.lines])


@contextmanager
def real_server(tiny: Tiny, engine: Engine) -> Iterator[RealServer]:
    catalog = Catalog(
        model=BASE,
        registry=Registry(version for _, version in tiny.profiles.values()),
        tokenizer=engine.tokenizer,
        max_model_len=engine.config.max_model_len,
        created=CREATED,
    )
    made = RealServer(LiveServer.start(catalog, AsyncEngine(engine)), engine)
    logger, handler = logging.getLogger("uld_serve.audit"), logging.Handler()
    handler.emit = lambda record: made.lines.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield made
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        made.live.stop()
