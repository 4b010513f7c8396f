"""Attention of prompts over a block table on Triton: every row sees its context up to its own position. Called by
attention on CUDA tensors. Knows no request and no cache beyond the tensors that it is given.

Never waits for the device. No context is gathered and no mask is made. A row's bits hang on nothing but its query, its
keys and values, its position and the window: tiles of the context begin at multiples of their size, and one that a
row does not see adds exactly 0 to it.

Legend: N rows of queries, S sequences, Q rows of a sequence, H query heads, K key/value heads, D head width,
P slots of a pool, B blocks of a context, X rows of a tile (query rows times the heads over one key/value head)."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from math import e, log2

import torch
import triton
import triton.language as tl

from uld_kernels.attention_triton import block_d, is_upcast


@dataclass(frozen=True, slots=True)
class Tile:
    """Query rows and context tokens of one product. Fixed for a width and a dtype: others would sum in other
    orders."""

    block_x: int
    block_n: int
    num_warps: int
    num_stages: int


def tile_of(width: int, itemsize: int) -> Tile:
    """The largest that spill (nearly) nothing: compile_check.py."""
    wide = block_d(width)
    if itemsize == 4:  # no tensor cores: small tiles, and right
        return Tile(32, 32, 8, 2) if wide <= 64 else Tile(16, 16, 4, 2)
    return Tile(128, 64, 8, 3) if wide <= 128 else Tile(64, 32, 8, 2)


def prefill_attention(
    query_NHD: torch.Tensor,
    keys_PKD: torch.Tensor,
    values_PKD: torch.Tensor,
    *,
    rows_SQ: torch.Tensor,
    positions_SQ: torch.Tensor,
    blocks_SB: torch.Tensor,
    block_size: int,
    scale: float,
    window: int | None,
    out_NHD: torch.Tensor,
) -> None:
    """attention.prefill_attention for arguments that it has checked."""
    (num_sequences, num_queries), (_, H, D) = rows_SQ.shape, query_NHD.shape
    K, num_blocks = keys_PKD.shape[1], blocks_SB.shape[1]
    if num_sequences == 0 or num_queries == 0:
        return
    tile = tile_of(D, query_NHD.dtype.itemsize)
    num_tiles = triton.cdiv(num_queries * (H // K), tile.block_x)
    _prefill_attention_kernel[(num_tiles, K, num_sequences)](
        query_NHD, query_NHD.stride(0), query_NHD.stride(1),
        keys_PKD, values_PKD, keys_PKD.stride(0), keys_PKD.stride(1),
        out_NHD, out_NHD.stride(0), out_NHD.stride(1),
        rows_SQ, positions_SQ, blocks_SB, num_queries, num_blocks, scale * log2(e),
        GROUP=H // K, WINDOW=window or 0, BLOCK_X=tile.block_x, BLOCK_N=tile.block_n, BLOCK_SIZE=block_size,
        WIDTH=D, BLOCK_D=block_d(D), IS_UPCAST=is_upcast(query_NHD.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@triton.jit
def _prefill_attention_kernel(
    query_ptr, query_stride_row, query_stride_head,
    keys_ptr, values_ptr, pool_stride_slot, pool_stride_head,
    out_ptr, out_stride_row, out_stride_head,
    rows_ptr, positions_ptr, blocks_ptr, num_queries, num_blocks, scale_log2,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, IS_UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_X rows of one sequence at one key/value head, over all of the context that any of them sees."""
    # Rows at the end of a prompt have the longest contexts: they begin first, so that none is left alone at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    # int64: offsets into a pool overflow int32 from 2,097,152 slots of 8 heads of 128 on, in either layout.
    kv_head, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    x = tile * BLOCK_X + tl.arange(0, BLOCK_X)
    query_index, head = x // GROUP, kv_head * GROUP + x % GROUP
    at = sequence * num_queries + query_index
    row = tl.load(rows_ptr + at, mask=query_index < num_queries, other=-1).to(tl.int64)
    is_row = row >= 0
    position = tl.load(positions_ptr + at, mask=is_row, other=-1).to(tl.int32)
    last = tl.max(position, 0)
    if tl.max(row, 0) < 0:
        return

    d = tl.arange(0, BLOCK_D)
    is_d = d < WIDTH
    query_XD = tl.load(
        query_ptr + row[:, None] * query_stride_row + head[:, None] * query_stride_head + d[None, :],
        mask=is_row[:, None] & is_d[None, :], other=0.0,
    )  # fmt: skip
    if IS_UPCAST:
        query_XD = query_XD.to(tl.float32)
    capacity = num_blocks * BLOCK_SIZE
    end = tl.minimum(last + 1, capacity)
    lowest = tl.min(tl.where(position >= 0, position, last), 0)
    # Tokens that all rows see need no mask; with a window hardly any are such.
    first, masked = 0, tl.minimum(lowest + 1, end) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        first = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        masked = first
    maximum = tl.full((BLOCK_X,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_X,), tl.float32)
    sum_XD = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    table = blocks_ptr + sequence * num_blocks
    keys, values = keys_ptr + kv_head * pool_stride_head, values_ptr + kv_head * pool_stride_head
    for start in range(first, masked, BLOCK_N):
        maximum, total, sum_XD = _see(
            query_XD, keys, values, pool_stride_slot, table, start, end, position, scale_log2, maximum, total, sum_XD,
            False, WINDOW, BLOCK_N, BLOCK_SIZE, WIDTH, BLOCK_D, IS_UPCAST,
        )  # fmt: skip
    for start in range(masked, end, BLOCK_N):
        maximum, total, sum_XD = _see(
            query_XD, keys, values, pool_stride_slot, table, start, end, position, scale_log2, maximum, total, sum_XD,
            True, WINDOW, BLOCK_N, BLOCK_SIZE, WIDTH, BLOCK_D, IS_UPCAST,
        )  # fmt: skip
    # A row without context is 0; one whose scores are all -inf is 0 / 0.
    out_XD = tl.where((position < 0)[:, None], 0.0, sum_XD / total[:, None])
    out_XD = tl.where((position >= capacity)[:, None], float("nan"), out_XD)
    tl.store(
        out_ptr + row[:, None] * out_stride_row + head[:, None] * out_stride_head + d[None, :],
        out_XD.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_d[None, :],
    )  # fmt: skip


