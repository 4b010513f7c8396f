"""Room for a tenth of what the requests ask for at once: they wait for each other, none for ever, and get what they
get with room for all."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from canary import NAMES, CanaryModel, leaked
from scale import scaled

from uld_serve.engine.engine import Engine
from uld_serve.engine.request import SamplingParams

BYTES_PER_TOKEN = 512
ROUNDS = scaled(fast=1, gate=10, aim=100)
# Requests, and the share of their demand that there is room for, in percent.
NUM_REQUESTS, PERCENT = (60, 10) if scaled(fast=0, gate=0, aim=1) == 0 else (300, 2)


def run_all(engine: Engine, model: CanaryModel, seed: int) -> dict[str, list[int]]:
    rng, said = random.Random(seed), {}
    for number in range(NUM_REQUESTS):
        name = NAMES[number % len(NAMES)]
        params = SamplingParams(max_tokens=rng.randrange(4, 16), seed=number, ignore_eos=True)
        prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 16))]
        engine.add(f"{name} {number}", prompt, params, model.decision([name]))
        said[f"{name} {number}"] = []
    steps = 0
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None, delta.error
            said[delta.request_id] += delta.token_ids
        engine.check_integrity()
        steps += 1
        assert steps < 200 * NUM_REQUESTS, "nobody gets on"
    return said


@pytest.mark.row("KV squeezed to 10 % of demand")
@pytest.mark.timeout(7200)
def test_squeezed_requests_all_end_with_what_they_get_in_a_large_room(
    canary: CanaryModel, record_property: Callable[[str, object], None]
) -> None:
    large = canary.engine(own_kv_bytes=2**22, max_waiting=1000)
    demand = NUM_REQUESTS * 18  # tokens, on average
    room = max(demand * PERCENT // 100, 32) * BYTES_PER_TOKEN
    longest = 32 * BYTES_PER_TOKEN  # one request at a time keeps keys and values of its own
    squeezed = canary.engine(block_size=4, kv_cache_bytes=room, own_kv_bytes=longest, max_waiting=1000)
    for seed in range(ROUNDS):
        expected = run_all(large, canary, seed)
        found = run_all(squeezed, canary, seed)
        assert found == expected
        assert not any(leaked([name.split()[0]], tokens) for name, tokens in found.items())
    assert squeezed.scheduler.num_preemptions > 0
    record_property("count", ROUNDS * NUM_REQUESTS)
    record_property("preemptions", squeezed.scheduler.num_preemptions)
