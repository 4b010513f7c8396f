"""The switch between whole and late logits of assistants: resolved once, kept to, and without effect on tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_base import Tiny
from uld_kernels import LateRows, ops

from uld_serve.config import EngineConfig, EngineSettings
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import InvalidRequest
from uld_serve.model.head import Head
from uld_serve.server.settings import checked_settings

ON_CPU, ON_GPU = None, 2**34


def resolved(free_device_bytes: int | None, **settings: object) -> EngineConfig:
    return EngineSettings(**settings).resolve(
        max_positions=64, bytes_per_token=8, free_device_bytes=free_device_bytes
    )


@pytest.mark.parametrize(
    ("head", "device", "is_late"),
    [
        ("auto", ON_CPU, True),
        ("auto", ON_GPU, False),
        ("whole", ON_CPU, False),
        ("whole", ON_GPU, False),
        ("late", ON_CPU, True),
        ("late", ON_GPU, True),
    ],
)
def test_auto_is_late_on_a_cpu_and_whole_on_a_gpu(head: str, device: int | None, is_late: bool) -> None:
    assert resolved(device, head=head).late_head is is_late


def test_a_head_that_is_not_known_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="auto, whole or late, not 'early'"):
        EngineSettings(head="early")


@pytest.mark.parametrize(("head", "tried"), [("whole", [None]), ("late", [None, torch.float32])])
def test_kernels_for_late_rows_are_tried_at_start_where_they_are_wanted(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, head: str, tried: list[object]
) -> None:
    asked: list[object] = []

    def prove(*_: object, head_dtype: torch.dtype | None = None) -> bool:
        asked.append(head_dtype)
        return False

    monkeypatch.setattr(ops, "prove", prove)
    make_engine(head=head)
    assert asked == tried


def test_an_operator_sets_it_in_the_server_file() -> None:
    assert checked_settings({"head": "whole"}, source="x").engine.head == "whole"
    assert checked_settings({}, source="x").engine.head == EngineSettings().head
    with pytest.raises(InvalidRequest, match="head"):
        checked_settings({"head": "early"}, source="x")


def tokens(engine: Engine, tiny: Tiny) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, name in enumerate(("late-fork", "all-layers", "late-fork")):
        params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.7 * number, seed=number)
        engine.add(str(number), [5, 9, 13 + number], params, Decision.of_version(tiny.version(name)))
    while engine.has_work:
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


def test_whole_and_late_logits_draw_the_same_tokens(
    make_engine: Callable[..., Engine], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_late = 0
    put_off = Head.late

    def counted(head: Head, hidden_AD: torch.Tensor) -> LateRows:
        nonlocal num_late
        num_late += 1
        return put_off(head, hidden_AD)

    monkeypatch.setattr(Head, "late", counted)
    whole = tokens(make_engine(head="whole"), tiny)
    assert num_late == 0
    late = tokens(make_engine(head="late"), tiny)
    assert num_late >= 12
    assert late == whole
    assert all(len(one) == 12 for one in late.values())
