"""The adapter bank: deltas on assistant rows only, mixed in one batch, nothing left behind by what was evicted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from uld_serve.errors import ProfileMismatch
from uld_serve.model.lora import AdapterBank


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.up_proj = nn.Linear(6, 5, bias=False)


def bank() -> AdapterBank:
    torch.manual_seed(0)
    return AdapterBank(nn.ModuleList([Block(), Block()]), torch.device("cpu"))


def adapter(seed: int, rank: int, layer: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prefix = f"layers.{layer}.mlp.up_proj"
    return {
        f"{prefix}.lora_A": torch.randn(rank, 6, generator=generator),
        f"{prefix}.lora_B": torch.randn(5, rank, generator=generator),
    }


def delta(tensors: dict[str, torch.Tensor], x: torch.Tensor, scaling: float) -> torch.Tensor:
    A, B = (next(t for name, t in tensors.items() if name.endswith(part)) for part in ("lora_A", "lora_B"))
    return scaling * (x @ A.T) @ B.T


@torch.inference_mode()
def run(bank: AdapterBank, x: torch.Tensor, *, start: int, slots: list[int]) -> torch.Tensor:
    bank.rows.start, bank.rows.slots_N = start, torch.tensor(slots)
    bank.rows.only_slot = slots[0] if len(set(slots)) == 1 else None
    try:
        return bank.layers[0].mlp.up_proj(x[None])[0]
    finally:
        bank.rows.clear()


def test_mixed_adapters_of_different_rank_touch_their_own_rows_only() -> None:
    it, x = bank(), torch.randn(5, 6)
    plain = it.layers[0].mlp.up_proj(x).detach()
    first, second = adapter(1, 2), adapter(2, 4)
    slots = [it.acquire("a", first, scaling=2.0), it.acquire("b", second, scaling=0.5)]
    got = run(it, x, start=2, slots=[slots[0], slots[1], slots[0]])
    assert torch.equal(got[:2], plain[:2])
    expected = [delta(first, x[2], 2.0), delta(second, x[3], 0.5), delta(first, x[4], 2.0)]
    torch.testing.assert_close(got[2:] - plain[2:], torch.stack(expected))
    alone = run(it, x, start=3, slots=[slots[1], slots[1]])
    torch.testing.assert_close(alone[3:] - plain[3:], delta(second, x[3:], 0.5))


def test_an_adapter_without_a_delta_in_this_layer_leaves_it_alone() -> None:
    it, x = bank(), torch.randn(3, 6)
    plain = it.layers[0].mlp.up_proj(x).detach()
    slots = [
        it.acquire("here", adapter(1, 2), scaling=1.0),
        it.acquire("there", adapter(2, 3, layer=1), scaling=1.0),
    ]
    got = run(it, x, start=1, slots=slots)
    assert not torch.equal(got[1], plain[1])
    torch.testing.assert_close(got[2], plain[2])


def test_an_evicted_slot_is_used_again_and_holds_nothing_of_before() -> None:
    it, x = bank(), torch.randn(2, 6)
    plain = it.layers[0].mlp.up_proj(x).detach()
    slot = it.acquire("old", adapter(1, 4), scaling=1.0)
    with pytest.raises(ProfileMismatch, match="in use"):
        it.evict("old")
    it.release("old")
    it.evict("old")
    small = adapter(2, 1)
    assert it.acquire("new", small, scaling=1.0) == slot
    got = run(it, x, start=1, slots=[slot])
    torch.testing.assert_close(got[1] - plain[1], delta(small, x[1], 1.0))


def test_a_resident_adapter_is_loaded_once_and_counted() -> None:
    it = bank()
    assert it.acquire("a", adapter(1, 2), scaling=1.0) == it.acquire("a", {}, scaling=1.0)
    assert (it.num_users("a"), it.total_users) == (2, 2)
    it.release("a")
    it.release("a")
    assert it.total_users == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.7.mlp.up_proj", "does not have"),
        ("layers.0.mlp.gate", "does not have"),
        ("layers.0.mlp", "no linear"),
    ],
)
def test_a_module_that_the_base_does_not_have_is_refused(name: str, message: str) -> None:
    tensors = {f"{name}.lora_A": torch.zeros(1, 6), f"{name}.lora_B": torch.zeros(5, 1)}
    with pytest.raises(ProfileMismatch, match=message):
        bank().acquire("a", tensors, scaling=1.0)
