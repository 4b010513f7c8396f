"""Rows of a batch that take the same way, and what ends some of them. Called by batch_sampler and what it is made of.

Legend: N rows of the lane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from uld_kernels import rules
from uld_kernels.logit_groups import LogitGroups
from uld_kernels.noise import Stream
from uld_kernels.rows import SampleRow, Term
from uld_kernels.segments import true_indices


class RowsFailed(Exception):
    """Rows that have no token to give, by their number in the batch, with the reason. None leaves a row to the sampler
    that takes one row after the other."""

    def __init__(self, statuses: dict[int, int | None]) -> None:
        super().__init__(statuses)
        self.statuses = statuses


@dataclass(frozen=True, slots=True)
class Lane:
    """Rows, their numbers in the batch, and the target's scores of each: banned tokens at -inf, the best finite."""

    numbers: list[int]
    rows: list[SampleRow]
    groups: LogitGroups
    best_N: torch.Tensor
    best_id_N: torch.Tensor

    @classmethod
    def of(cls, numbers: list[int], rows: list[SampleRow], groups: LogitGroups) -> Lane:
        """Raises RowsFailed for targets that are NaN, infinite, or -inf everywhere."""
        best_N, best_id_N = groups.best()
        lane = cls(numbers, rows, groups, best_N, best_id_N)
        if not best_N.isfinite().all():
            lane.fail_where(best_N == -inf, rules.NOTHING_KEPT)
            lane.fail_where(~best_N.isfinite(), rules.NUMERICAL)
        return lane

    def fail_where(self, is_wrong_N: torch.Tensor, status: int | None) -> None:
        """Raises RowsFailed if a row is wrong."""
        if is_wrong_N.any():
            wrong = true_indices(is_wrong_N).tolist()
            raise RowsFailed({self.numbers[place]: status for place in wrong})

    def select(self, index: Sequence[int]) -> Lane:
        if len(index) == len(self.rows):
            return self
        index_N = torch.tensor(index, device=self.best_N.device)
        return Lane(
            [self.numbers[n] for n in index],
            [self.rows[n] for n in index],
            self.groups.select(index),
            self.best_N.index_select(0, index_N),
            self.best_id_N.index_select(0, index_N),
        )

    def column(self, values: Sequence[float]) -> torch.Tensor:
        """(N,) in the scores' dtype."""
        return torch.tensor(values, dtype=self.best_N.dtype, device=self.best_N.device)

    def temperatures(self) -> torch.Tensor:
        """(N, 1)."""
        return self.column([row.temperature for row in self.rows])[:, None]

    def terms(self) -> list[tuple[Term, ...]]:
        """For each place in the rows' terms, which are of the same kinds, that term of every row."""
        return list(zip(*(row.distinct_terms for row in self.rows), strict=True))

    def stream(self) -> Stream:
        seeds, positions = [row.seed for row in self.rows], [row.position for row in self.rows]
        return Stream.of(seeds, positions, self.best_N.device)
