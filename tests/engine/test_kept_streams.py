"""Assistants with keys and values of their own, separate models and adapters on the target give what plain
transformers and PEFT give, however requests are cut up, mixed, evicted or resumed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from kept_profiles import OWN, Kept
from oracle import Oracle, OracleToken
from tiny_base import Tiny

from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Applied, Decision
from uld_serve.engine.request import Delta, SamplingParams

MakeEngine = Callable[..., Engine]
NAMES = list(OWN)
PROMPT = list(b"The quick brown fox")
# Each composition has one adapter on the target at most.
COMPOSED = [
    ["own-late", "separate"],
    ["own-truncated", "late-fork"],
    ["distilled", "own-late"],
    ["adapted-late", "offset"],
    ["own-pair", "two-models", "distilled"],
]


def decision(tiny: Tiny, kept: Kept, names: list[str]) -> Decision:
    if not names:
        return Decision.base()
    return Decision.forgetting(
        [Applied((kept if name in kept.profiles else tiny).version(name)) for name in names]
    )


def run(engine: Engine) -> dict[str, list[Delta]]:
    deltas: dict[str, list[Delta]] = {}
    while engine.has_work:
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        engine.check_integrity()
    return deltas


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=1)


def check(expected: list[OracleToken], deltas: list[Delta], names: list[str]) -> None:
    got = [entry for delta in deltas for entry in delta.logprobs or ()]
    assert [entry.token_id for entry in got] == [token.token_id for token in expected], names
    assert [entry.logprob for entry in got] == pytest.approx([t.logprob for t in expected], abs=1e-3)


@pytest.mark.parametrize("names", [[name] for name in NAMES] + COMPOSED, ids="+".join)
def test_a_request_alone_equals_the_oracle(
    tiny: Tiny, kept: Kept, kept_oracle: Oracle, make_kept_engine: MakeEngine, names: list[str]
) -> None:
    engine = make_kept_engine()
    engine.add("r", PROMPT, greedy(12), decision(tiny, kept, names))
    expected = kept_oracle.generate(PROMPT, 12, names, eos_ids=(257,))
    check(expected, run(engine)["r"], names)


@pytest.mark.parametrize("max_step_rows", [512, 7])
@pytest.mark.parametrize("name", NAMES)
def test_prompt_scores_equal_the_oracle(
    tiny: Tiny,
    kept: Kept,
    kept_oracle: Oracle,
    make_kept_engine: MakeEngine,
    name: str,
    max_step_rows: int,
) -> None:
    engine = make_kept_engine(max_step_rows=max_step_rows)
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    engine.add("r", PROMPT, params, decision(tiny, kept, [name]))
    [delta] = run(engine)["r"]
    got = [entry.logprob for entry in (delta.prompt_logprobs or ())[1:] if entry is not None]
    assert got == pytest.approx(kept_oracle.score(PROMPT, [name]), abs=1e-3)


@dataclass(frozen=True)
class Wanted:
    prompt: list[int]
    names: list[str]
    max_tokens: int
    expected: list[OracleToken]


@pytest.fixture(scope="module")
def wanted(kept_oracle: Oracle) -> list[Wanted]:
    """Requests of every kind, plain and borrowing ones among them, and what the oracle answers."""
    rng, made = random.Random(5), []
    for names in [*([name] for name in NAMES), [], ["late-fork"], ["pair"], *COMPOSED, ["own-late"], []]:
        prompt, n = [rng.randrange(256) for _ in range(rng.randrange(1, 36))], rng.randrange(1, 10)
        made.append(Wanted(prompt, names, n, kept_oracle.generate(prompt, n, names, eos_ids=(257,))))
    return made


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_step_rows": 11}, {"max_num_seqs": 3}, {"block_size": 4, "kv_cache_bytes": 80 * 512}],
    ids=["roomy", "chunked prefill", "few seats", "little cache"],
)
def test_mixed_requests_arriving_at_random_equal_the_oracle(
    tiny: Tiny, kept: Kept, wanted: list[Wanted], make_kept_engine: MakeEngine, settings: dict[str, int]
) -> None:
    engine, rng = make_kept_engine(**settings), random.Random(6)
    arrivals = list(enumerate(wanted))
    deltas: dict[str, list[Delta]] = {f"r{number}": [] for number, _ in arrivals}
    while arrivals or engine.has_work:
        for _ in range(min(len(arrivals), rng.randrange(4))):
            number, one = arrivals.pop(0)
            engine.add(f"r{number}", one.prompt, greedy(one.max_tokens), decision(tiny, kept, one.names))
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
        engine.check_integrity()
    for number, one in enumerate(wanted):
        check(one.expected, deltas[f"r{number}"], one.names)
    if "kv_cache_bytes" in settings:
        assert engine.scheduler.num_preemptions > 0
    assert all(pool.num_held == 0 for pool in engine.pools.by_name.values())
