"""Linear layers of the base with low-rank deltas on the assistant rows of a batch.

Made by the adapter bank, told by the decoder which rows are whose. y = W x + scaling * B (A x), arXiv 2106.09685
Eq. 3. Knows no profile and no request: an adapter is a slot number and two tensors.

Shapes: I input width, O output width, r rank, P places of the layer's store, N assistant rows, G groups of rows with
one adapter, C rows of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch
from torch import nn

from uld_serve.model.packed_linear import PackedLinear

# fp32 products of 4, 8, 12, … rows sum in one order, those of fewer in another: rows are filled up to a multiple, so
# that what a request gets does not depend on who is beside it.
ROWS_MULTIPLE = 4
# More adapters than this in one batch are applied by two batched products; up to here a loop is faster.
LOOPED_GROUPS = 4


@dataclass(frozen=True, slots=True)
class Group:
    """Assistant rows [first, end) with the adapter in `slot`."""

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
    _seated: tuple[int, ...] | None = None
    _groups: tuple[Group, ...] = ()

    def seat(self, start: int, slots: Sequence[int], device: torch.device) -> None:
        """The rows from `start` on have these slots, equal ones side by side."""
        self.start = start
        if self._seated == tuple(slots):  # a decode step mostly looks like the one before
            self.groups = self._groups
            return
        self._seated = tuple(slots)
        groups, first = [], 0
        for slot, rows in groupby(slots):
            end = first + len(list(rows))
            groups.append(Group(slot, first, end))
            first = end
        self.groups = self._groups = tuple(groups)
        self.slots = tuple(group.slot for group in groups)
        width = max((group.end - group.first for group in groups), default=0)
        width = -(-width // ROWS_MULTIPLE) * ROWS_MULTIPLE
        # Padding repeats a group's first row; what it gives is not read back.
        seats = [[min(group.first + c, group.end - 1) for c in range(width)] for group in groups]
        back = [g * width + c for g, group in enumerate(groups) for c in range(group.end - group.first)]
        self.seats_GC = torch.tensor(seats, device=device)
        self.back_N = torch.tensor(back, device=device)

    def clear(self) -> None:
        self.groups = ()


class LoraLinear(nn.Module):
    """A linear layer of the base and the deltas of the adapters that change it.

    On a CPU the deltas are kept and computed in fp32: products of that size take a quarter of the time that
    bfloat16 ones take there (11 against 40 us for one row of SmolLM2), for twice the bytes.
    """

    def __init__(self, base: nn.Linear | PackedLinear, rows: LoraRows, device: torch.device) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        dtype = torch.float32 if device.type == "cpu" else base.weight.dtype
        self.A_PIr = torch.zeros(0, base.in_features, 0, dtype=dtype, device=device)
        self.B_PrO = torch.zeros(0, 0, base.out_features, dtype=dtype, device=device)
        self.places: dict[int, int] = {}
        self._ranks: dict[int, int] = {}
        self._gathered: tuple[tuple[int, ...], torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        rows = self.rows
        if not rows.groups or not self.places:
            return y
        x_NI, y_NO = x[0, rows.start :].to(self.A_PIr.dtype), y[0, rows.start :]
        if len(rows.groups) > LOOPED_GROUPS and all(slot in self.places for slot in rows.slots):
            self._add_batched(x_NI, y_NO)
        else:
            self._add_looped(x_NI, y_NO)
        return y

    def _add_looped(self, x_NI: torch.Tensor, y_NO: torch.Tensor) -> None:
        for number, group in enumerate(self.rows.groups):
            place = self.places.get(group.slot)
            if place is not None:
                x_CI = x_NI.index_select(0, self.rows.seats_GC[number])
                delta_CO = x_CI @ self.A_PIr[place] @ self.B_PrO[place]
                y_NO[group.first : group.end] += delta_CO[: group.end - group.first]

    def _add_batched(self, x_NI: torch.Tensor, y_NO: torch.Tensor) -> None:
        A_GIr, B_GrO = self._of_groups(tuple(self.places[slot] for slot in self.rows.slots))
        delta_GCO = x_NI[self.rows.seats_GC] @ A_GIr @ B_GrO
        y_NO += delta_GCO.flatten(0, 1)[self.rows.back_N]

    def _of_groups(self, places: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors at these places, as views where they lie side by side."""
        if all(after == before + 1 for before, after in pairwise(places)):
            span = slice(places[0], places[-1] + 1)
            return self.A_PIr[span], self.B_PrO[span]
        if self._gathered is None or self._gathered[0] != places:
            index = torch.tensor(places, device=self.A_PIr.device)
            self._gathered = (places, self.A_PIr[index], self.B_PrO[index])
        return self._gathered[1], self._gathered[2]

    def put(self, slot: int, A_rI: torch.Tensor, B_Or: torch.Tensor) -> None:
        """Take in the delta of one adapter, its scaling already in B."""
        taken = set(self.places.values())
        place = next(p for p in range(len(taken) + 1) if p not in taken)
        rank = A_rI.shape[0]
        self._grow(place + 1, rank)
        self.A_PIr[place] = 0
        self.B_PrO[place] = 0
        self.A_PIr[place, :, :rank] = A_rI.T
        self.B_PrO[place, :rank] = B_Or.T
        self.places[slot] = place
        self._ranks[slot] = rank
        self._gathered = None

    def drop(self, slot: int) -> None:
        """Leave an adapter's place to others; nothing if it has none here."""
        if self.places.pop(slot, None) is not None:
            self._gathered = None

    @property
    def resident_bytes(self) -> int:
        return self.bytes_of(self.A_PIr.shape[0], self.A_PIr.shape[2])

    def bytes_of(self, num_places: int, rank: int) -> int:
        """Every place has room for the largest rank: smaller ones are padded to it."""
        widths = self.base.in_features + self.base.out_features
        return num_places * rank * widths * self.A_PIr.element_size()

    def bytes_with(self, rank: int) -> int:
        """Resident bytes with one more adapter of this rank; 0 is none."""
        num_places = max(self.A_PIr.shape[0], len(self.places) + (rank > 0))
        return self.bytes_of(num_places, max(rank, self.A_PIr.shape[2]))

    def compact(self) -> None:
        """Give back what dropped adapters have left: their places, and room for a rank that nobody has any more."""
        if len(self.places) == self.A_PIr.shape[0]:
            return
        rank = max((self._ranks[slot] for slot in self.places), default=0)
        index = torch.tensor(list(self.places.values()), dtype=torch.long, device=self.A_PIr.device)
        self.A_PIr = self.A_PIr[index, :, :rank].contiguous()
        self.B_PrO = self.B_PrO[index, :rank].contiguous()
        self.places = {slot: place for place, slot in enumerate(self.places)}
        self._gathered = None

    def _grow(self, num_places: int, rank: int) -> None:
        A, B = self.A_PIr, self.B_PrO
        num_places, rank = max(num_places, A.shape[0]), max(rank, A.shape[2])
        if (num_places, rank) == (A.shape[0], A.shape[2]):
            return
        self.A_PIr = A.new_zeros(num_places, A.shape[1], rank)
        self.B_PrO = B.new_zeros(num_places, rank, B.shape[2])
        self.A_PIr[: A.shape[0], :, : A.shape[2]] = A
        self.B_PrO[: B.shape[0], : B.shape[1]] = B