@triton.jit
def _see(
    query_XD, keys_ptr, values_ptr, pool_stride_slot, table_ptr, start, end, position, scale_log2,
    maximum, total, sum_XD,
    IS_MASKED: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, IS_UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_N tokens from `start` on into the rows' running softmax (arXiv 1805.02867, Alg. 3)."""
    n, d = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    # Slots past the end may hold anything, NaN too: they are not loaded, since 0 * NaN would show.
    if IS_MASKED:
        block = tl.load(table_ptr + n // BLOCK_SIZE, mask=n < end, other=0)
        is_loaded = (n < end)[:, None] & (d < WIDTH)[None, :]
    else:
        block = tl.load(table_ptr + n // BLOCK_SIZE)
        is_loaded = (d < WIDTH)[None, :]
    slot = block.to(tl.int64) * BLOCK_SIZE + n % BLOCK_SIZE
    at_ND = slot[:, None] * pool_stride_slot + d[None, :]
    if IS_MASKED or WIDTH < BLOCK_D:
        keys_ND = tl.load(keys_ptr + at_ND, mask=is_loaded, other=0.0)
        values_ND = tl.load(values_ptr + at_ND, mask=is_loaded, other=0.0)
    else:
        keys_ND, values_ND = tl.load(keys_ptr + at_ND), tl.load(values_ptr + at_ND)
    if IS_UPCAST:
        keys_ND = keys_ND.to(tl.float32)
    scores_XN = tl.dot(query_XD, tl.trans(keys_ND), input_precision="ieee") * scale_log2
    if IS_MASKED:
        is_visible_XN = n[None, :] <= position[:, None]
        if WINDOW > 0:
            is_visible_XN = is_visible_XN & (n[None, :] > position[:, None] - WINDOW)
        scores_XN = tl.where(is_visible_XN, scores_XN, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores_XN, 1))
    # A row that has seen nothing yet: -inf less -inf would be NaN.
    origin = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights_XN = tl.exp2(scores_XN - origin[:, None])
    decay = tl.exp2(maximum - origin)
    rounded_XN = weights_XN.to(values_ND.dtype)
    if IS_UPCAST:
        rounded_XN, values_ND = rounded_XN.to(tl.float32), values_ND.to(tl.float32)
    sum_XD = tl.dot(rounded_XN, values_ND, sum_XD * decay[:, None], input_precision="ieee")
    return new_maximum, total * decay + tl.sum(weights_XN, 1), sum_XD
