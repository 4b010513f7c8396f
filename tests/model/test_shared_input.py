"""Projections joined into one product give what they gave apart, whoever is called when."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from uld_serve.model.shared_input import PartLinear, share_inputs


class Attention(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 12, bias=bias)
        self.k_proj = nn.Linear(8, 4, bias=bias)
        self.v_proj = nn.Linear(8, 4, bias=bias)


def made(*, bias: bool) -> tuple[Attention, Attention]:
    torch.manual_seed(0)
    apart, joined = Attention(bias=bias).eval(), Attention(bias=bias).eval()
    joined.load_state_dict(apart.state_dict())
    share_inputs(joined)
    return apart.requires_grad_(False), joined


@pytest.mark.parametrize("bias", [False, True])
def test_parts_are_the_layers_they_replace(bias: bool) -> None:
    apart, joined = made(bias=bias)
    for size in (1, 5):
        x = torch.randn(1, size, 8)
        for name in ("q_proj", "k_proj", "v_proj"):
            torch.testing.assert_close(getattr(joined, name)(x), getattr(apart, name)(x))
            assert type(getattr(joined, name)) is PartLinear


def test_another_input_or_a_second_call_is_computed_anew() -> None:
    apart, joined = made(bias=False)
    first, second = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    torch.testing.assert_close(joined.q_proj(first), apart.q_proj(first))
    torch.testing.assert_close(joined.k_proj(second), apart.k_proj(second))  # v of the first was never taken
    torch.testing.assert_close(joined.k_proj(second), apart.k_proj(second))
    torch.testing.assert_close(joined.v_proj(first), apart.v_proj(first))
    q = joined.q_proj(first)
    q += 100  # an adapter adds in place
    torch.testing.assert_close(joined.q_proj(first), apart.q_proj(first))


def test_the_product_runs_once_and_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    _, joined = made(bias=False)
    shared = joined.q_proj._shared
    calls = []
    product = shared._product.forward
    monkeypatch.setattr(shared._product, "forward", lambda x: calls.append(1) or product(x))
    x = torch.randn(1, 3, 8)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(joined, name)(x)
    assert len(calls) == 1
    assert shared._x is None
    assert shared._parts == [None, None, None]


def test_layers_with_unlike_biases_stay_apart() -> None:
    attention = Attention(bias=False)
    attention.v_proj = nn.Linear(8, 4)
    share_inputs(attention)
    assert type(attention.q_proj) is nn.Linear
