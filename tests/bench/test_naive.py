"""The opponent is a fair one: it computes the same rule over two whole models, and its second model is its own."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_base import Tiny
from uld_kernels import reference

from uld_serve.bench.naive import naive_engine, naive_version, shared_copy, truncated_copy
from uld_serve.config import EngineSettings
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.engine.scoring import Job, run_jobs
from uld_serve.errors import InvalidRequest
from uld_serve.model.loading import Base, load_base

LAYERS = 2


@pytest.fixture
def base(tiny: Tiny) -> Base:
    return load_base(str(tiny.folder), dtype="float32", device="cpu")


def two_models(base: Base, prompt: list[int], *, strength: float, count: int) -> list[int]:
    """Greedy tokens of the rule over the base and its first layers, each run whole for every token."""
    target, assistant = base.model, copy.deepcopy(base.model)
    assistant.model.layers = assistant.model.layers[:LAYERS]
    assistant.config.num_hidden_layers = LAYERS
    ids = list(prompt)
    for _ in range(count):
        logits = [
            model(torch.tensor([ids]), use_cache=False).logits[0, -1, : base.vocab_size]
            for model in (target, assistant)
        ]
        ids.append(int(reference.relu_difference(*logits, strength=strength).argmax()))
    return ids[len(prompt) :]


def test_naive_draws_what_two_whole_models_draw(tiny: Tiny, base: Base) -> None:
    prompts = [[65, 66, 67, 68], [70] * 40, [90, 91]]
    version = naive_version(tiny.version("late-fork"), num_layers=LAYERS)
    expected = [two_models(base, one, strength=version.profile.rule.strength, count=12) for one in prompts]
    plain = [two_models(base, one, strength=0.0, count=12) for one in prompts]
    engine = naive_engine(base, EngineSettings(max_step_rows=16), num_layers=LAYERS)
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)
    jobs = [Job(one, params, Decision.of_version(version)) for one in prompts]
    runs = run_jobs(engine, jobs)
    drawn = [[token for delta in run for token in delta.token_ids] for run in runs]
    assert drawn == expected
    assert drawn != plain
    engine.check_integrity()


def test_the_second_model_has_memory_of_its_own(base: Base) -> None:
    theirs = {tensor.data_ptr() for tensor in base.model.parameters()}
    second = truncated_copy(base, LAYERS)
    assert theirs.isdisjoint(tensor.data_ptr() for tensor in second.model.parameters())
    assert len(second.model.get_decoder().layers) == LAYERS
    assert len(base.model.get_decoder().layers) == base.num_layers == 4


def test_engines_may_share_weights_but_not_modules(base: Base) -> None:
    other = shared_copy(base)
    pairs = zip(base.model.parameters(), other.model.parameters(), strict=True)
    assert all(mine.data_ptr() == yours.data_ptr() for mine, yours in pairs)
    assert {id(module) for module in base.model.modules()}.isdisjoint(id(m) for m in other.model.modules())


def test_a_pair_of_streams_is_refused(tiny: Tiny) -> None:
    with pytest.raises(InvalidRequest, match="2 streams"):
        naive_version(tiny.version("pair"), num_layers=LAYERS)
