"""Who gets a device's memory: samplers of recorded steps have their room before keys and values, and it never grows."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from recorded_run import RecordedRun
from tiny_base import Tiny
from uld_kernels import SampleShape, StaticSampler, Workspace, WorkspaceTooSmall, ops

from uld_serve.config import EngineConfig, EngineSettings
from uld_serve.engine import memory, sampler
from uld_serve.engine.cuda_graphs import GraphedRunner
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import InvalidRequest
from uld_serve.server.command import memory_plan
from uld_serve.server.settings import checked_settings

FREE = 10_000_000


def resolved(settings: EngineSettings, *, free: int | None = FREE, needed: int = 1_000_000) -> EngineConfig:
    """`needed`: what the largest shape takes."""
    return settings.resolve(max_positions=64, bytes_per_token=8, free_device_bytes=free, sampler_bytes=needed)


def test_samplers_have_their_room_before_keys_and_values_and_adapters() -> None:
    config = resolved(EngineSettings())
    assert config.sampler_bytes == 1_000_000
    assert config.num_blocks == 9_000_000 * 8 // 10 // (8 * config.block_size)
    assert config.adapter_bytes == 900_000
    assert config.kv_cache_bytes + config.adapter_bytes + config.sampler_bytes <= FREE


def test_a_server_says_what_it_set_aside() -> None:
    config = resolved(EngineSettings(), free=50 * 2**30, needed=2**30)
    assert memory_plan(config) == (
        "keys and values 39.20 GiB, adapters, at most 4.90 GiB, samplers of recorded steps 1.00 GiB"
    )
    assert "samplers" not in memory_plan(resolved(EngineSettings(), free=None))


def test_an_operator_sets_their_room() -> None:
    assert resolved(EngineSettings(sampler_bytes=2_000_000)).sampler_bytes == 2_000_000
    assert checked_settings({"sampler_bytes": 7}, source="x").engine.sampler_bytes == 7


def test_without_recorded_steps_they_take_nothing() -> None:
    unrecorded = resolved(EngineSettings(cuda_graphs=False))
    assert unrecorded.sampler_bytes == 0
    assert unrecorded.num_blocks == FREE * 8 // 10 // (8 * unrecorded.block_size)
    assert resolved(EngineSettings(), free=None).sampler_bytes == 0


def test_room_that_nothing_would_use_or_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="none are recorded here"):
        resolved(EngineSettings(sampler_bytes=5), free=None)
    with pytest.raises(InvalidRequest, match="leaves nothing of 10000000 free bytes"):
        resolved(EngineSettings(), needed=FREE)


def test_by_default_the_largest_batch_of_anything_fits() -> None:
    """The largest shape sizes it: every row banned and of two composed profiles, ranks among them."""
    num_bytes = memory.sampler_bytes(60, 1271)
    rows = 64
    for shape in (
        SampleShape(rows, max_terms=2, num_special=rows, needs_normalizers=True, needs_ranks=True),
        SampleShape(rows, max_terms=8, num_special=rows, needs_normalizers=True),
        SampleShape(rows // 4, max_terms=8, num_special=rows // 4, needs_normalizers=True, needs_ranks=True),
    ):
        assert Workspace(num_bytes, torch.device("cpu")).lend(shape, 1271)
    assert num_bytes < 1271 * rows * 32, "some 30 bytes a token a row"


def test_static_samplers_share_what_the_plan_counted(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Workspace] = []

    class Asked(StaticSampler):
        def __init__(self, shape: SampleShape, *, workspace: Workspace, **options: object) -> None:
            given.append(workspace)

    own = make_engine().sampler
    monkeypatch.setattr(ops, "prove", lambda *_, **__: True)
    monkeypatch.setattr(sampler, "StaticSampler", Asked)
    one = sampler.Sampler(own.tokenizer, own.vocab_size, own.device, "1", workspace_bytes=12_345)
    one.static(SampleShape(1))
    one.static(SampleShape(4, num_special=2))
    assert given[0] is given[1]
    assert given[0].num_bytes == 12_345


class TooLarge(StaticSampler):
    """Of no shape but one row's is there enough room."""

    def __init__(self, shape: SampleShape, **options: object) -> None:
        if shape.num_rows > 1:
            raise WorkspaceTooSmall(f"a sampler of {shape} needs 9 bytes of workspace, and 8 were set aside")
        super().__init__(shape, **options)


def tokens(engine: Engine, tiny: Tiny) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number in range(3):
        params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.7, seed=number)
        engine.add(str(number), [5, 9, 13 + number], params, Decision.of_version(tiny.version("late-fork")))
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


def test_a_shape_without_room_runs_unrecorded_and_says_so_once(
    make_engine: Callable[..., Engine],
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = tokens(make_engine(head="whole"), tiny)
    monkeypatch.setattr(sampler, "StaticSampler", TooLarge)
    engine = make_engine(head="whole")
    runner = GraphedRunner.around(engine.runner, RecordedRun, max_rows=64)
    engine.runner = runner
    with caplog.at_level(logging.WARNING):
        assert tokens(engine, tiny) == expected
    assert runner.graphs is not None
    assert runner.graphs.num_recorded == 0
    warnings = [record for record in caplog.records if "raise sampler_bytes" in record.message]
    assert len(warnings) == len(runner.graphs._refused) >= 1
    assert "needs 9 bytes" in warnings[0].message
