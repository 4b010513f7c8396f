"""Low-rank deltas of many adapters in one batch on Triton: shrink, then expand into the base's output. Called by lora
on CUDA tensors. Knows no adapter by name: a row has a place in the store.

Never waits for the device, and which row has which adapter is data, so one CUDA graph serves any mix. No atomics: a
row's bits hang on its input and its adapter alone.

Legend: N rows of the layer, A rows with an adapter, I input width, O output width of a part, P places, r rank,
X shrunk width (r times the parts), J slices of the input width."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# Rows of one tile. Each run of equal places in it is a program of its own.
BLOCK_A = tl.constexpr(16)
BLOCK_I = 64
# Of a tile of B; more of them spill registers.
TILE_ELEMENTS = 2048
# The input is cut into slices, so that one row's shrink is not left to one multiprocessor; never into more than these.
MAX_SLICES = 16
MIN_SLICE = 512
NUM_WARPS = 4
NUM_STAGES = 3
# Parts of one expand: no layer has more over one input than queries, keys and values. More take further launches.
MAX_PARTS = 3


def shrink(
    x_NI: torch.Tensor,
    A_PIX: torch.Tensor,
    *,
    rows_A: torch.Tensor,
    places_A: torch.Tensor,
    place_of_Z: torch.Tensor | None,
) -> torch.Tensor:
    """lora.shrink where there are rows and adapters."""
    num_rows, (_, in_width, X) = rows_A.shape[0], A_PIX.shape
    slice_width, num_slices = slices_of(in_width)
    shrunk_JAX = torch.empty((num_slices, num_rows, X), dtype=torch.float32, device=x_NI.device)
    _shrink_kernel[(_num_tiles(num_rows) * _num_runs(num_rows), num_slices)](
        x_NI, x_NI.stride(0), A_PIX, A_PIX.stride(0), shrunk_JAX, *_tables(rows_A, places_A, place_of_Z),
        num_rows, _num_runs(num_rows),
        IN_WIDTH=in_width, SHRUNK_WIDTH=X, SLICE=slice_width, BLOCK_I=BLOCK_I, BLOCK_X=block_of(X),
        HAS_TABLE=place_of_Z is not None, IS_UPCAST=_is_upcast(x_NI.dtype),
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return shrunk_JAX


def expand(
    y_NO: torch.Tensor,
    shrunk_JAX: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, int]],
    *,
    rows_A: torch.Tensor,
    places_A: torch.Tensor,
    place_of_Z: torch.Tensor | None,
) -> None:
    """lora.expand, up to MAX_PARTS parts a launch."""
    num_slices, num_rows, X = shrunk_JAX.shape
    for begin in range(0, len(parts), MAX_PARTS):
        own = parts[begin : begin + MAX_PARTS]
        r = own[0][0].shape[1]
        # Places that stand for no part have no columns, so no program comes to them.
        factors = [B_PrO for B_PrO, _ in own] + [own[0][0]] * (MAX_PARTS - len(own))
        widths = [B_PrO.shape[2] for B_PrO, _ in own] + [0] * (MAX_PARTS - len(own))
        firsts = [first for _, first in own] + [0] * (MAX_PARTS - len(own))
        num_blocks = sum(triton.cdiv(width, block_o(r)) for width in widths)
        _expand_kernel[(_num_tiles(num_rows) * _num_runs(num_rows), num_blocks)](
            y_NO, y_NO.stride(0), *factors, shrunk_JAX, *_tables(rows_A, places_A, place_of_Z),
            num_rows, _num_runs(num_rows), *widths, *firsts, begin * r,
            RANK=r, SHRUNK_WIDTH=X, NUM_SLICES=num_slices, BLOCK_J=triton.next_power_of_2(num_slices),
            BLOCK_R=block_of(r), BLOCK_O=block_o(r), HAS_TABLE=place_of_Z is not None, num_warps=NUM_WARPS,
        )  # fmt: skip


def _tables(
    rows_A: torch.Tensor, places_A: torch.Tensor, place_of_Z: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    table = places_A if place_of_Z is None else place_of_Z
    return rows_A, places_A, table, table.shape[0]


def _num_tiles(num_rows: int) -> int:
    return -(-num_rows // int(BLOCK_A.value))


def _num_runs(num_rows: int) -> int:
    """Runs of equal places that a tile may have."""
    return min(int(BLOCK_A.value), num_rows)


def slices_of(width: int) -> tuple[int, int]:
    """Width of a slice of the input, a multiple of BLOCK_I, and how many there are."""
    even = -(-width // MAX_SLICES)
    slice_width = max(MIN_SLICE, -(-even // BLOCK_I) * BLOCK_I)
    return slice_width, -(-width // slice_width)


def block_of(rank: int) -> int:
    """Columns of a tile: no product is narrower than 16."""
    return int(triton.next_power_of_2(max(rank, 16)))


def block_o(rank: int) -> int:
    """Columns of the output in one program."""
    return max(32, TILE_ELEMENTS // block_of(rank))


def _is_upcast(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies bf16 as the integers that it keeps it in. fp32 products are the same sums."""
    return dtype == torch.bfloat16 and bool(triton.knobs.runtime.interpret)


