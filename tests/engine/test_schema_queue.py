"""Schemas are compiled beside all else: who needs one that is there waits for nobody, and nobody can pile them up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.engine import Engine
from uld_serve.engine.grammar import MAX_COMPILED, Grammar, Grammars
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.engine.schema_queue import MAX_WAITING, SchemaQueue
from uld_serve.errors import InvalidRequest, Overloaded

KNOWN = '{"const":"known"}'


class Gate:
    """Compiling waits until it is opened; `compiled` lists what came through, and by which thread."""

    def __init__(self, grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.compiled: list[tuple[str, str]] = []
        really = grammars._compile

        def compile_later(schema: str) -> Grammar:
            assert self.open.wait(10)
            self.compiled.append((schema, threading.current_thread().name))
            return really(schema)

        monkeypatch.setattr(grammars, "_compile", compile_later)


@pytest.fixture
def grammars(make_engine: Callable[..., Engine]) -> Grammars:
    return make_engine().grammars


@pytest.fixture
def gate(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    held = grammars.compiled(KNOWN)
    gate = Gate(grammars, monkeypatch)
    yield gate
    gate.open.set()
    del held


def test_what_is_compiled_is_found_while_another_is_compiled(grammars: Grammars, gate: Gate) -> None:
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(grammars.compiled, '{"const":"slow"}')
        try:
            pool.submit(grammars.compiled, KNOWN).result(5)
            assert not slow.done()
        finally:
            gate.open.set()
        assert slow.result(10) is grammars.compiled('{"const":"slow"}')


def test_all_choices_of_a_request_wait_for_one_compilation(grammars: Grammars, gate: Gate) -> None:
    async def ask() -> set[int]:
        queue = SchemaQueue(grammars)
        asked = [asyncio.create_task(queue.compiled('{"const":1}', salt="a")) for _ in range(128)]
        await asyncio.sleep(0.01)
        asked[0].cancel()
        gate.open.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        return {id(one) for one in found[1:]}

    assert len(asyncio.run(ask())) == 1
    assert [(schema, name.split("_")[0]) for schema, name in gate.compiled] == [
        ('{"const":1}', "uld-schemas")
    ]


def test_new_schemas_do_not_pile_up(grammars: Grammars, gate: Gate) -> None:
    async def ask() -> None:
        queue = SchemaQueue(grammars)
        asked = [asyncio.create_task(queue.compiled(f'{{"const":{n}}}', salt="")) for n in range(MAX_WAITING)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await queue.compiled('{"const":"one too many"}', salt="")
        assert await queue.compiled(KNOWN, salt="") is grammars.compiled(KNOWN)
        gate.open.set()
        await asyncio.gather(*asked)
        await queue.compiled('{"const":"one too many"}', salt="")

    asyncio.run(ask())


def test_a_schema_that_is_refused_is_refused_to_all_and_forgotten(grammars: Grammars) -> None:
    async def ask() -> None:
        queue = SchemaQueue(grammars)
        for _ in range(MAX_WAITING + 1):
            with pytest.raises(InvalidRequest):
                await queue.compiled('{"enum":[]}', salt="")

    asyncio.run(ask())


def test_the_step_loop_never_compiles(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a schema that many others have pushed out of what is kept since it was looked at."""
    engine = make_engine()
    gate = Gate(engine.grammars, monkeypatch)
    gate.open.set()
    add, pushed = Engine.add, [f'{{"const":{n}}}' for n in range(MAX_COMPILED)]

    def add_late(*args: object, **kwargs: object) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="others") as others:
            list(others.map(engine.grammars.compiled, pushed))
        add(*args, **kwargs)

    monkeypatch.setattr(Engine, "add", add_late)

    async def ask() -> None:
        behind = AsyncEngine(engine)
        behind.start()
        try:
            params = SamplingParams(max_tokens=2, json_schema=KNOWN, seed=1)
            async for delta in behind.stream(list(b"Hi"), params, Decision.base(), request_id="a"):
                assert delta.error is None
        finally:
            behind.stop()

    asyncio.run(ask())
    assert len(gate.compiled) == 1 + len(pushed)
    assert "uld-step-loop" not in {name for _, name in gate.compiled}
