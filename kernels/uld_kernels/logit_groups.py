"""Rows of scores cut into groups of token ids, so that a search reads each group's best and then few tokens. Called by
the torch samplers. Knows no rule and no noise.

Measured at 32 rows of 49,152 on one core: the best of each group 0.12 ms, argmax or nonzero over everything 6 to 8 ms.

Legend: R rows of scores, N of them looked at, V vocabulary, G groups, S ids of one group, M = R * G, C tokens found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
import torch

from uld_kernels.noise import GROUP_BITS, GROUP_SIZE
from uld_kernels.segments import Segments, true_indices

LOWEST = torch.finfo(torch.float32).min
"""Below it lie banned tokens and the padding of groups."""

# Values of which the largest stands for all when the k largest of many are looked for.
_FEW = 32
# The finest cut: shorter groups cost more than they save.
_FINEST = 64


@dataclass(frozen=True, slots=True)
class Found:
    """Tokens of several rows, by row and then by id."""

    row_C: torch.Tensor
    id_C: torch.Tensor
    value_C: torch.Tensor
    _segments: dict[int, Segments] = field(default_factory=dict, compare=False)

    def segments(self, num_rows: int) -> Segments:
        """Where each row's tokens lie; worked out once."""
        if num_rows not in self._segments:
            self._segments[num_rows] = Segments.of(self.row_C, num_rows)
        return self._segments[num_rows]

    def where(self, keep_C: torch.Tensor) -> Found:
        kept = true_indices(keep_C)
        return Found(
            self.row_C.index_select(0, kept),
            self.id_C.index_select(0, kept),
            self.value_C.index_select(0, kept),
        )

    def first_best(self, value_C: torch.Tensor, *, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row the largest of some values of its tokens, NaN if there is one, and the index of its first; each
        row has a token."""
        return self.segments(num_rows).first_best(value_C)

    def valued(self, value_C: torch.Tensor) -> Found:
        """The same tokens with other values."""
        return Found(self.row_C, self.id_C, value_C, self._segments)


@dataclass(frozen=True, slots=True)
class LogitGroups:
    values_MS: torch.Tensor
    """(R * G, S); -inf fills the last group of a row."""
    row_N: torch.Tensor
    """Rows of the values that are looked at: all else here is by their number in this list."""
    max_NG: torch.Tensor
    """NaN where the group has one."""
    size: int
    """V."""

    @classmethod
    def of(cls, values_RV: torch.Tensor, *, size: int | None = None) -> LogitGroups:
        """Copies only where rows are no whole number of groups or do not lie side by side. `size` is V where the
        values come with their padding."""
        num_rows, width = values_RV.shape
        size = width if size is None else size
        num_groups = -(-size >> GROUP_BITS)
        if width != num_groups * GROUP_SIZE:
            whole_RV = values_RV.new_full((num_rows, num_groups * GROUP_SIZE), -inf)
            whole_RV[:, :size] = values_RV
            values_RV = whole_RV
        values_MS = values_RV.reshape(num_rows * num_groups, GROUP_SIZE).contiguous()
        row_R = torch.arange(num_rows, device=values_MS.device)
        return cls(values_MS, row_R, values_MS.amax(-1).view(num_rows, num_groups), size)

    def select(self, index: Sequence[int]) -> LogitGroups:
        """Some of these rows; copies no score."""
        if list(index) == list(range(len(self.row_N))):
            return self
        index_N = torch.tensor(index, device=self.row_N.device)
        row_N, max_NG = self.row_N.index_select(0, index_N), self.max_NG.index_select(0, index_N)
        return LogitGroups(self.values_MS, row_N, max_NG, self.size)

    def cut(self, group_size: int) -> LogitGroups:
        """The same in smaller groups."""
        values_MS = self.values_MS.view(-1, group_size)
        num_rows = self.row_N.shape[0]
        # As many rows as there are may still be others, or in another order.
        is_everything = num_rows * self.max_NG.shape[1] == self.values_MS.shape[0]
        if is_everything and bool((self.row_N[1:] > self.row_N[:-1]).all()):
            chosen_MS = values_MS
        else:
            chosen_MS = self._whole_rows().index_select(0, self.row_N)
        max_NG = chosen_MS.view(-1, group_size).amax(-1).view(num_rows, -1)
        return LogitGroups(values_MS, self.row_N, max_NG, self.size)

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row the largest score, NaN if there is one, and its lowest id."""
        num_groups, group_size = self.max_NG.shape[1], self.values_MS.shape[1]
        value_N, group_N = self.max_NG.max(-1)
        within_N = self.values_MS.index_select(0, self.row_N * num_groups + group_N).argmax(-1)
        return value_N, group_N * group_size + within_N

    def at(self, id_NK: torch.Tensor) -> torch.Tensor:
        """The scores of some tokens of each row."""
        width = self.max_NG.shape[1] * self.values_MS.shape[1]
        return self.values_MS.view(-1).take(self.row_N[:, None] * width + id_NK)

    def at_each(self, row_C: torch.Tensor, id_C: torch.Tensor) -> torch.Tensor:
        """The score of token id_C[i] in row row_C[i]."""
        width = self.max_NG.shape[1] * self.values_MS.shape[1]
        place_C = self.row_N.index_select(0, row_C).mul_(width).add_(id_C)
        return self.values_MS.view(-1).index_select(0, place_C)

    def copy(self) -> torch.Tensor:
        """(N, V) scores to write in, followed by their padding."""
        return self._whole_rows().index_select(0, self.row_N)

    def row(self, number: int) -> torch.Tensor:
        """(V,)."""
        return self._whole_rows()[int(self.row_N[number].item()), : self.size]

    def at_least(self, limit_NG: torch.Tensor) -> Found:
        """All tokens whose score reaches the limit of their row and group; limits broadcast over groups."""
        num_groups, group_size = self.max_NG.shape[1], self.values_MS.shape[1]
        bits = group_size.bit_length() - 1
        hit_H = true_indices((self.max_NG >= limit_NG).flatten())
        row_H = hit_H // num_groups
        group_H = hit_H - row_H * num_groups
        values_HS = self.values_MS.index_select(0, self.row_N.index_select(0, row_H) * num_groups + group_H)
        limit_H = limit_NG.expand_as(self.max_NG).flatten().index_select(0, hit_H)
        found_C = _reaching(values_HS, limit_H)
        place_C = found_C >> bits
        id_C = (group_H << bits).index_select(0, place_C).add_(found_C & (group_size - 1))
        return Found(row_H.index_select(0, place_C), id_C, values_HS.flatten().index_select(0, found_C))

    def holding_largest(self, k: int) -> tuple[LogitGroups, torch.Tensor]:
        """A cut of these rows and a limit of each row (N,) that at least its k largest finite scores reach."""
        groups = self
        while groups.max_NG.shape[1] < 2 * k and groups.values_MS.shape[1] > _FINEST:
            groups = self.cut(groups.values_MS.shape[1] // 4)
        if groups.max_NG.shape[1] < 2 * k:
            return self, self._kth_scores(k)
        # Each of the k best groups has a token of its own that reaches the k-th of them.
        return groups, kth_largest(groups.max_NG, k).clamp_min(LOWEST)

    def _kth_scores(self, k: int) -> torch.Tensor:
        if k >= self.size:
            return self.max_NG.new_full(self.row_N.shape, LOWEST)
        whole_RW = self._whole_rows()
        kth = [kth_largest(whole_RW[row : row + 1], k) for row in self.row_N.tolist()]
        return torch.cat(kth).clamp_min_(LOWEST)

    def _whole_rows(self) -> torch.Tensor:
        return self.values_MS.view(-1, self.max_NG.shape[1] * self.values_MS.shape[1])


def _reaching(values_HS: torch.Tensor, limit_H: torch.Tensor) -> torch.Tensor:
    """Flat places of the values that reach their row's limit."""
    if values_HS.is_cuda:
        return true_indices((values_HS >= limit_H[:, None]).flatten())
    # Short rows against one number each: numpy compares them in a third of torch's time.
    return torch.from_numpy(np.flatnonzero(values_HS.numpy() >= limit_H.numpy()[:, None]))


def kth_largest(values_NK: torch.Tensor, k: int) -> torch.Tensor:
    """(N,); no NaN."""
    if values_NK.is_cuda:
        return values_NK.topk(k, sorted=False).values.amin(-1)
    # A quarter of what torch.topk takes.
    place = values_NK.shape[1] - k
    return torch.from_numpy(np.partition(values_NK.numpy(), place, axis=-1)[:, place].copy())


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
    key_C, key_D = ((found.row_C << 32) + found.id_C for found in (first, second))
    num_first, num_second = key_C.shape[0], key_D.shape[0]
    place_D = torch.searchsorted(key_C, key_D) + torch.arange(num_second, device=key_D.device)
    order = torch.full((num_first + num_second,), -1, device=key_C.device)
    order.index_copy_(0, place_D, torch.arange(num_first, num_first + num_second, device=key_C.device))
    order.index_copy_(0, true_indices(order < 0), torch.arange(num_first, device=key_C.device))
    return Found(
        torch.cat([first.row_C, second.row_C]).index_select(0, order),
        torch.cat([first.id_C, second.id_C]).index_select(0, order),
        torch.cat([first.value_C, second.value_C]).index_select(0, order),
    )
