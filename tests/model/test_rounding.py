"""Weights rounded to int8 and back: how far they may move, and what stays."""

from __future__ import annotations

import pytest
import torch
from tiny_base import Tiny

from uld_serve.model.loading import load_base
from uld_serve.model.rounding import int8_and_back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_moves_by_at_most_half_a_step_of_its_channel(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(40, 64) * torch.logspace(-4, 2, 40)[:, None]).to(dtype)
    step = weight.float().abs().amax(1, keepdim=True) / 127
    moved = (int8_and_back(weight).float() - weight.float()).abs() / step
    # bfloat16 has 8 bits: near the largest weight its own rounding is up to half a step too.
    assert float(moved.max()) <= 0.5 + (0.5 if dtype is torch.bfloat16 else 1e-4)
    assert float(moved.max()) > 0.4


def test_a_channel_has_at_most_255_values_and_zeros_stay() -> None:
    weight = torch.randn(3, 4096)
    weight[1] = 0
    rounded = int8_and_back(weight)
    assert [len(torch.unique(row)) for row in rounded][1] == 1
    assert max(len(torch.unique(row)) for row in rounded) <= 255
    assert torch.equal(rounded[1], weight[1])


def test_a_base_loaded_as_int8_keeps_its_fingerprint_embeddings_and_head(tiny: Tiny) -> None:
    rounded = load_base(str(tiny.folder), dtype="float32", device="cpu", weights="int8")
    stored = load_base(str(tiny.folder), dtype="float32", device="cpu")
    assert (rounded.weights, stored.weights) == ("int8", "stored")
    assert rounded.fingerprint == stored.fingerprint
    before, after = stored.model.state_dict(), rounded.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}
