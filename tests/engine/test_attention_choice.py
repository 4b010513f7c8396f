"""An engine whose attention goes through the block table itself gives the tokens of torch's attention, run as they
are and recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from recorded_run import RecordedRun
from tiny_base import Tiny

from uld_serve.engine.cuda_graphs import GraphedRunner
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.model.attention_backends import AttentionBackend, paged_decode, paged_prefill


def tokens(engine: Engine, tiny: Tiny) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, name in enumerate((None, "late-fork", "pair", "all-layers")):
        decision = Decision.base() if name is None else Decision.of_version(tiny.version(name))
        params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.0, seed=0)
        engine.add(str(number), [(number + 5 * i) % 250 for i in range(7 + 12 * number)], params, decision)
    while engine.has_work:
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


@pytest.mark.parametrize("is_recorded", [False, True])
def test_both_attentions_give_the_same_tokens(
    make_engine: Callable[..., Engine], tiny: Tiny, is_recorded: bool
) -> None:
    expected = tokens(make_engine(), tiny)
    engine = make_engine()
    engine.planner.defers_logits = False
    engine.runner.decoder.attention = AttentionBackend("triton", paged_decode, paged_prefill)
    if is_recorded:
        engine.runner = GraphedRunner.around(engine.runner, RecordedRun, max_rows=8)
    assert tokens(engine, tiny) == expected
    assert all(len(one) == 20 for one in expected.values())
    assert not is_recorded or engine.runner.graphs.num_replayed > 5
