"""Low-rank deltas of many adapters in one batch: what they are in plain torch, and the choice of backend. Called by the
model's linear layers. Knows no adapter by name: a row has a place in the store.

Legend: N rows of the layer, A rows with an adapter, I input width, O output width of a part, P places, r rank,
X shrunk width (r times the parts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch

HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def add_deltas(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    A_PIX: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, int]],
    *,
    rows_A: torch.Tensor,
    places_A: torch.Tensor,
    place_of_Z: torch.Tensor | None = None,
) -> None:
    """y += (x A) B in place, for rows with an adapter (arXiv 2106.09685, Eq. 3; scaling and order are in A and B).

    parts       linear layers over one input: B (P, r, O) and the column of y where its output begins. Columns of A
                lie in the order of the parts, r each.
    rows_A      rows of x and y, each at most once.
    places_A    the place in A and B of each of them; negative: none. Equal places side by side are one product.
    place_of_Z  makes places_A numbers of adapters: the place of each, negative where it has none in these layers, as
                have numbers beyond it. So one places_A serves all layers of a step, and no launch looks them up.

    Sums are in fp32 and rounded once. On CUDA a row's bits hang on nothing beside it. Raises ValueError for
    shapes that do not fit; ids in the tables are not looked at, since that would wait for the device.
    """
    _check(y_NO, x_NI, A_PIX, parts, rows_A, places_A)
    seats = Seats(rows_A, places_A, place_of_Z)
    expand(y_NO, shrink(x_NI, A_PIX, seats), parts, seats)


class Tables(TypedDict):
    rows_A: torch.Tensor
    places_A: torch.Tensor
    place_of_Z: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Seats:
    """rows_A, places_A and place_of_Z of add_deltas."""

    rows_A: torch.Tensor
    places_A: torch.Tensor
    place_of_Z: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.rows_A.shape != self.places_A.shape:
            raise ValueError(f"{self.rows_A.shape[0]} rows and {self.places_A.shape[0]} places")
        if self.place_of_Z is not None and not self.place_of_Z.is_contiguous():
            raise ValueError("the places of adapters must lie contiguous")

    @property
    def tables(self) -> Tables:
        return {"rows_A": self.rows_A, "places_A": self.places_A, "place_of_Z": self.place_of_Z}

    def looked_up_A(self) -> torch.Tensor:
        """The place of each row, negative where it has none."""
        if self.place_of_Z is None:
            return self.places_A
        is_known_A = (self.places_A >= 0) & (self.places_A < self.place_of_Z.shape[0])
        found_A = self.place_of_Z[torch.where(is_known_A, self.places_A, 0).long()]
        return torch.where(is_known_A, found_A, -1)


def shrink(x_NI: torch.Tensor, A_PIX: torch.Tensor, seats: Seats) -> torch.Tensor | None:
    """The first half of add_deltas: partial sums (J, A, X) of x A in fp32, by slice of the input; None where there is
    no row or no adapter. It needs no y, so it may run beside the product that makes it. Rows without an adapter hold
    anything."""
    if seats.rows_A.shape[0] == 0 or 0 in A_PIX.shape:
        return None
    if _runs_on_triton(x_NI):
        # Imported where used: triton is not there on every machine that serves from the CPU.
        from uld_kernels import lora_triton

        return lora_triton.shrink(x_NI, A_PIX, **seats.tables)
    return shrink_reference(x_NI, A_PIX, seats)


def expand(
    y_NO: torch.Tensor,
    shrunk_JAX: torch.Tensor | None,
    parts: Sequence[tuple[torch.Tensor, int]],
    seats: Seats,
) -> None:
    """The second half of add_deltas: adds what `shrink` gave, times B, to y in place."""
    if shrunk_JAX is None:
        return
    if _runs_on_triton(y_NO):
        from uld_kernels import lora_triton

        lora_triton.expand(y_NO, shrunk_JAX, parts, **seats.tables)
    else:
        expand_reference(y_NO, shrunk_JAX, parts, seats)


def shrink_reference(x_NI: torch.Tensor, A_PIX: torch.Tensor, seats: Seats) -> torch.Tensor:
    """The definition, in one slice. Gathers every row's adapter; fp32, or fp64 for fp64 inputs."""
    dtype = torch.promote_types(x_NI.dtype, torch.float32)
    own_A = seats.looked_up_A().clamp_min(0)
    return (x_NI[seats.rows_A.long()].to(dtype)[:, None] @ A_PIX[own_A].to(dtype)).transpose(0, 1)


def expand_reference(
    y_NO: torch.Tensor,
    shrunk_JAX: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, int]],
    seats: Seats,
) -> None:
    """The definition. Gathers every row's adapter; fp32, or fp64 for fp64 inputs."""
    dtype, rows_A, places_A = shrunk_JAX.dtype, seats.rows_A.long(), seats.looked_up_A()
    own_A, shrunk_A1X = places_A.clamp_min(0), shrunk_JAX.sum(0)[:, None]
    for number, (B_PrO, first) in enumerate(parts):
        _, r, width = B_PrO.shape
        delta_AO = (shrunk_A1X[..., number * r : (number + 1) * r] @ B_PrO[own_A].to(dtype))[:, 0]
        y_part_NO = y_NO[:, first : first + width]
        y_AO = y_part_NO[rows_A].to(dtype)
        y_AO = torch.where((places_A < 0)[:, None], y_AO, y_AO + delta_AO)
        y_part_NO.index_copy_(0, rows_A, y_AO.to(y_NO.dtype))


def reference(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    A_PIX: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, int]],
    *,
    rows_A: torch.Tensor,
    places_A: torch.Tensor,
) -> None:
    """Both definitions, one after the other."""
    if rows_A.shape[0] and 0 not in A_PIX.shape:
        seats = Seats(rows_A, places_A)
        expand_reference(y_NO, shrink_reference(x_NI, A_PIX, seats), parts, seats)


def _runs_on_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype in HALF_OR_SINGLE


def _check(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    A_PIX: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, int]],
    rows_A: torch.Tensor,
    places_A: torch.Tensor,
) -> None:
    num_places, in_width, X = A_PIX.shape
    if x_NI.shape[1] != in_width or x_NI.shape[0] != y_NO.shape[0] or rows_A.shape != places_A.shape:
        raise ValueError(
            f"x {tuple(x_NI.shape)}, y {tuple(y_NO.shape)}, A {tuple(A_PIX.shape)}, rows {tuple(rows_A.shape)} and "
            f"places {tuple(places_A.shape)} do not fit"
        )
    if sum(B_PrO.shape[1] for B_PrO, _ in parts) != X or len({B_PrO.shape[1] for B_PrO, _ in parts}) > 1:
        raise ValueError(f"A shrinks to {X}; the parts have ranks {[B_PrO.shape[1] for B_PrO, _ in parts]}")
    for B_PrO, first in parts:
        if B_PrO.shape[0] != num_places or not 0 <= first <= y_NO.shape[1] - B_PrO.shape[2]:
            raise ValueError(
                f"B {tuple(B_PrO.shape)} at column {first} does not fit y {tuple(y_NO.shape)} and {num_places} places"
            )
    given = (x_NI, y_NO, A_PIX, *(B_PrO for B_PrO, _ in parts))
    if len({tensor.dtype for tensor in given}) > 1:
        raise ValueError(f"one dtype, not {[str(tensor.dtype) for tensor in given]}")
    if x_NI.stride(1) != 1 or y_NO.stride(1) != 1 or not all(tensor.is_contiguous() for tensor in given[2:]):
        raise ValueError("rows must lie contiguous, and so must A and B")
