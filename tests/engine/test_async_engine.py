"""The engine behind an event loop: concurrent streams, early close, overload, stop, a dead step loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing

import pytest
from tiny_base import Tiny

from uld_serve.engine import async_engine
from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import Delta, SamplingParams
from uld_serve.errors import EngineStopped, InvalidRequest, Overloaded

PROMPT = list(b"Hello")
GREEDY = SamplingParams(max_tokens=6, temperature=0)


@pytest.fixture
def started(make_engine: Callable[..., Engine]) -> Iterator[Callable[..., tuple[Engine, AsyncEngine]]]:
    running = []

    def start(**settings: int) -> tuple[Engine, AsyncEngine]:
        engine = make_engine(**settings)
        asynchronous = AsyncEngine(engine)
        asynchronous.start()
        running.append(asynchronous)
        return engine, asynchronous

    yield start
    for asynchronous in running:
        asynchronous.stop()


async def collect(
    engine: AsyncEngine, request_id: str, decision: Decision, params: SamplingParams = GREEDY
) -> list[Delta]:
    return [delta async for delta in engine.stream(PROMPT, params, decision, request_id=request_id)]


def settle(engine: Engine) -> None:
    deadline = time.monotonic() + 5
    while engine.has_work and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.check_integrity()


def test_concurrent_streams_get_what_each_gets_alone(
    tiny: Tiny, started: Callable[..., tuple[Engine, AsyncEngine]]
) -> None:
    _, engine = started()
    decisions = [Decision.base(), *(Decision.of_version(tiny.version(n)) for n in ("late-fork", "pair"))]

    async def main() -> None:
        alone = [await collect(engine, f"alone-{i}", decision) for i, decision in enumerate(decisions)]
        together = await asyncio.gather(*(collect(engine, f"r{i}", d) for i, d in enumerate(decisions)))
        for one, other in zip(alone, together, strict=True):
            assert [d.token_ids for d in one] == [d.token_ids for d in other]
            assert other[-1].finish_reason == "length"

    asyncio.run(main())


def test_closing_a_stream_aborts_its_request(
    tiny: Tiny, started: Callable[..., tuple[Engine, AsyncEngine]]
) -> None:
    inner, engine = started()

    async def main() -> None:
        params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
        decision = Decision.of_version(tiny.version("late-fork"))
        async with aclosing(engine.stream(PROMPT, params, decision, request_id="r")) as stream:
            async for _ in stream:
                break
        assert engine.num_open == 0

    asyncio.run(main())
    settle(inner)
    assert not inner.has_work
    assert inner.scheduler.pool.num_free == inner.config.num_blocks


def test_a_refused_request_raises_before_the_first_delta(
    started: Callable[..., tuple[Engine, AsyncEngine]],
) -> None:
    inner, engine = started()

    async def main() -> None:
        with pytest.raises(InvalidRequest):
            await anext(engine.stream([], GREEDY, Decision.base(), request_id="r"))

    asyncio.run(main())
    settle(inner)


def test_more_streams_than_seats_and_queue_are_refused(
    started: Callable[..., tuple[Engine, AsyncEngine]],
) -> None:
    _, engine = started(max_num_seqs=1, max_waiting=1)

    async def main() -> None:
        runs = [collect(engine, f"r{i}", Decision.base()) for i in range(6)]
        results = await asyncio.gather(*runs, return_exceptions=True)
        refused = [result for result in results if isinstance(result, Overloaded)]
        assert len(refused) >= 4
        assert all(r[-1].finish_reason == "length" for r in results if isinstance(r, list))
        assert len(await collect(engine, "later", Decision.base())) == 6

    asyncio.run(main())


def test_stop_fails_what_is_in_flight_and_refuses_what_comes(
    started: Callable[..., tuple[Engine, AsyncEngine]],
) -> None:
    _, engine = started()

    async def main() -> None:
        params = SamplingParams(max_tokens=500, temperature=0, ignore_eos=True)
        stream = engine.stream(PROMPT, params, Decision.base(), request_id="r")
        await anext(stream)
        await asyncio.to_thread(engine.stop)
        last = [delta async for delta in stream][-1]
        assert (last.finish_reason, type(last.error)) == ("error", EngineStopped)
        with pytest.raises(EngineStopped):
            await collect(engine, "late", Decision.base())
        assert not engine.is_alive

    asyncio.run(main())


def test_stop_with_grace_lets_requests_finish(started: Callable[..., tuple[Engine, AsyncEngine]]) -> None:
    _, engine = started()

    async def main() -> None:
        stream = engine.stream(PROMPT, GREEDY, Decision.base(), request_id="r")
        first = await anext(stream)
        await asyncio.to_thread(engine.stop, grace_s=10)
        deltas = [first, *[delta async for delta in stream]]
        assert deltas[-1].finish_reason == "length"

    asyncio.run(main())


def test_a_dead_step_loop_ends_every_stream_and_shows(
    started: Callable[..., tuple[Engine, AsyncEngine]],
) -> None:
    inner, engine = started()

    class BrokenScheduler:
        waiting, running = (), ()

        def add(self, _sequence: object) -> None: ...

        def schedule(self) -> list[object]:
            raise RuntimeError("a bug of ours")

    async def main() -> None:
        inner.scheduler = BrokenScheduler()
        [last] = await collect(engine, "r", Decision.base())
        assert (last.finish_reason, type(last.error)) == ("error", EngineStopped)
        assert not engine.is_alive
        with pytest.raises(EngineStopped):
            await collect(engine, "late", Decision.base())

    asyncio.run(main())


def test_who_asked_for_what_the_step_loop_died_of_is_told_too(
    started: Callable[..., tuple[Engine, AsyncEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = started()

    def fail(*_: object) -> None:
        raise MemoryError

    async def main() -> None:
        monkeypatch.setattr(engine, "_add", fail)
        async with asyncio.timeout(5):
            with pytest.raises(EngineStopped):
                await collect(engine, "r", Decision.base())
        assert engine.num_open == 0

    asyncio.run(main())


def test_the_words_of_an_unexpected_error_are_in_no_log_message(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("private words")

    engine = make_engine()
    monkeypatch.setattr(type(engine.runner), "run", fail)
    engine.add("a", PROMPT, GREEDY, Decision.base())
    (delta,) = engine.step()
    assert delta.error is not None
    messages = [record.getMessage() for record in caplog.records]
    assert "request a failed: RuntimeError" in messages
    assert "private" not in "".join(messages)


def test_freed_memory_is_given_back_from_time_to_time_and_only_after_steps(
    tiny: Tiny, started: Callable[..., tuple[Engine, AsyncEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []
    monkeypatch.setattr(async_engine, "give_back", lambda: given.append(True))
    monkeypatch.setattr(async_engine, "IDLE_BEAT_S", 0.01)
    _, engine = started()
    time.sleep(0.1)
    asyncio.run(collect(engine, "soon", Decision.base()))
    time.sleep(0.1)
    assert given == []  # too soon, and before that nothing had been done

    monkeypatch.setattr(async_engine, "TIDY_S", 0.0)
    deadline = time.monotonic() + 5
    while not given and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert given == [True]  # once, however long it is idle
