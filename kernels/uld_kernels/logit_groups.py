"""Rows of scores cut into groups of token ids, so that a search reads each group's best and then few tokens. Called by
batch_sampler and lottery. Knows no rule and no noise.

Measured at 32 rows of 49,152 on one core: the best of each group 0.12 ms, argmax or nonzero over everything 6 to 8 ms.

Legend: N rows, V vocabulary, G groups, S ids of one group, C tokens found."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
import torch

from uld_kernels.noise import GROUP_BITS, GROUP_SIZE

# Values of which the largest stands for all when the k largest of many are looked for.
_FEW = 32


@dataclass(frozen=True, slots=True)
class Found:
    """Tokens of several rows, by row and then by id."""

    row_C: torch.Tensor
    id_C: torch.Tensor
    value_C: torch.Tensor

    def where(self, keep_C: torch.Tensor) -> Found:
        kept = true_indices(keep_C)
        return Found(self.row_C[kept], self.id_C[kept], self.value_C[kept])


@dataclass(frozen=True, slots=True)
class LogitGroups:
    values_MS: torch.Tensor
    """(N * G, S) fp32; -inf fills the last group of a row."""
    max_NG: torch.Tensor
    """NaN where the group has one."""

    @classmethod
    def of(cls, values_NV: torch.Tensor) -> LogitGroups:
        """Copies only where rows are no whole number of groups or do not lie side by side."""
        num_rows, size = values_NV.shape
        num_groups = -(-size >> GROUP_BITS)
        if size != num_groups * GROUP_SIZE:
            whole_NV = values_NV.new_full((num_rows, num_groups * GROUP_SIZE), -inf)
            whole_NV[:, :size] = values_NV
            values_NV = whole_NV
        values_MS = values_NV.reshape(num_rows * num_groups, GROUP_SIZE)
        return cls(values_MS, values_MS.amax(-1).view(num_rows, num_groups))

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row the largest score, NaN if there is one, and its lowest id."""
        num_groups = self.max_NG.shape[1]
        value_N, group_N = self.max_NG.max(-1)
        first_M = torch.arange(0, self.values_MS.shape[0], num_groups, device=value_N.device)
        within_N = self.values_MS.index_select(0, first_M + group_N).argmax(-1)
        return value_N, (group_N << GROUP_BITS) + within_N

    def at(self, id_NK: torch.Tensor) -> torch.Tensor:
        """The scores of some tokens of each row."""
        return self.values_MS.view(self.max_NG.shape[0], -1).gather(-1, id_NK)

    def at_least(self, limit_NG: torch.Tensor) -> Found:
        """All tokens whose score reaches the limit of their row and group; limits broadcast over groups."""
        num_groups = self.max_NG.shape[1]
        hit_M = true_indices((self.max_NG >= limit_NG).flatten())
        values_HS = self.values_MS.index_select(0, hit_M)
        limit_H = limit_NG.expand_as(self.max_NG).flatten()[hit_M]
        found_C = true_indices((values_HS >= limit_H[:, None]).flatten())
        group_C = hit_M[found_C >> GROUP_BITS]
        row_C = group_C // num_groups
        id_C = ((group_C - row_C * num_groups) << GROUP_BITS) + (found_C & (GROUP_SIZE - 1))
        return Found(row_C, id_C, values_HS.flatten()[found_C])


def true_indices(mask: torch.Tensor) -> torch.Tensor:
    """Where a flat mask is true."""
    if mask.is_cuda:
        return mask.nonzero()[:, 0]
    # torch.nonzero takes 5 ns an element whether true or not, numpy's a tenth of that.
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def containing_largest(values_V: torch.Tensor, k: int) -> torch.Tensor:
    """Some of the values, in their order, the k largest and all equal to them among those."""
    size = values_V.shape[0] // _FEW * _FEW
    if size // _FEW < 4 * k:
        return values_V
    # As many of these as are among the k largest come from places of their own.
    kth = values_V[:size].view(-1, _FEW).amax(-1).topk(k).values.amin()
    return values_V[true_indices(values_V >= kth)]


def merged(first: Found, second: Found) -> Found:
    """Both, which share no token."""
    row_C, id_C = torch.cat([first.row_C, second.row_C]), torch.cat([first.id_C, second.id_C])
    order_C = ((row_C << 32) + id_C).argsort()
    return Found(row_C[order_C], id_C[order_C], torch.cat([first.value_C, second.value_C])[order_C])


def first_best(
    value_C: torch.Tensor, row_C: torch.Tensor, *, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the largest of its values and the index of its first; rows ascend, and each has a value. NaN counts
    as the largest."""
    if num_rows == 1:
        best, at = value_C.max(0)
        return best[None], at[None]
    count_N = torch.bincount(row_C, minlength=num_rows)
    start_N = count_N.cumsum(0) - count_N
    padded_NK = value_C.new_full((num_rows, int(count_N.max().item())), -inf)
    padded_NK[row_C, torch.arange(row_C.shape[0], device=row_C.device) - start_N[row_C]] = value_C
    best_N, at_N = padded_NK.max(-1)
    return best_N, start_N + at_N
