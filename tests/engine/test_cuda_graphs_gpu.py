"""The same on a device, with CUDA graphs: `make gpu-test`."""

from __future__ import annotations

import pytest
import torch
from tiny_base import Tiny

from uld_serve.config import EngineSettings
from uld_serve.engine.cuda_graphs import CudaRecorder, GraphedRunner
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.engine.runner import Runner
from uld_serve.model.loading import load_base

pytestmark = pytest.mark.gpu


def tokens(engine: Engine, tiny: Tiny) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, name in enumerate((None, "late-fork", "pair", "all-layers")):
        decision = Decision.base() if name is None else Decision.of_version(tiny.version(name))
        params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0, seed=0)
        engine.add(str(number), [(number + 5 * i) % 250 for i in range(7 + 12 * number)], params, decision)
    while engine.has_work:
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


def test_graphs_give_the_tokens_of_steps_run_as_they_are(tiny: Tiny) -> None:
    engines = []
    for _ in range(2):
        base = load_base(str(tiny.folder), dtype="float32", device="cuda")
        engines.append(Engine.of(base, EngineSettings(kv_cache_bytes=2**24)))
    eager, graphed = engines
    eager.runner = Runner(eager.runner.decoder, eager.runner.cache)
    record = CudaRecorder(torch.device("cuda"))
    runner = graphed.runner = GraphedRunner.around(graphed.runner, record, max_rows=8)
    assert tokens(graphed, tiny) == tokens(eager, tiny)
    assert runner.graphs is not None
    assert runner.graphs.num_replayed > 20
