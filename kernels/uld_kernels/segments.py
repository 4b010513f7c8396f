"""Sums, maxima and orders of several rows' lists of values that lie one after the other. Called by the torch samplers.
Knows no token and no rule.

A row gets the same bits whatever stands beside it: every sum runs over its values in their order.

Legend: N rows, C values of all rows, K values of the longest row."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
import torch

_INDEX_BITS = 32


@dataclass(frozen=True, slots=True)
class Segments:
    """Which row each value belongs to; rows ascend."""

    row_C: torch.Tensor
    length_N: torch.Tensor
    start_N: torch.Tensor

    @classmethod
    def of(cls, row_C: torch.Tensor, num_rows: int) -> Segments:
        if num_rows == 1:
            start_N = torch.zeros(1, dtype=torch.int64, device=row_C.device)
            return cls(row_C, torch.full_like(start_N, row_C.shape[0]), start_N)
        length_N = torch.bincount(row_C, minlength=num_rows)
        return cls(row_C, length_N, length_N.cumsum(0) - length_N)

    def spread(self, value_N: torch.Tensor) -> torch.Tensor:
        """(C,): each row's value at all its places."""
        return value_N.index_select(0, self.row_C)

    def sums(self, value_C: torch.Tensor) -> torch.Tensor:
        """(N,) fp64; 0 of an empty row."""
        return torch.segment_reduce(value_C.double(), "sum", lengths=self.length_N, unsafe=True)

    def maxima(self, value_C: torch.Tensor) -> torch.Tensor:
        """(N,); -inf of an empty row."""
        return torch.segment_reduce(value_C, "max", lengths=self.length_N, unsafe=True)

    def log_sum_exps(self, value_C: torch.Tensor) -> torch.Tensor:
        """(N,) fp64; -inf of a row without a finite value."""
        best_N = self.maxima(value_C)
        anchor_N = best_N.where(best_N > -inf, 0.0).double()
        total_N = self.sums((value_C.double() - self.spread(anchor_N)).exp_())
        return anchor_N + total_N.log()

    def padded(self, value_C: torch.Tensor, *, fill: float) -> torch.Tensor:
        """(N, K)."""
        num_rows, longest = self.length_N.shape[0], int(self.length_N.max().item())
        if value_C.shape[0] == num_rows * longest:
            return value_C.view(num_rows, longest)
        padded_NK = value_C.new_full((num_rows, longest), fill)
        padded_NK.view(-1).index_copy_(0, self.places(longest), value_C)
        return padded_NK

    def places(self, width: int) -> torch.Tensor:
        """(C,): where the values lie in a table of `width` columns."""
        count = torch.arange(self.row_C.shape[0], device=self.row_C.device)
        return count + self.spread(
            width * torch.arange(len(self.start_N), device=count.device) - self.start_N
        )

    def first_best(self, value_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row the largest value, NaN if there is one, and the index of its first; no row is empty."""
        best_N, at_N = self.padded(value_C, fill=-inf).max(-1)
        return best_N, at_N.add_(self.start_N)


def descending(value_NK: torch.Tensor) -> torch.Tensor:
    """(N, K): the order of each row's values, largest first, equal ones by place; no NaN."""
    if value_NK.is_cuda or value_NK.dtype != torch.float32:
        return value_NK.sort(dim=-1, descending=True, stable=True).indices
    # One sort of integers that hold value and place: a tenth of torch's stable sort. Adding 0 makes -0 equal to 0.
    bits_NK = (value_NK + 0.0).numpy().view(np.int32)
    rising_NK = bits_NK ^ ((bits_NK >> 31) & np.int32(0x7FFFFFFF))
    key_NK = (~rising_NK).astype(np.int64) << _INDEX_BITS
    key_NK |= np.arange(value_NK.shape[1], dtype=np.int64)
    key_NK.sort(axis=-1)
    return torch.from_numpy(key_NK & ((1 << _INDEX_BITS) - 1))


def true_indices(mask: torch.Tensor) -> torch.Tensor:
    """Where a flat mask is true."""
    if mask.is_cuda:
        return mask.nonzero()[:, 0]
    # torch.nonzero takes 5 ns an element whether true or not, numpy's a tenth of that.
    return torch.from_numpy(np.flatnonzero(mask.numpy()))
