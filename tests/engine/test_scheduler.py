"""Who runs when: those who decode before those who still read, tenants in turn, nobody without a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tiny_base import Tiny

from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams

MakeEngine = Callable[..., Engine]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def prompt(number: int, length: int = 9) -> list[int]:
    return [(31 * number + 7 * i) % 250 for i in range(length)]


def running(engine: Engine) -> list[str]:
    return [sequence.request_id for sequence in engine.scheduler.running]


def test_a_tenant_with_many_requests_does_not_hold_up_another(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    for number in range(5):
        engine.add(f"many-{number}", prompt(number), GREEDY, Decision.base(), tenant="many")
    engine.add("few-0", prompt(9), GREEDY, Decision.base(), tenant="few")
    engine.step()
    assert running(engine) == ["many-0", "few-0"]
    engine.abort("few-0")
    engine.add("other-0", prompt(8), GREEDY, Decision.base(), tenant="other")
    engine.step()
    assert running(engine) == ["many-0", "other-0"]
    engine.abort("other-0")
    engine.step()
    assert running(engine) == ["many-0", "many-1"], "the oldest, when nobody else waits"


def test_a_long_prompt_does_not_hold_up_who_decodes(make_engine: MakeEngine) -> None:
    engine = make_engine(max_step_rows=8)
    engine.add("long", prompt(1, 100), GREEDY, Decision.base())
    engine.add("short", prompt(2, 5), GREEDY, Decision.base())
    for name in ("long", "short"):  # the newcomer has had its prompt run while the older one reads
        sequence = engine.sequences[name]
        if name == "short":
            engine.scheduler.waiting.remove(sequence)
            engine.scheduler.waiting.appendleft(sequence)
    engine.step()
    assert running(engine) == ["short", "long"]
    engine.scheduler.running.reverse()
    for _ in range(5):
        before = engine.sequences["long"].num_computed
        deltas = engine.step()
        assert [delta.request_id for delta in deltas] == ["short"]
        assert engine.sequences["long"].num_computed == before + 7, "the prompt gets what decoding leaves"
        engine.check_integrity()


def test_nobody_is_let_in_who_would_wait_for_a_row_at_every_token(
    make_engine: MakeEngine, tiny: Tiny
) -> None:
    engine = make_engine(max_step_rows=6)
    decision = Decision.of_version(tiny.version("late-fork"))
    for number in range(4):
        engine.add(str(number), prompt(number, 4), GREEDY, decision)
    while len(running(engine)) < 3 or any(one.remaining > 1 for one in engine.scheduler.running):
        engine.step()
    drawn: dict[str, int] = {}
    for _ in range(3):
        for delta in engine.step():
            drawn[delta.request_id] = drawn.get(delta.request_id, 0) + 1
    assert drawn == {"0": 3, "1": 3, "2": 3}


def test_the_blocks_of_a_newer_one_that_decodes_go_to_an_older_prompt(make_engine: MakeEngine) -> None:
    per_block = (
        2 * 4 * 2 * 8 * 4 * 16
    )  # keys and values, layers, heads, width, bytes, tokens of the tiny base
    engine = make_engine(kv_cache_bytes=7 * per_block, max_step_rows=24)
    alone = make_engine()
    long, short = replace(GREEDY, max_tokens=4), replace(GREEDY, max_tokens=30)
    expected = {}
    for name, ids, params in (("old", prompt(1, 90), long), ("new", prompt(2, 15), short)):
        alone.add(name, ids, params, Decision.base())
        expected[name] = [i for _ in range(60) for delta in alone.step() for i in delta.token_ids]
        engine.add(name, ids, params, Decision.base())
    found: dict[str, list[int]] = {"old": [], "new": []}
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] += delta.token_ids
        engine.check_integrity()
    assert engine.scheduler.num_preemptions > 0
    assert found == expected
