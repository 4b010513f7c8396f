"""The same on a device, with CUDA graphs and steps that go ahead: `make gpu-test`."""

from __future__ import annotations

import pytest
from tiny_base import Tiny

from uld_serve.config import EngineSettings, HeadUse
from uld_serve.engine.cuda_graphs import GraphedRunner
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.model.loading import load_base

pytestmark = pytest.mark.gpu


def engine_on_gpu(
    tiny: Tiny, *, cuda_graphs: bool | None, overlap: bool | None, head: HeadUse = "auto"
) -> Engine:
    base = load_base(str(tiny.folder), dtype="float32", device="cuda")
    settings = EngineSettings(
        kv_cache_bytes=2**24, cuda_graphs=cuda_graphs, overlap=overlap, max_num_seqs=8, head=head
    )
    return Engine.of(base, settings)


def tokens(engine: Engine, tiny: Tiny) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, name in enumerate((None, "late-fork", "pair", "all-layers")):
        decision = Decision.base() if name is None else Decision.of_version(tiny.version(name))
        params = SamplingParams(
            max_tokens=40, ignore_eos=True, temperature=0.0, seed=0, logprobs=2 if number == 1 else None
        )
        engine.add(str(number), [(number + 5 * i) % 250 for i in range(7 + 12 * number)], params, decision)
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
        engine.check_integrity()
    return found


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> dict[str, list[int]]:
    return tokens(engine_on_gpu(tiny, cuda_graphs=False, overlap=False), tiny)


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "ahead"])
def test_graphs_give_the_tokens_of_steps_run_as_they_are(
    tiny: Tiny, expected: dict[str, list[int]], overlap: bool
) -> None:
    engine = engine_on_gpu(tiny, cuda_graphs=True, overlap=overlap)
    assert tokens(engine, tiny) == expected
    assert isinstance(engine.runner, GraphedRunner)
    assert engine.runner.graphs is not None
    assert engine.runner.graphs.num_replayed > 20


def test_steps_that_go_ahead_give_the_tokens_of_steps_in_turn(
    tiny: Tiny, expected: dict[str, list[int]]
) -> None:
    assert tokens(engine_on_gpu(tiny, cuda_graphs=False, overlap=True), tiny) == expected


def test_both_are_on_where_nobody_says_otherwise(tiny: Tiny, expected: dict[str, list[int]]) -> None:
    engine = engine_on_gpu(tiny, cuda_graphs=None, overlap=None)
    assert engine.config.cuda_graphs
    assert engine.config.overlap
    assert tokens(engine, tiny) == expected


def test_assistants_scored_late_give_the_tokens_of_those_scored_whole(
    tiny: Tiny, expected: dict[str, list[int]]
) -> None:
    engine = engine_on_gpu(tiny, cuda_graphs=True, overlap=True, head="late")
    assert engine.config.late_head
    assert tokens(engine, tiny) == expected
