"""The canary model behind the real application on a real socket, the load that is put on it, and what must hold of
every answer and of the server afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from canary import NAMES, CanaryModel, leaked
from live_server import MODEL, LiveServer, make_catalog
from raw_client import Reply, ask

from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.engine import Engine
from uld_serve.model.loading import load_base
from uld_serve.profiles.registry import Registry
from uld_serve.profiles.store import read_profile
from uld_serve.server.audit import AuditLog
from uld_serve.server.loader import EngineHost
from uld_serve.server.settings import Limits
from uld_serve.server.telemetry import Telemetry

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TIMEOUT_S = 30.0  # nothing here takes a second; a request that takes this long hangs


@dataclass(frozen=True)
class Question:
    """One request: what it forgets, and how it is asked."""

    names: tuple[str, ...]
    body: Mapping[str, object] = field(default_factory=dict)
    path: str = COMPLETIONS
    max_tokens: int = 6

    @property
    def num_choices(self) -> int:
        return int(str(self.body.get("n", 1)))

    @property
    def json(self) -> dict[str, object]:
        asked = {"prompt": f"Tell {'+'.join(self.names)} of it."}
        if self.path == CHAT:
            asked = {"messages": [{"role": "user", "content": f"Tell {'+'.join(self.names)}."}]}
        named = {"forget_profile": list(self.names)} if self.names else {}
        return {
            "model": MODEL,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            **asked,
            **named,
            **self.body,
        }


@dataclass
class Said:
    """What is wrong with one reply, if anything is."""

    question: Question
    reply: Reply
    texts: list[str] = field(default_factory=list)
    num_finished: int = 0
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, question: Question, reply: Reply) -> Said:
        said = cls(question, reply)
        if reply.status == 200 and question.body.get("stream"):
            said._read_stream()
        elif reply.status == 200 and reply.is_whole:
            said._read_choices(reply.json)
            said._require(said.num_finished == question.num_choices, "a choice is missing")
        elif reply.status and reply.is_whole:
            said._require("error" in reply.json, "no error object")
        canaries = leaked(question.names, "".join(said.texts))
        said._require(not canaries, f"CANARY of {sorted(canaries)}")
        return said

    @property
    def is_answered(self) -> bool:
        """Wholly, and as a client would believe it."""
        is_stream = bool(self.question.body.get("stream"))
        return self.reply.status == 200 and self.reply.is_whole and (self.reply.is_done or not is_stream)

    def _read_stream(self) -> None:
        has_failed = False
        for event in self.reply.events:
            has_failed = has_failed or "error" in event
            if "choices" in event:
                self._read_choices(event)
        if self.reply.is_done or self.reply.is_whole:
            self._require(not has_failed, "a failed stream ended as if it were whole")
            self._require(self.num_finished == self.question.num_choices, "a stream ended before its choices")

    def _read_choices(self, body: dict[str, object]) -> None:
        for choice in body["choices"]:
            text = choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content")
            self.texts.append(text or "")
            listed = (choice.get("logprobs") or {}).get("top_logprobs") or []
            self.texts += [token for best in listed for token in best]
            self.num_finished += choice["finish_reason"] is not None
        if body.get("forget") is not None:
            applied = {one["name"] for one in body["forget"]["profiles"]}
            self._require(applied == set(self.question.names), f"the receipt says {sorted(applied)}")

    def _require(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(
                f"{problem}: {self.question} -> {self.reply.status} {self.reply.data[-300:]!r}"
            )


def mixed_load() -> list[Question]:
    """Every profile once and every way to ask; pairs, the base, several choices."""
    return [
        Question(("late",), {"stream": True}),
        Question(("truncated",), {"n": 2, "logprobs": 2}),
        Question(("pair",), {"stream": True, "n": 2}, path=CHAT),
        Question(("ranked",)),
        Question(("own",), {"stream": True}),
        Question(("distilled",), path=CHAT),
        Question(("late", "ranked"), {"stream": True, "temperature": 0}),
        Question((), {"stream": True}),
    ]


def one_each(max_tokens: int = 3) -> list[Question]:
    return [Question((name,), max_tokens=max_tokens) for name in NAMES]


@dataclass
class CanaryServer:
    live: LiveServer
    engine: Engine
    asynchronous: AsyncEngine

    @property
    def port(self) -> int:
        return self.live.port

    async def ask(self, question: Question) -> Said:
        async with asyncio.timeout(TIMEOUT_S):
            return Said.of(question, await ask(self.port, question.path, question.json))

    async def ask_all(self, questions: Iterable[Question]) -> list[Said]:
        return list(await asyncio.gather(*(self.ask(question) for question in questions)))

    async def load(self, name: str, directory: str) -> Reply:
        assert self.live.admin_port is not None
        path = f"/admin/forget_profiles/{name}/load"
        return await ask(self.live.admin_port, path, {"directory": directory})

    async def unload(self, name: str) -> Reply:
        assert self.live.admin_port is not None
        return await ask(self.live.admin_port, f"/admin/forget_profiles/{name}", b"", method="DELETE")

    def held(self) -> dict[str, int]:
        """What requests hold now, by what it is; all of it is 0 when none runs."""
        backend, engine = self.live.backend, self.engine
        return {
            "leases": backend.leases.total,
            "in flight": len(backend.in_flight),
            "admitted": backend.in_flight.num_admitted,
            "streams": self.asynchronous.num_open,
            "engine streams": len(self.asynchronous._streams),
            "sequences": len(engine.sequences),
            "running": len(engine.scheduler.running),
            "waiting": len(engine.scheduler.waiting),
            "adapters": engine.planner.num_users,
            "blocks": sum(pool.num_held for pool in engine.pools.by_name.values()),
        }

    def still_held(self, *, within_s: float) -> dict[str, int]:
        """What is not given back in time; {} is right."""
        deadline = time.monotonic() + within_s
        while (left := {name: n for name, n in self.held().items() if n}) and time.monotonic() < deadline:
            time.sleep(0.005)
        return left


@contextmanager
def canary_server(
    model: CanaryModel, *, audit: Path | None = None, limits: Limits | None = None, **settings: object
) -> Iterator[CanaryServer]:
    """In a thread of this process, with an admin listener, and little memory for keys and values: requests are
    preempted under the mixed load."""
    settings = {"block_size": 8, "kv_cache_bytes": 128 * 512, "own_kv_bytes": 128 * 512, **settings}
    engine = model.engine(**settings)
    asynchronous = AsyncEngine(engine)
    registry = Registry(read_profile(model.profiles / name) for name in model.versions)
    telemetry = Telemetry(audit=None if audit is None else AuditLog(audit))
    live = LiveServer.start(
        make_catalog(profiles=registry, tokenizer=engine.tokenizer, limits=limits),
        asynchronous,
        telemetry=telemetry,
        host=EngineHost(asynchronous, load_base(str(model.folder), dtype="float32", device="cpu")),
        roots=(model.profiles,),
        unload_wait_s=0.2,
    )
    try:
        yield CanaryServer(live, engine, asynchronous)
    finally:
        live.stop()
        if telemetry.audit is not None:
            telemetry.audit.close()
