"""Whose the rows of the layer being run are: told by the decoder before each run of layers, read by the layers' deltas.
Knows no adapter but its slot.

Shapes: N rows, A rows with a seat, G groups of rows with one adapter, C rows of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from uld_serve.model.beside import Beside

# fp32 products of 4, 8, 12, … rows sum in one order, those of fewer in another: rows are filled up to a multiple, so
# that what a request gets does not depend on who is beside it.
ROWS_MULTIPLE = 4
# More adapters than this in one batch are applied by batched products; up to here a loop is faster.
LOOPED_GROUPS = 4
# Batched products fill every group up to the widest. Not where one group's prompt stands beside others' single rows.
LARGEST_FILL = 4


def filled(count: int) -> int:
    return -(-count // ROWS_MULTIPLE) * ROWS_MULTIPLE


@dataclass(frozen=True, slots=True)
class Group:
    """Assistant rows [first, end), counted from the first assistant, with the adapter in `slot`."""

    slot: int
    first: int
    end: int


@dataclass(slots=True)
class LoraRows:
    """Whose the rows of the layer being run are: those from `start` on are assistants, in groups by slot.

    One object is shared by a model's linear layers and set by its decoder before each run of layers,
    because Hugging Face's MLPs hand no keyword arguments down.
    """

    start: int = 0
    groups: tuple[Group, ...] = ()
    slots: tuple[int, ...] = ()
    seats_GC: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    back_N: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    is_batched: bool = False
    rows_A: torch.Tensor | None = None
    slots_A: torch.Tensor | None = None
    beside: Beside | None = None
    _seated: tuple[int, ...] | None = None
    _groups: tuple[Group, ...] = ()

    def seat(self, start: int, slots: Sequence[int], device: torch.device) -> None:
        """The rows from `start` on have these slots, equal ones side by side; a slot that no adapter has is none."""
        self.start = start
        if self._seated == tuple(slots):  # a decode step mostly looks like the one before
            self.groups = self._groups
            return
        self._seated = None
        groups, first = [], 0
        for slot, rows in groupby(slots):
            end = first + len(list(rows))
            groups.append(Group(slot, first, end))
            first = end
        self.groups = self._groups = tuple(groups)
        self.slots = tuple(group.slot for group in groups)
        width = filled(max((group.end - group.first for group in groups), default=0))
        self.is_batched = len(groups) > LOOPED_GROUPS and len(groups) * width <= LARGEST_FILL * len(slots)
        if not self.is_batched:
            self._seated = tuple(slots)
            return
        # Padding repeats a group's first row; what it gives is not read back.
        seats = [[min(group.first + c, group.end - 1) for c in range(width)] for group in groups]
        back = [g * width + c for g, group in enumerate(groups) for c in range(group.end - group.first)]
        self.seats_GC = torch.tensor(seats, device=device)
        self.back_N = torch.tensor(back, device=device)
        self._seated = tuple(slots)  # last: what failed half-way must be made anew

    def seat_on_device(
        self, rows_A: torch.Tensor, slots_A: torch.Tensor, *, beside: Beside | None = None
    ) -> None:
        """Rows `rows_A` have the slots in `slots_A`, negative for none: nothing of it is read on the host. `beside`:
        where products are made smaller while the base's own run."""
        self.rows_A, self.slots_A, self.beside = rows_A, slots_A, beside

    def clear(self) -> None:
        self.groups, self.rows_A, self.slots_A, self.beside = (), None, None, None
