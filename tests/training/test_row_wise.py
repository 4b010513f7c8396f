"""Values taken a few rows at a time are those of all rows at once, and so is their gradient."""

from __future__ import annotations

import pytest
import torch

from uld_serve.training.methods import row_wise as module
from uld_serve.training.methods import terms
from uld_serve.training.methods.row_wise import row_wise

V, D = 40, 6


def states(count: int) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 3, 7, 8])
def test_value_and_gradient_are_those_of_all_rows_at_once(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3 * V)
    head_VD, other_NV = states(V), states(count) @ states(V).T
    labels_N = torch.arange(count)
    seen: list[int] = []

    def value(hidden_ND: torch.Tensor, part: slice) -> torch.Tensor:
        seen.append(len(hidden_ND))
        logits_NV = hidden_ND @ head_VD.T
        return terms.divergence(other_NV[part], logits_NV) + terms.nll(logits_NV, labels_N[part])

    slope_N = torch.arange(1.0, count + 1).double()
    outcome = []
    for found in (lambda rows: row_wise(rows, value, row_width=V), lambda rows: value(rows, slice(None))):
        hidden_ND = (states(count) + 0.5).requires_grad_()
        values_N = found(hidden_ND)
        (slopes_ND,) = torch.autograd.grad((values_N * slope_N).sum(), hidden_ND)
        outcome.append((values_N.detach(), slopes_ND))
    assert max(seen[:-1]) <= 3
    torch.testing.assert_close(outcome[0], outcome[1])


def test_no_rows_have_no_value_and_no_gradient() -> None:
    hidden_ND = states(0).float().requires_grad_()
    found = row_wise(hidden_ND, lambda *_: pytest.fail("called for nothing"), row_width=V)
    assert found.shape == (0,)
    assert torch.autograd.grad(found.sum(), hidden_ND)[0].shape == (0, D)


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    with torch.no_grad():
        found = row_wise(states(4), lambda hidden_ND, _: hidden_ND.sum(-1), row_width=V)
    torch.testing.assert_close(found, states(4).sum(-1))
    assert not found.requires_grad
