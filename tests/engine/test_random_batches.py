"""Many random mixed batches: whatever runs beside it, whenever it arrives, however it is cut up, evicted or resumed,
a request gets what it gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from kept_profiles import OWN, Kept
from scale import scaled
from tiny_base import RULES, Tiny

from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Applied, Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import Overloaded

NAMES = [name for pair in zip(RULES, list(OWN), strict=False) for name in pair] + list(OWN)[len(RULES) :]
ADAPTS_TARGET = {name for name, recipe in OWN.items() if recipe.adapts_target}
NUM_JOBS = 75
NUM_ROUNDS = scaled(fast=2000, gate=2000, aim=100_000)
KV_BYTES_PER_TOKEN = 512


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    params: SamplingParams
    names: tuple[str, ...]


def jobs() -> list[Job]:
    """Prompts that share beginnings, so that prefixes hit; every rule and kind of stream, pairs of profiles, the base;
    all ways to draw."""
    rng = random.Random(11)
    stems = [[rng.randrange(256) for _ in range(length)] for length in (0, 9, 24, 33)]
    made = []
    for number in range(NUM_JOBS):
        prompt = rng.choice(stems) + [rng.randrange(256) for _ in range(rng.randrange(1, 20))]
        names = {0: (), 1: (NAMES[number % len(NAMES)], NAMES[(number + 3) % len(NAMES)])}.get(
            number % 5, (NAMES[number % len(NAMES)],)
        )
        if len(ADAPTS_TARGET.intersection(names)) > 1:
            names = names[:1]
        params = SamplingParams(
            max_tokens=rng.randrange(1, 10),
            temperature=rng.choice([0.0, 0.8, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 0, 20]),
            seed=number,
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            logprobs=rng.choice([None, 2]),
            prompt_logprobs=rng.choice([None, None, 1]),
            ignore_eos=True,
        )
        made.append(Job(tuple(prompt), params, names))
    return made


JOBS = jobs()


def decision(tiny: Tiny, kept: Kept, job: Job) -> Decision:
    if not job.names:
        return Decision.base()
    return Decision.forgetting(
        [Applied((kept if name in OWN else tiny).version(name)) for name in dict.fromkeys(job.names)]
    )


@pytest.fixture(scope="module")
def alone(tiny: Tiny, kept: Kept, make_kept_engine: Callable[..., Engine]) -> list[list[int]]:
    """Each job's tokens in an engine of its own making, one after the other, without a prefix to share."""
    engine = make_kept_engine(block_size=256)  # longer than any job: no block is ever full, so none is shared
    found = []
    for number, job in enumerate(JOBS):
        engine.add(str(number), list(job.prompt), job.params, decision(tiny, kept, job))
        tokens: list[int] = []
        while engine.has_work:
            for delta in engine.step():
                assert delta.error is None
                tokens += delta.token_ids
        found.append(tokens)
    return found


def run_round(
    tiny: Tiny, kept: Kept, make_kept_engine: Callable[..., Engine], alone: list[list[int]], seed: int
) -> int:
    """One engine with random settings and 1 to 40 jobs that arrive, and sometimes leave, at random; the number of
    preemptions."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16])
    tokens_of_cache = rng.choice([80, 160, 4000])
    engine = make_kept_engine(
        block_size=block_size,
        kv_cache_bytes=tokens_of_cache * KV_BYTES_PER_TOKEN,
        own_kv_bytes=rng.choice([160, 240, 4000]) * KV_BYTES_PER_TOKEN,
        max_step_rows=rng.choice([5, 17, 64, 512]),
        max_num_seqs=rng.choice([1, 3, 16]),
        adapter_bytes=rng.choice([4 * 10**5, 10**8]),
        overlap=rng.random() < 0.5,
    )
    todo = [rng.randrange(NUM_JOBS) for _ in range(rng.randrange(1, 41))]
    got: dict[str, list[int]] = {}
    of: dict[str, int] = {}
    aborted: set[str] = set()
    while todo or engine.has_work:
        for _ in range(min(len(todo), rng.randrange(4))):
            number, name = todo.pop(), f"r{len(of)}"
            job = JOBS[number]
            try:
                engine.add(name, list(job.prompt), job.params, decision(tiny, kept, job))
            except Overloaded:  # the adapters in use leave no room for more: it comes again later
                todo.append(number)
                break
            of[name], got[name] = number, []
        for delta in engine.step():
            assert delta.error is None, delta.error
            got[delta.request_id] += delta.token_ids
        if engine.sequences and rng.random() < 0.05:
            name = rng.choice(list(engine.sequences))
            engine.abort(name)
            aborted.add(name)
        engine.check_integrity()
    for name, number in of.items():
        expected = alone[number][: len(got[name])] if name in aborted else alone[number]
        assert got[name] == expected, (seed, name, JOBS[number])
    assert all(pool.num_held == 0 for pool in engine.pools.by_name.values())
    return engine.scheduler.num_preemptions


def test_random_batches_equal_solo_runs(
    tiny: Tiny, kept: Kept, make_kept_engine: Callable[..., Engine], alone: list[list[int]]
) -> None:
    assert sum(run_round(tiny, kept, make_kept_engine, alone, seed) for seed in range(8)) > 0, (
        "nothing was ever preempted"
    )


@pytest.mark.slow
@pytest.mark.row("mixed batches equal solo runs")
@pytest.mark.timeout(36000)
def test_two_thousand_random_batches_equal_solo_runs(
    tiny: Tiny,
    kept: Kept,
    make_kept_engine: Callable[..., Engine],
    alone: list[list[int]],
    record_property: Callable[[str, object], None],
) -> None:
    assert sum(run_round(tiny, kept, make_kept_engine, alone, seed) for seed in range(NUM_ROUNDS)) > 0
    record_property("count", NUM_ROUNDS)
