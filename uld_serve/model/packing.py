"""Sequences side by side without padding: every token is one row, and what all begin with is there once. Called by the
passes of borrowed.py and by who makes their input. Knows no layer.

Shapes: B sequences, T positions of the longest, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch


def num_alike(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all of them begin with."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """`slots_N` are the flat (B * T) places that rows are taken from. `seats_BT` is the row of every place; in padding,
    which lies on the right, it is the first row."""

    slots_N: torch.Tensor
    positions_N: torch.Tensor
    seats_BT: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], *, num_shared: int, device: torch.device) -> Packing:
        """The first `num_shared` positions of all sequences hold the same tokens."""
        width = max(lengths)
        starts = list(accumulate((length - num_shared for length in lengths), initial=num_shared))
        shared = list(range(num_shared))
        slots, positions, seats = list(shared), list(shared), []
        for number, length in enumerate(lengths):
            own = range(num_shared, length)
            slots += [number * width + position for position in own]
            positions += own
            rows = [*shared, *range(starts[number], starts[number + 1])]
            seats.append(rows + [0] * (width - length))
        return cls(
            torch.tensor(slots, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(seats, device=device),
        )

    def rows(self, states_BTX: torch.Tensor) -> torch.Tensor:
        """(1, N, X): what stands in the rows' places, as one sequence."""
        return states_BTX.flatten(0, 1)[self.slots_N][None]

    @property
    def positions_1N(self) -> torch.Tensor:
        return self.positions_N[None]

    def spread(self, rows_1HNW: torch.Tensor) -> torch.Tensor:
        """(B, H, T, W): every sequence whole again, for attention."""
        rows_NHW = rows_1HNW[0].transpose(0, 1)
        # index_select: the gradient of indexing adds one element after another where rows repeat.
        whole = rows_NHW.index_select(0, self.seats_BT.flatten())
        return whole.view(*self.seats_BT.shape, *rows_NHW.shape[1:]).transpose(1, 2)
