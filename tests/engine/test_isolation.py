"""What is wrong with one request stays with it: its NaN, its evicted adapter, its size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from tiny_base import Tiny

from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Applied, Decision
from uld_serve.engine.request import Delta, SamplingParams
from uld_serve.errors import InvalidRequest

MakeEngine = Callable[..., Engine]


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def make_engine(make_engine: MakeEngine, request: pytest.FixtureRequest) -> MakeEngine:
    """Each step after the one before it, or launched while that is in flight."""
    return partial(make_engine, overlap=request.param)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def finish(engine: Engine) -> dict[str, Delta]:
    """The last delta of every request."""
    last = {}
    while engine.has_work:
        last |= {delta.request_id: delta for delta in engine.step()}
        engine.check_integrity()
    return last


def poison(engine: Engine, request_id: str) -> None:
    size = engine.config.block_size
    for pool in (*engine.runner.cache.keys_SHD, *engine.runner.cache.values_SHD):
        for block_id in engine.sequences[request_id].block_ids:
            pool[block_id * size : (block_id + 1) * size] = float("nan")


def test_nan_in_the_cache_of_one_request_ends_it_alone_beside_shorter_and_longer_ones(
    tiny: Tiny, make_engine: MakeEngine
) -> None:
    engine = make_engine(block_size=4)
    for number in range(6):
        prompt = [number] * (3 + 7 * number)
        engine.add(f"r{number}", prompt, greedy(12), Decision.of_version(tiny.version("late-fork")))
    for _ in range(2):
        engine.step()
    for victim in ("r0", "r3"):
        poison(engine, victim)
    reasons = {name: delta.finish_reason for name, delta in finish(engine).items()}
    assert reasons == {f"r{number}": "error" if number in (0, 3) else "length" for number in range(6)}


def test_a_beginning_that_went_wrong_once_is_not_shared_again(tiny: Tiny, make_engine: MakeEngine) -> None:
    engine, stem = make_engine(block_size=4), list(range(20))
    engine.add("first", [*stem, 1], greedy(4), Decision.base())
    engine.step()
    poison(engine, "first")
    assert finish(engine)["first"].finish_reason == "error"
    for number in range(3):
        engine.add(f"later {number}", [*stem, 2 + number], greedy(4), Decision.base())
        assert finish(engine)[f"later {number}"].finish_reason == "length"
    usage = finish_one(engine, [*stem, 9]).usage
    assert usage is not None
    assert usage.cached_tokens == 20, "and what went well is shared as before"


def finish_one(engine: Engine, prompt: list[int]) -> Delta:
    engine.add("one", prompt, greedy(1), Decision.base())
    return finish(engine)["one"]


def test_profiles_that_a_step_has_no_rows_for_are_refused_and_not_waited_for(
    tiny: Tiny, make_engine: MakeEngine
) -> None:
    engine = make_engine(max_step_rows=2)
    with pytest.raises(InvalidRequest, match="3 rows a token"):
        engine.add("pair", [1, 2], greedy(2), Decision.of_version(tiny.version("pair")))
    engine.check_integrity()
    engine.add("one", [1, 2], greedy(2), Decision.of_version(tiny.version("late-fork")))
    assert finish(engine)["one"].finish_reason == "length"


def test_an_adapter_lost_under_a_running_request_ends_it_and_draws_nothing(
    tiny: Tiny, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    engine.add("r", [1, 2, 3], greedy(9), Decision.of_version(tiny.version("late-fork")))
    engine.step()
    [stream] = engine.sequences["r"].plan.streams
    engine.planner.bank.release(stream.seat.key)  # as a second release, our bug, would
    engine.planner.bank.evict(stream.seat.key)
    engine.planner.bank._users[stream.seat.key] = 1
    last = finish(engine)["r"]
    assert last.finish_reason == "error"
    assert last.token_ids == ()


def test_profiles_that_can_never_be_resident_together_are_refused_for_good(
    tiny: Tiny, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    sizes = []
    for name in ("late-fork", "all-layers"):
        engine.add(name, [1], greedy(1), Decision.of_version(tiny.version(name)))
        sizes.append(engine.planner.bank.resident_bytes)
    small = make_engine(adapter_bytes=sizes[1] - 1)
    both = Decision.forgetting([Applied(tiny.version(name)) for name in ("late-fork", "all-layers")])
    with pytest.raises(InvalidRequest, match="adapter_bytes"):
        small.add("both", [1], greedy(1), both)
    small.check_integrity()


def test_an_error_while_taking_in_a_token_ends_its_request_alone(
    tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    for name in ("bad", "good"):
        engine.add(name, [1, 2, 3], greedy(3), Decision.base())
    detokenizer = engine.sequences["bad"].detokenizer
    monkeypatch.setattr(
        type(detokenizer), "push", lambda self, *_, **__: 1 / (self is not detokenizer) and ""
    )
    assert {name: delta.finish_reason for name, delta in finish(engine).items()} == {
        "bad": "error",
        "good": "length",
    }


def test_a_request_whose_text_cannot_be_made_ends_alone_also_at_its_last_token(
    tiny: Tiny, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    for name in ("bad", "good"):
        engine.add(name, [1, 2, 3], greedy(3), Decision.base())
    engine.step()
    engine.sequences[
        "bad"
    ].detokenizer._text = None  # neither a token nor what was held back can be read any more
    assert {name: delta.finish_reason for name, delta in finish(engine).items()} == {
        "bad": "error",
        "good": "length",
    }


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_held_back_text_that_cannot_be_given_out_ends_its_request_alone(
    tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    engine = make_engine()
    for name in ("bad", "good"):
        engine.add(name, [1, 2, 3], greedy(max_tokens), Decision.base())
    detokenizer = engine.sequences["bad"].detokenizer
    monkeypatch.setattr(type(detokenizer), "flush", lambda self: 1 / (self is not detokenizer) and "")
    assert {name: delta.finish_reason for name, delta in finish(engine).items()} == {
        "bad": "error",
        "good": "length",
    }
