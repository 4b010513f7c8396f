"""Log-sum-exp over whole rows of scores. Called by the torch samplers. Knows no rule.

A row gets the same bits whatever stands beside it and on any number of threads: it is summed by itself, in one shape.

Legend: N rows, V vocabulary, G groups, S ids of one group, P excluded ids, A groups that hold some."""

from __future__ import annotations

from math import inf

import numpy as np
import torch

from uld_kernels.logit_groups import LogitGroups
from uld_kernels.noise import GROUP_BITS, GROUP_SIZE


def log_sum_exps(
    groups: LogitGroups,
    *,
    scales: list[float] | None = None,
    without: torch.Tensor | None = None,
) -> torch.Tensor:
    """(N,) fp64: log sum exp(scale * score) of each row, over all tokens but the ids `without`; -inf of a row that has
    no finite one. Exponentials are fp32, sums fp32 within a group of 256 and fp64 above: a row of 49,152 is right to
    about 2e-7."""
    factors = [1.0] * groups.row_N.shape[0] if scales is None else scales
    edited = None if without is None or without.shape[0] == 0 else _Edited.of(groups, without)
    max_NG = groups.max_NG if edited is None else edited.max_NG
    best_N = max_NG.amax(-1)
    anchor_N = best_N.where(best_N > -inf, 0.0)
    sum_NG = _group_sums(groups, anchor_N, factors)
    scale_N = torch.tensor(factors, dtype=torch.float64, device=anchor_N.device)
    if edited is not None:
        sum_NG.index_copy_(1, edited.group_A, edited.sums(anchor_N, scale_N.to(anchor_N.dtype)))
    return scale_N * anchor_N.double() + sum_NG.double().sum(-1).log()


def log_sum_exp(values_V: torch.Tensor) -> float:
    """The same of one row, fp64 in fp64; NaN or inf where it has one."""
    best = values_V.amax()
    if not best.isfinite():
        return float(best.item())
    return float(log_sum_exps(LogitGroups.of(values_V[None])).item())


def _group_sums(groups: LogitGroups, anchor_N: torch.Tensor, factors: list[float]) -> torch.Tensor:
    """(N, G): sum exp(scale * (score - anchor)) of each group; inf where an excluded score is far above the anchor."""
    values_RGS = groups.values_MS.view(-1, groups.max_NG.shape[1], GROUP_SIZE)
    if anchor_N.is_cuda:
        scale_N = anchor_N.new_tensor(factors)
        chosen_NGS = values_RGS.index_select(0, groups.row_N) - anchor_N[:, None, None]
        return chosen_NGS.mul_(scale_N[:, None, None]).exp_().sum(-1)
    sum_NG = torch.empty_like(groups.max_NG)
    rows, anchors, sums = values_RGS.numpy(), anchor_N.numpy(), sum_NG.numpy()
    scaled = np.empty_like(rows[0])
    with np.errstate(over="ignore"):
        for place, (row, factor) in enumerate(zip(groups.row_N.tolist(), factors, strict=True)):
            np.subtract(rows[row], anchors[place], out=scaled)
            if factor != 1.0:
                np.multiply(scaled, scaled.dtype.type(factor), out=scaled)
            # Half of what torch.exp takes.
            np.exp(scaled, out=scaled)
            np.add.reduce(scaled, axis=-1, out=sums[place])
    return sum_NG


class _Edited:
    """The groups that hold excluded ids, without them."""

    def __init__(self, group_A: torch.Tensor, values_NAS: torch.Tensor, max_NG: torch.Tensor) -> None:
        self.group_A = group_A
        self.values_NAS = values_NAS
        self.max_NG = max_NG

    @classmethod
    def of(cls, groups: LogitGroups, without: torch.Tensor) -> _Edited:
        group_A, place_P = torch.unique(without >> GROUP_BITS, return_inverse=True)
        first_A = group_A << GROUP_BITS
        id_AS = first_A[:, None] + torch.arange(GROUP_SIZE, device=first_A.device)
        excluded_AS = torch.zeros(id_AS.shape, dtype=torch.bool, device=first_A.device)
        excluded_AS[place_P, without & (GROUP_SIZE - 1)] = True
        values_NAS = groups.at(id_AS.flatten()[None]).view(-1, *id_AS.shape).masked_fill_(excluded_AS, -inf)
        max_NG = groups.max_NG.index_copy(1, group_A, values_NAS.amax(-1))
        return cls(group_A, values_NAS, max_NG)

    def sums(self, anchor_N: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
        """(N, A)."""
        scaled_NAS = (self.values_NAS - anchor_N[:, None, None]) * scale_N[:, None, None]
        return scaled_NAS.exp_().sum(-1)
