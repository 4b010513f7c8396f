"""Which tokens of one row top-k, top-p and min-p leave. Called by the torch samplers. Knows no rule and no noise.

Legend: K tokens of one row."""

from __future__ import annotations

from math import log

import torch

from uld_kernels import reference
from uld_kernels.logit_groups import true_indices
from uld_kernels.rows import SampleRow

# How many of the largest tokens top-p sorts first; a flatter distribution is then sorted whole.
_TOP_P_FIRST_LOOK = 1024


def truncates(row: SampleRow) -> bool:
    """Whether a row draws, and from less than all that its rule leaves."""
    return row.temperature > 0.0 and (row.top_k > 0 or row.top_p < 1.0 or row.min_p > 0.0)


def nucleus_indices(z_K: torch.Tensor, row: SampleRow) -> torch.Tensor | None:
    """Indices, ascending, that top-k, then top-p on what is left, then min-p leave; None where all are off."""
    chosen: torch.Tensor | None = None
    if 0 < row.top_k < z_K.shape[0]:
        chosen = reference.largest(z_K, row.top_k)
    if row.top_p < 1.0:
        chosen = _top_p(z_K, row.top_p) if chosen is None else chosen[_top_p(z_K[chosen], row.top_p)]
    if row.min_p > 0.0:
        lowest = z_K.max() + log(row.min_p)
        chosen = true_indices(z_K >= lowest) if chosen is None else chosen[z_K[chosen] >= lowest]
    return None if chosen is None else chosen.sort().values


def _top_p(z_K: torch.Tensor, p: float) -> torch.Tensor:
    """The nucleus of reference.top_p_keep as indices, without sorting what cannot be in it."""
    weights = (z_K.double() - z_K.max().double()).exp_()
    mass = p * weights.sum()
    for num_looked_at in (_TOP_P_FIRST_LOOK, z_K.shape[0]):
        order = reference.largest(z_K, num_looked_at)
        size = int(reference.nucleus_size(weights[order], mass).item())
        if size < order.shape[0]:
            break
    return order[:size]
