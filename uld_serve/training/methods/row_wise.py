"""Values of tokens that need whole rows of logits, a few rows at a time. Called by Tokens; knows no formula.

Shapes: N tokens, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

# 24 MiB of fp32. Rows of a whole batch leave the processor's caches with every operation, and a block above 32 MiB is
# given back and faulted in again each time that it is used.
CHUNK_ELEMENTS = 6 * 2**20

Value = Callable[[torch.Tensor, slice], torch.Tensor]


def row_wise(hidden_ND: torch.Tensor, value: Value, *, row_width: int) -> torch.Tensor:
    """(N,) fp32: value(hidden_ND[part], part) for part after part.

    A row's value may depend on its own hidden state only: its gradient is taken along with it, and the rows of logits
    are gone before the next part's are made. `row_width` is how many logits `value` makes of a row.
    """
    if not len(hidden_ND):
        return hidden_ND.float().sum(-1)
    num_rows = max(1, CHUNK_ELEMENTS // max(1, row_width))
    return cast(torch.Tensor, _RowWise.apply(hidden_ND, value, num_rows))  # type: ignore[no-untyped-call]


class _RowWise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, value: Value, num_rows: int) -> torch.Tensor:
        needs_slopes = ctx.needs_input_grad[0]
        values: list[torch.Tensor] = []
        slopes: list[torch.Tensor] = []
        for start in range(0, len(hidden_ND), num_rows):
            part = slice(start, start + num_rows)
            rows_ND = hidden_ND[part].detach().requires_grad_(needs_slopes)
            with torch.set_grad_enabled(needs_slopes):
                found_N = value(rows_ND, part)
                if needs_slopes:
                    slopes += torch.autograd.grad(found_N.sum(), rows_ND)
            values.append(found_N.detach())
        if needs_slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, slope_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slopes_ND,) = ctx.saved_tensors
        return (slopes_ND * slope_N[:, None]).to(slopes_ND.dtype), None, None
