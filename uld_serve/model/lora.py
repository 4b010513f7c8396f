"""Low-rank deltas of adapters on the assistant rows of a batch. Made by the adapter bank and the fused layers, told by
the decoder which rows are whose. y = W x + scaling * B (A x), arXiv 2106.09685 Eq. 3. Knows no profile and no request:
an adapter is a slot number and pairs of tensors.

Shapes: N rows, I input width, O output width of one part, r rank, P places of the store, X = r times the parts
that adapters change, G groups of rows with one adapter, C rows of a group, J slices of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from uld_kernels.lora import Seats, expand, shrink

from uld_serve.model.lora_rows import ROWS_MULTIPLE, Group, LoraRows, filled
from uld_serve.model.packed_linear import PackedLinear

FIRST_SLOTS = 1024

Pair = tuple[torch.Tensor, torch.Tensor]
"""A (r, I) and B (O, r) of one linear layer, the adapter's scaling already in B."""


class LoraDelta:
    """What adapters add to one product, which may join several linear layers over one input (its parts).

    A of all changed parts lie side by side, so that one product shrinks for all. On a CPU the deltas are kept and
    computed in fp32: products of that size take a quarter of the time that bfloat16 ones take there (11 against 40 us
    for one row of SmolLM2), for twice the bytes.
    """

    def __init__(
        self,
        in_features: int,
        sizes: Sequence[int],
        rows: LoraRows,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.in_features, self.sizes, self.rows = in_features, tuple(sizes), rows
        self.dtype = torch.float32 if device.type == "cpu" else dtype
        self.device = device
        self.rank = 0
        self.parts: tuple[int, ...] = ()
        self.places: dict[int, int] = {}
        self.A_PIX = torch.zeros(0, in_features, 0, dtype=self.dtype, device=device)
        self.B_PrO: dict[int, torch.Tensor] = {}
        self._filled_CI = torch.zeros(ROWS_MULTIPLE, in_features, dtype=self.dtype, device=device)
        self._offsets = [0, *accumulate(self.sizes)]
        # Place of every slot, on the device; -1: none.
        with torch.inference_mode(False):  # written to whenever an adapter comes or goes
            self._place_of = torch.full((FIRST_SLOTS,), -1, device=device)
        self._loaded: dict[int, tuple[int, tuple[int, ...]]] = {}  # slot -> rank and parts
        self._views: dict[int, tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = {}
        self._gathered: tuple[tuple[int, ...], torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    def product(self, x_NI: torch.Tensor, base: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `base` gives, with the deltas of the rows that are seated added in place."""
        rows = self.rows
        if rows.rows_A is None or rows.slots_A is None:
            y_NO = base()
            self.add_to(y_NO, x_NI)
            return y_NO
        if not self.parts or rows.rows_A.shape[0] == 0:
            return base()
        seats = Seats(rows.rows_A, rows.slots_A, self._place_of)
        with rows.beside.branch() if rows.beside is not None else nullcontext():
            shrunk_JAX = shrink(x_NI, self.A_PIX, seats)
        y_NO = base()
        if rows.beside is not None:
            rows.beside.join()
        expand(y_NO, shrunk_JAX, [(self.B_PrO[part], self._offsets[part]) for part in self.parts], seats)
        return y_NO

    def add_to(self, y_NO: torch.Tensor, x_NI: torch.Tensor) -> None:
        """Add the deltas of the rows that are seated on the host, in place. Both hold all rows of the layer."""
        rows = self.rows
        if not rows.groups or not self.places:
            return
        if rows.is_batched and all(slot in self.places for slot in rows.slots):
            self._add_batched(y_NO, x_NI)
        else:
            for group in rows.groups:
                if group.slot in self.places:
                    self._add_group(y_NO, x_NI, group)

    def _add_group(self, y_NO: torch.Tensor, x_NI: torch.Tensor, group: Group) -> None:
        A_IX, parts_B_rO = self._view(group.slot)
        first, end = self.rows.start + group.first, self.rows.start + group.end
        x_CI = self._filled(x_NI, first, end)
        shrunk_CX = torch.mm(x_CI, A_IX)
        y_CO = y_NO[first:end]
        if len(self.parts) == 1:
            self._columns(y_CO, self.parts[0]).add_(torch.mm(shrunk_CX, parts_B_rO[0])[first - end :])
            return
        low, high = self._offsets[self.parts[0]], self._offsets[self.parts[-1] + 1]
        # Parts are mostly neighbours: one sum for all. What lies between others stays as it is.
        delta_CO = (shrunk_CX.new_empty if self._are_neighbours else shrunk_CX.new_zeros)(
            shrunk_CX.shape[0], high - low
        )
        for number, (part, B_rO) in enumerate(zip(self.parts, parts_B_rO, strict=True)):
            own_Cr = shrunk_CX[:, number * self.rank : (number + 1) * self.rank]
            torch.mm(own_Cr, B_rO, out=delta_CO[:, self._offsets[part] - low : self._offsets[part + 1] - low])
        y_CO[:, low:high].add_(delta_CO[first - end :])

    @property
    def _are_neighbours(self) -> bool:
        return self.parts[-1] - self.parts[0] == len(self.parts) - 1

    def _filled(self, x_NI: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) in the deltas' dtype, as the last of a multiple of rows. What fills up are the rows
        before them, or, where there are too few, anything; nothing of it is read back."""
        width = filled(end - first)
        if end >= width:
            return x_NI[end - width : end].to(self.dtype)
        if width > ROWS_MULTIPLE:  # the target's own rows carry the adapter, from the first on
            return F.pad(x_NI[first:end].to(self.dtype), (0, 0, first - end + width, 0))
        self._filled_CI[first - end :].copy_(x_NI[first:end])
        return self._filled_CI

    def _add_batched(self, y_NO: torch.Tensor, x_NI: torch.Tensor) -> None:
        rows = self.rows
        A_GIX, parts_B_GrO = self._of_groups(tuple(self.places[slot] for slot in rows.slots))
        x_GCI = x_NI[rows.start :].index_select(0, rows.seats_GC.flatten()).to(self.dtype)
        shrunk_GCX = x_GCI.view(*rows.seats_GC.shape, self.in_features) @ A_GIX
        y_CO = y_NO[rows.start :]
        for number, (part, B_GrO) in enumerate(zip(self.parts, parts_B_GrO, strict=True)):
            low = number * self.rank
            delta_GCO = shrunk_GCX[..., low : low + self.rank] @ B_GrO
            self._columns(y_CO, part).add_(delta_GCO.flatten(0, 1).index_select(0, rows.back_N))

    def _columns(self, y_CO: torch.Tensor, part: int) -> torch.Tensor:
        if len(self.sizes) == 1:
            return y_CO
        return y_CO[:, self._offsets[part] : self._offsets[part + 1]]

    def _view(self, slot: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        if slot not in self._views:
            place = self.places[slot]
            self._views[slot] = self.A_PIX[place], tuple(self.B_PrO[part][place] for part in self.parts)
        return self._views[slot]

    def _of_groups(self, places: tuple[int, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The tensors at these places, as views where they lie side by side."""
        if places == tuple(range(places[0], places[0] + len(places))):
            span = slice(places[0], places[-1] + 1)
            return self.A_PIX[span], tuple(self.B_PrO[part][span] for part in self.parts)
        if self._gathered is None or self._gathered[0] != places:
            index = torch.tensor(places, device=self.device)
            self._gathered = (
                places,
                self.A_PIX[index],
                tuple(self.B_PrO[part][index] for part in self.parts),
            )
        return self._gathered[1], self._gathered[2]

    def put(self, slot: int, pairs: Mapping[int, Pair]) -> None:
        """Take in one adapter's pairs, by part."""
        taken = set(self.places.values())
        place = next(p for p in range(len(taken) + 1) if p not in taken)
        rank = max(A_rI.shape[0] for A_rI, _ in pairs.values())
        self._resize(place + 1, max(rank, self.rank), tuple(sorted({*self.parts, *pairs})))
        self.A_PIX[place] = 0
        for number, part in enumerate(self.parts):
            self.B_PrO[part][place] = 0
            if part in pairs:
                A_rI, B_Or = pairs[part]
                low, own = number * self.rank, A_rI.shape[0]
                self.A_PIX[place, :, low : low + own] = A_rI.T
                self.B_PrO[part][place, :own] = B_Or.T
        self.places[slot] = place
        if slot >= len(self._place_of):
            self._place_of = F.pad(self._place_of, (0, len(self._place_of)), value=-1)
        self._place_of[slot] = place
        self._loaded[slot] = (rank, tuple(pairs))
        self._forget_views()

    def drop(self, slot: int) -> None:
        """Leave an adapter's place to others; nothing if it has none here."""
        if self.places.pop(slot, None) is not None:
            del self._loaded[slot]
            self._place_of[slot] = -1
            self._forget_views()

    @property
    def resident_bytes(self) -> int:
        return self.bytes_of(self.A_PIX.shape[0], self.rank, self.parts)

    def bytes_of(self, num_places: int, rank: int, parts: Collection[int]) -> int:
        """Every place has room for the largest rank and for every changed part: smaller adapters are padded."""
        width = sum(self.in_features + self.sizes[part] for part in parts)
        return num_places * rank * width * self.dtype.itemsize

    def bytes_with(self, rank: int, parts: Collection[int]) -> int:
        """Resident bytes with one more adapter of this rank on these parts; none is one without parts."""
        num_places = max(self.A_PIX.shape[0], len(self.places) + bool(parts))
        return self.bytes_of(num_places, max(rank, self.rank), {*self.parts, *parts})

    def compact(self) -> None:
        """Give back what dropped adapters have left: places, and room for ranks and parts that nobody has any more."""
        if len(self.places) == self.A_PIX.shape[0]:
            return
        kept = {slot: (self._view(slot), self.parts, self.rank) for slot in self.places}
        loaded = dict(self._loaded)
        self.rank, self.parts, self.places, self._loaded = 0, (), {}, {}
        self.A_PIX = self.A_PIX.new_zeros(0, self.in_features, 0)
        self.B_PrO = {}
        self._forget_views()
        rank = max((rank for rank, _ in loaded.values()), default=0)
        self._resize(len(kept), rank, tuple(sorted({part for _, parts in loaded.values() for part in parts})))
        for slot, ((A_IX, parts_B_rO), parts, old_rank) in kept.items():
            own_rank, own_parts = loaded[slot]
            pairs = {}
            for number, part in enumerate(parts):
                if part in own_parts:
                    low = number * old_rank
                    pairs[part] = (A_IX[:, low : low + own_rank].T, parts_B_rO[number][:own_rank].T)
            self.put(slot, pairs)

    def _resize(self, num_places: int, rank: int, parts: tuple[int, ...]) -> None:
        """Room for so many places, of this rank and with these parts; never less than there is."""
        num_places = max(num_places, self.A_PIX.shape[0])
        if (num_places, rank, parts) == (self.A_PIX.shape[0], self.rank, self.parts):
            return
        old_A, old_B, old_parts, old_rank = self.A_PIX, self.B_PrO, self.parts, self.rank
        held = old_A.shape[0]
        self.A_PIX = old_A.new_zeros(num_places, self.in_features, rank * len(parts))
        self.B_PrO = {part: old_A.new_zeros(num_places, rank, self.sizes[part]) for part in parts}
        for number, part in enumerate(old_parts):
            low, to = number * old_rank, parts.index(part) * rank
            self.A_PIX[:held, :, to : to + old_rank] = old_A[:, :, low : low + old_rank]
            self.B_PrO[part][:held, :old_rank] = old_B[part]
        self.rank, self.parts = rank, parts
        self._forget_views()

    def _forget_views(self) -> None:
        self._views, self._gathered = {}, None


class LoraLinear(nn.Module):
    """A linear layer of a Hugging Face layer and the deltas of the adapters that change it: one part."""

    def __init__(self, base: nn.Linear | PackedLinear, rows: LoraRows, device: torch.device) -> None:
        super().__init__()
        self.base = base
        self.delta = LoraDelta(
            base.in_features, [base.out_features], rows, dtype=base.weight.dtype, device=device
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.delta.product(x[0], lambda: self.base(x)[0])[None]
