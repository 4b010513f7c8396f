"""Continuous batching gives each request what the one-request oracle gives it, for every rule."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from oracle import Oracle
from tiny_base import RULES, Tiny

from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Applied, Decision
from uld_serve.engine.request import Delta, SamplingParams

NAMES = [None, *RULES]


def decision(tiny: Tiny, names: list[str]) -> Decision:
    if not names:
        return Decision.base()
    return Decision.forgetting([Applied(tiny.version(name)) for name in names])


def requests(count: int) -> list[tuple[list[int], list[str], int]]:
    """(prompt, profiles, max_tokens), all rules and the base, mixed lengths."""
    rng = random.Random(7)
    made = []
    for number in range(count):
        prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 40))]
        name = NAMES[number % len(NAMES)]
        made.append((prompt, [name] if name else [], rng.randrange(1, 12)))
    return made


def run_at_random(
    engine: Engine, todo: list[tuple[str, list[int], SamplingParams, Decision]]
) -> dict[str, list[Delta]]:
    rng = random.Random(3)
    deltas: dict[str, list[Delta]] = {name: [] for name, *_ in todo}
    arrivals = list(todo)
    while arrivals or engine.has_work:
        for _ in range(min(len(arrivals), rng.randrange(3))):
            engine.add(*arrivals.pop(0))
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
        engine.check_integrity()
    return deltas


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_step_rows": 7}, {"max_num_seqs": 3}, {"block_size": 4, "kv_cache_bytes": 56 * 512}],
    ids=["roomy", "chunked prefill", "few seats", "little cache"],
)
def test_mixed_requests_arriving_at_random_equal_the_oracle(
    tiny: Tiny, oracle: Oracle, make_engine: Callable[..., Engine], settings: dict[str, int]
) -> None:
    engine = make_engine(**settings)
    wanted = requests(18)
    todo = [
        (f"r{i}", prompt, SamplingParams(max_tokens=n, temperature=0, logprobs=1), decision(tiny, names))
        for i, (prompt, names, n) in enumerate(wanted)
    ]
    deltas = run_at_random(engine, todo)
    for i, (prompt, names, n) in enumerate(wanted):
        expected = oracle.generate(prompt, n, names, eos_ids=engine.tokenizer.eos_ids)
        got = [entry for delta in deltas[f"r{i}"] for entry in delta.logprobs or ()]
        assert [entry.token_id for entry in got] == [token.token_id for token in expected], (i, names)
        assert [entry.logprob for entry in got] == pytest.approx([t.logprob for t in expected], abs=1e-3)
    if "kv_cache_bytes" in settings:
        assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.pool.num_free == engine.config.num_blocks


@pytest.mark.parametrize("name", NAMES)
def test_a_request_alone_equals_the_oracle(
    tiny: Tiny, oracle: Oracle, make_engine: Callable[..., Engine], name: str | None
) -> None:
    engine, names = make_engine(), [name] if name else []
    prompt = list(b"The quick brown fox")
    engine.add("r", prompt, SamplingParams(max_tokens=16, temperature=0, logprobs=1), decision(tiny, names))
    got = []
    while engine.has_work:
        got += [entry for delta in engine.step() for entry in delta.logprobs or ()]
    expected = oracle.generate(prompt, 16, names, eos_ids=engine.tokenizer.eos_ids)
    assert [entry.token_id for entry in got] == [token.token_id for token in expected]
    assert [entry.logprob for entry in got] == pytest.approx([t.logprob for t in expected], abs=1e-3)


def test_composed_profiles_equal_the_oracle(
    tiny: Tiny, oracle: Oracle, make_engine: Callable[..., Engine]
) -> None:
    engine, names = make_engine(), ["late-fork", "truncated", "pair"]
    prompt = list(b"three at once")
    engine.add("r", prompt, SamplingParams(max_tokens=12, temperature=0), decision(tiny, names))
    got = []
    while engine.has_work:
        got += [token_id for delta in engine.step() for token_id in delta.token_ids]
    expected = oracle.generate(prompt, 12, names, eos_ids=engine.tokenizer.eos_ids)
    assert got == [token.token_id for token in expected]


def test_sampled_tokens_depend_on_seed_and_position_only(
    tiny: Tiny, oracle: Oracle, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(max_step_rows=9)
    prompt = list(b"draw")
    todo = [
        (f"r{seed}", prompt, SamplingParams(max_tokens=8, temperature=0.9, seed=seed), decision(tiny, [name]))
        for seed, name in enumerate(RULES)
    ]
    deltas = run_at_random(engine, todo)
    for seed, name in enumerate(RULES):
        expected = oracle.generate(
            prompt, 8, [name], eos_ids=engine.tokenizer.eos_ids, temperature=0.9, seed=seed
        )
        got = [token_id for delta in deltas[f"r{seed}"] for token_id in delta.token_ids]
        assert got == [token.token_id for token in expected], name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_step_rows", [512, 5])
def test_prompt_scores_equal_the_oracle(
    tiny: Tiny, oracle: Oracle, make_engine: Callable[..., Engine], name: str | None, max_step_rows: int
) -> None:
    engine, names = make_engine(max_step_rows=max_step_rows), [name] if name else []
    prompt = list(b"score me, every byte")
    engine.add("r", prompt, SamplingParams(max_tokens=0, prompt_logprobs=1), decision(tiny, names))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
        engine.check_integrity()
    [delta] = deltas
    assert delta.finish_reason == "length"
    assert delta.prompt_logprobs is not None
    assert delta.prompt_logprobs[0] is None
    got = [entry.logprob for entry in delta.prompt_logprobs if entry is not None]
    assert got == pytest.approx(oracle.score(prompt, names), abs=1e-3)
