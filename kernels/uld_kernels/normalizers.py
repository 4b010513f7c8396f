"""Log-sum-exp over whole rows of scores. Called by the torch samplers. Knows no rule.

A row gets the same bits whatever stands beside it and on any number of threads: exponentials are taken in pieces of
whole groups too short to be shared out, and sums have one shape.

Legend: N rows, V vocabulary, G groups, S ids of one group, P excluded ids, A groups that hold some."""

from __future__ import annotations

from math import inf, log

import torch

from uld_kernels.logit_groups import LogitGroups
from uld_kernels.noise import GROUP_BITS, GROUP_SIZE

_LOG2_E = 1.0 / log(2.0)
# torch shares out operations on 32,768 values and more; a piece stays below and fits a core's cache.
_GROUPS_AT_ONCE = 96


def log_sum_exps(
    groups: LogitGroups,
    *,
    scales: list[float] | None = None,
    without: torch.Tensor | None = None,
) -> torch.Tensor:
    """(N,) fp64: log sum exp(scale * score) of each row, over all tokens but the ids `without`; -inf of a row that has
    no finite one. Exponentials are fp32, sums fp32 within a group of 256 and fp64 above: a row of 49,152 is right to
    about 2e-7."""
    numbers = groups.row_N.tolist()
    factors = [1.0] * len(numbers) if scales is None else scales
    edited = None if without is None or without.shape[0] == 0 else _Edited.of(groups, without)
    max_NG = groups.max_NG if edited is None else edited.max_NG
    best_N = max_NG.amax(-1)
    anchor_N = best_N.where(best_N > -inf, 0.0)
    sum_NG = _group_sums(groups, numbers, anchor_N, factors)
    scale_N = torch.tensor(factors, dtype=torch.float64, device=anchor_N.device)
    if edited is not None:
        scaled_NAS = (edited.values_NAS - anchor_N[:, None, None]) * (scale_N.to(anchor_N.dtype) * _LOG2_E)[
            :, None, None
        ]
        sum_NG.index_copy_(1, edited.group_A, scaled_NAS.exp2_().sum(-1))
    return scale_N * anchor_N.double() + sum_NG.double().sum(-1).log()


def log_sum_exp(values_V: torch.Tensor) -> float:
    """The same of one row, fp64 in fp64; NaN or inf where it has one."""
    best = values_V.amax()
    if not best.isfinite():
        return float(best.item())
    return float(log_sum_exps(LogitGroups.of(values_V[None])).item())


def _group_sums(
    groups: LogitGroups, numbers: list[int], anchor_N: torch.Tensor, factors: list[float]
) -> torch.Tensor:
    """(N, G) fp32: sum exp(scale * (score - anchor)) of each group."""
    num_groups = groups.max_NG.shape[1]
    sum_NG = torch.empty_like(groups.max_NG)
    piece_PS = groups.values_MS.new_empty((min(num_groups, _GROUPS_AT_ONCE), GROUP_SIZE))
    for place, (number, factor) in enumerate(zip(numbers, factors, strict=True)):
        anchor = anchor_N[place]
        for start in range(0, num_groups, _GROUPS_AT_ONCE):
            count = min(_GROUPS_AT_ONCE, num_groups - start)
            first = number * num_groups + start
            scaled_PS = piece_PS[:count]
            torch.sub(groups.values_MS[first : first + count], anchor, out=scaled_PS)
            # exp2 takes a third of exp's time.
            scaled_PS.mul_(factor * _LOG2_E).exp2_()
            torch.sum(scaled_PS, -1, out=sum_NG[place, start : start + count])
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