@triton.jit
def _run(places_ptr, place_of_ptr, num_known, num_rows, num_runs, HAS_TABLE: tl.constexpr):
    """A program's own rows of a tile, those of its run of equal places: indices, which are its own, and the place;
    negative where there is no such run, or one without an adapter."""
    tile, run = tl.program_id(0) // num_runs, tl.program_id(0) % num_runs
    a = tile * BLOCK_A + tl.arange(0, BLOCK_A)
    place = tl.load(places_ptr + a, mask=a < num_rows, other=-1).to(tl.int64)
    before = tl.load(places_ptr + a - 1, mask=(a > tile * BLOCK_A) & (a < num_rows), other=-1).to(tl.int64)
    begins = (place != before) & (a > tile * BLOCK_A)
    if HAS_TABLE:
        place = tl.load(place_of_ptr + place, mask=(place >= 0) & (place < num_known), other=-1).to(tl.int64)
    is_own = (tl.cumsum(begins.to(tl.int32), 0) == run) & (place >= 0)
    return a, is_own, tl.max(tl.where(is_own, place, -1), 0)


@triton.jit
def _shrink_kernel(
    x_ptr, x_stride_row, A_ptr, A_stride_place, shrunk_ptr, rows_ptr, places_ptr, place_of_ptr, num_known,
    num_rows, num_runs,
    IN_WIDTH: tl.constexpr, SHRUNK_WIDTH: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_X: tl.constexpr, HAS_TABLE: tl.constexpr, IS_UPCAST: tl.constexpr,
):  # fmt: skip
    """x A over one slice of the input, for one run."""
    index, is_own, place = _run(places_ptr, place_of_ptr, num_known, num_rows, num_runs, HAS_TABLE)
    if place < 0:
        return
    row = tl.load(rows_ptr + index, mask=is_own, other=0).to(tl.int64)
    column = tl.arange(0, BLOCK_X)
    is_column = column < SHRUNK_WIDTH
    sum_AX = tl.zeros((BLOCK_A, BLOCK_X), tl.float32)
    first = tl.program_id(1) * SLICE
    for start in range(first, tl.minimum(first + SLICE, IN_WIDTH), BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        x_AI = tl.load(
            x_ptr + row[:, None] * x_stride_row + i[None, :],
            mask=is_own[:, None] & (i < IN_WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        A_IX = tl.load(
            A_ptr + place * A_stride_place + i[:, None] * SHRUNK_WIDTH + column[None, :],
            mask=(i < IN_WIDTH)[:, None] & is_column[None, :], other=0.0,
        )  # fmt: skip
        if IS_UPCAST:
            x_AI, A_IX = x_AI.to(tl.float32), A_IX.to(tl.float32)
        sum_AX = tl.dot(x_AI, A_IX, sum_AX, input_precision="ieee")
    at = (tl.program_id(1).to(tl.int64) * num_rows + index) * SHRUNK_WIDTH
    tl.store(shrunk_ptr + at[:, None] + column[None, :], sum_AX, mask=is_own[:, None] & is_column[None, :])


@triton.jit
def _expand_kernel(
    y_ptr, y_stride_row, B_ptr, B_1_ptr, B_2_ptr, shrunk_ptr, rows_ptr, places_ptr, place_of_ptr, num_known,
    num_rows, num_runs, width_0, width_1, width_2, first_0, first_1, first_2, first_shrunk,
    RANK: tl.constexpr, SHRUNK_WIDTH: tl.constexpr, NUM_SLICES: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """y += (sum of the slices) B over BLOCK_O columns of one of the parts, for one run."""
    index, is_own, place = _run(places_ptr, place_of_ptr, num_known, num_rows, num_runs, HAS_TABLE)
    if place < 0:
        return
    block, begin_1 = tl.program_id(1), tl.cdiv(width_0, BLOCK_O)
    begin_2 = begin_1 + tl.cdiv(width_1, BLOCK_O)
    is_1, is_2 = block >= begin_1, block >= begin_2
    part = is_1.to(tl.int32) + is_2.to(tl.int32)
    block -= tl.where(is_2, begin_2, tl.where(is_1, begin_1, 0))
    out_width = tl.where(is_2, width_2, tl.where(is_1, width_1, width_0))
    first_column = tl.where(is_2, first_2, tl.where(is_1, first_1, first_0))
    factor_ptr = tl.where(is_2, B_2_ptr, tl.where(is_1, B_1_ptr, B_ptr))

    j, k = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_R)
    at_JA = (j[:, None] * num_rows + index[None, :]) * SHRUNK_WIDTH + first_shrunk + part * RANK
    is_shrunk = (j < NUM_SLICES)[:, None, None] & is_own[None, :, None] & (k < RANK)[None, None, :]
    shrunk_JAR = tl.load(shrunk_ptr + at_JA[:, :, None] + k[None, None, :], mask=is_shrunk, other=0.0)
    column = block * BLOCK_O + tl.arange(0, BLOCK_O)
    is_column = column < out_width
    B_RO = tl.load(
        factor_ptr + (place * RANK + k[:, None]) * out_width + column[None, :],
        mask=(k < RANK)[:, None] & is_column[None, :], other=0.0,
    )  # fmt: skip
    delta_AO = tl.dot(tl.sum(shrunk_JAR, 0), B_RO.to(tl.float32), input_precision="ieee")
    row = tl.load(rows_ptr + index, mask=is_own, other=0).to(tl.int64)
    y_at = y_ptr + row[:, None] * y_stride_row + first_column + column[None, :]
    is_stored = is_own[:, None] & is_column[None, :]
    y_AO = tl.load(y_at, mask=is_stored, other=0.0).to(tl.float32) + delta_AO
    tl.store(y_at, y_AO.to(y_ptr.dtype.element_ty), mask=is_stored)
