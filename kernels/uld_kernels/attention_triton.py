"""Decode attention over a block table on Triton: partial results by chunk of the context, then their sum. Called by
attention on CUDA tensors. Knows no request and no cache beyond the tensors that it is given.

Never waits for the device and fixes every shape before launch, so it can be captured in a CUDA graph. A row's bits
hang on nothing but its query, its keys and values, its length and the window: chunks are cut by length alone.

Legend: N rows of queries, S sequences, Q rows of a sequence, H query heads, K key/value heads, D head width,
B blocks of a context."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from math import e, log2

import torch
import triton
import triton.language as tl

# Rows of one program: queries of a sequence that share a key/value head. More rows than these are further programs
# side by side, which find keys and values in the L2 cache. Fixed: another tile would sum in another order.
BLOCK_X = tl.constexpr(16)
# Bytes of keys, and of values, in one product; more spill registers.
TILE_BYTES = 16384
LARGEST_BLOCK_N = 64
# A context is cut into chunks of at least this many tokens, and of a multiple of it where there would be more chunks
# than MAX_CHUNKS.
MIN_CHUNK = tl.constexpr(128)
MAX_CHUNKS = tl.constexpr(32)
NUM_WARPS = 4
NUM_STAGES = 2


def decode_attention(
    query_NHD: torch.Tensor,
    keys_PKD: torch.Tensor,
    values_PKD: torch.Tensor,
    *,
    rows_SQ: torch.Tensor,
    blocks_SB: torch.Tensor,
    lengths_S: torch.Tensor,
    block_size: int,
    scale: float,
    window: int | None,
    out_NHD: torch.Tensor,
) -> None:
    """attention.decode_attention for arguments that it has checked."""
    (num_sequences, num_queries), (_, H, D) = rows_SQ.shape, query_NHD.shape
    K, num_blocks = keys_PKD.shape[1], blocks_SB.shape[1]
    if num_sequences == 0 or num_queries == 0:
        return
    BLOCK_N = block_n(D, query_NHD.dtype.itemsize)
    num_chunks = chunks_of(num_blocks * block_size, window, BLOCK_N)
    is_direct = num_chunks == 1
    num_rows = num_sequences * num_queries * H
    # One float each, never touched, where no sums are handed over.
    sums = query_NHD.new_empty((1 if is_direct else num_rows * num_chunks * D,), dtype=torch.float32)
    states = query_NHD.new_empty((1 if is_direct else num_rows * num_chunks * 2,), dtype=torch.float32)
    sizes = (num_queries, num_blocks)
    shape = {
        "NUM_HEADS": H,
        "WINDOW": window or 0,
        "BLOCK_N": BLOCK_N,
        "BLOCK_SIZE": block_size,
        "WIDTH": D,
        "BLOCK_D": block_d(D),
    }
    num_tiles = triton.cdiv(num_queries * (H // K), BLOCK_X.value)
    _decode_attention_kernel[(num_tiles * num_chunks, K, num_sequences)](
        query_NHD, query_NHD.stride(0), query_NHD.stride(1),
        keys_PKD, values_PKD, keys_PKD.stride(0), keys_PKD.stride(1),
        out_NHD, out_NHD.stride(0), out_NHD.stride(1),
        sums, states, rows_SQ, blocks_SB, lengths_S, *sizes, num_tiles, num_chunks, scale * log2(e),
        GROUP=H // K, IS_DIRECT=is_direct, IS_UPCAST=is_upcast(query_NHD.dtype), **shape,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    if not is_direct:
        _merge_chunks_kernel[(num_queries * H, num_sequences)](
            out_NHD, out_NHD.stride(0), out_NHD.stride(1), sums, states, rows_SQ, lengths_S, *sizes, num_chunks,
            num_warps=NUM_WARPS, **shape,
        )  # fmt: skip


def block_d(width: int) -> int:
    """Columns of a tile: no product is narrower than 16."""
    return int(triton.next_power_of_2(max(width, 16)))


def block_n(width: int, itemsize: int) -> int:
    """Context tokens of one product, for heads of this width."""
    return min(LARGEST_BLOCK_N, TILE_BYTES // (block_d(width) * itemsize))


def chunks_of(capacity: int, window: int | None, block_n: int) -> int:
    """Chunks to launch for block tables that hold `capacity` tokens: enough for any length up to it."""
    # A window's first tile begins at a multiple of block_n, up to block_n - 1 tokens before the window does.
    span = capacity if window is None else min(capacity, window + block_n)
    return max(1, min(int(MAX_CHUNKS.value), -(-span // int(MIN_CHUNK.value))))


def is_upcast(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies bf16 as the integers that it keeps it in. fp32 products are the same sums."""
    return dtype == torch.bfloat16 and bool(triton.knobs.runtime.interpret)


@triton.jit
def _span(length, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """First token of a row's context that is looked at, and the length of its chunks."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // BLOCK_N * BLOCK_N
    chunk = MIN_CHUNK * tl.maximum(tl.cdiv(length - first, MIN_CHUNK * MAX_CHUNKS), 1)
    return first, chunk


@triton.jit
def _decode_attention_kernel(
    query_ptr, query_stride_row, query_stride_head,
    keys_ptr, values_ptr, pool_stride_slot, pool_stride_head,
    out_ptr, out_stride_row, out_stride_head,
    sums_ptr, states_ptr, rows_ptr, blocks_ptr, lengths_ptr, num_queries, num_blocks,
    num_tiles, num_chunks, scale_log2,
    NUM_HEADS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, IS_DIRECT: tl.constexpr,
    IS_UPCAST: tl.constexpr,
):  # fmt: skip
    """One chunk of one sequence's context for up to BLOCK_X of its rows at one key/value head."""
    tile, chunk_index = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    # int64: offsets into a pool overflow int32 from 2,097,152 slots of 8 heads of 128 on, in either layout.
    kv_head, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    given = tl.load(lengths_ptr + sequence).to(tl.int32)
    length = tl.minimum(given, num_blocks * BLOCK_SIZE)
    first, chunk = _span(length, WINDOW, BLOCK_N)
    begin = first + chunk_index * chunk
    end = tl.minimum(begin + chunk, length)
    if (begin >= end) & (not IS_DIRECT):
        return

    x = tile * BLOCK_X + tl.arange(0, BLOCK_X)
    query_index, head = x // GROUP, kv_head * GROUP + x % GROUP
    is_inside = query_index < num_queries
    row = tl.load(rows_ptr + sequence * num_queries + query_index, mask=is_inside, other=-1).to(tl.int64)
    is_row = row >= 0
    d = tl.arange(0, BLOCK_D)
    is_d = d < WIDTH
    query_XD = tl.load(
        query_ptr + row[:, None] * query_stride_row + head[:, None] * query_stride_head + d[None, :],
        mask=is_row[:, None] & is_d[None, :], other=0.0,
    )  # fmt: skip
    if IS_UPCAST:
        query_XD = query_XD.to(tl.float32)

    maximum = tl.full((BLOCK_X,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_X,), tl.float32)
    sum_XD = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        is_visible = n < end
        if WINDOW > 0:
            is_visible = is_visible & (n >= length - WINDOW)
        block = tl.load(blocks_ptr + sequence * num_blocks + n // BLOCK_SIZE, mask=is_visible, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + n % BLOCK_SIZE
        at_ND = slot[:, None] * pool_stride_slot + kv_head * pool_stride_head + d[None, :]
        # Slots past the end may hold anything, NaN too: they are not loaded, since 0 * NaN would show.
        is_loaded = is_visible[:, None] & is_d[None, :]
        keys_ND = tl.load(keys_ptr + at_ND, mask=is_loaded, other=0.0)
        values_ND = tl.load(values_ptr + at_ND, mask=is_loaded, other=0.0)
        if IS_UPCAST:
            keys_ND = keys_ND.to(tl.float32)
        scores_XN = tl.dot(query_XD, tl.trans(keys_ND), input_precision="ieee") * scale_log2
        scores_XN = tl.where(is_visible[None, :], scores_XN, float("-inf"))
        # Every tile has a visible token, so a maximum of -inf is the scores' own and becomes NaN below, as it should.
        new_maximum = tl.maximum(maximum, tl.max(scores_XN, 1))
        weights_XN = tl.exp2(scores_XN - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights_XN, 1)
        rounded_XN = weights_XN.to(values_ND.dtype)
        if IS_UPCAST:
            rounded_XN, values_ND = rounded_XN.to(tl.float32), values_ND.to(tl.float32)
        sum_XD = tl.dot(rounded_XN, values_ND, sum_XD * decay[:, None], input_precision="ieee")
        maximum = new_maximum
    # A context longer than its block table would be cut short in silence.
    total = tl.where(given > length, float("nan"), total)

    is_stored = is_row[:, None] & is_d[None, :]
    if IS_DIRECT:
        # No context gives 0; NaN stays NaN.
        result_XD = tl.where(total[:, None] == 0, 0.0, sum_XD / total[:, None])
        at_XD = row[:, None] * out_stride_row + head[:, None] * out_stride_head + d[None, :]
        tl.store(out_ptr + at_XD, result_XD.to(out_ptr.dtype.element_ty), mask=is_stored)
    else:
        partial = (sequence * num_queries + query_index) * NUM_HEADS + head
        partial = partial * num_chunks + chunk_index
        tl.store(sums_ptr + partial[:, None] * WIDTH + d[None, :], sum_XD, mask=is_stored)
        tl.store(states_ptr + partial * 2, maximum, mask=is_row)
        tl.store(states_ptr + partial * 2 + 1, total, mask=is_row)


@triton.jit
def _merge_chunks_kernel(
    out_ptr, out_stride_row, out_stride_head,
    sums_ptr, states_ptr, rows_ptr, lengths_ptr, num_queries, num_blocks, num_chunks,
    NUM_HEADS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row and head: the sum of its chunks, always over MAX_CHUNKS places in one order."""
    query_index, head = tl.program_id(0) // NUM_HEADS, tl.program_id(0) % NUM_HEADS
    sequence = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + sequence * num_queries + query_index).to(tl.int64)
    if row < 0:
        return
    given = tl.load(lengths_ptr + sequence).to(tl.int32)
    length = tl.minimum(given, num_blocks * BLOCK_SIZE)
    first, chunk = _span(length, WINDOW, BLOCK_N)
    c = tl.arange(0, MAX_CHUNKS)
    d = tl.arange(0, BLOCK_D)
    is_chunk, is_d = first + c * chunk < length, d < WIDTH
    partial = ((sequence * num_queries + query_index) * NUM_HEADS + head) * num_chunks + c
    maxima = tl.load(states_ptr + partial * 2, mask=is_chunk, other=float("-inf"))
    totals = tl.load(states_ptr + partial * 2 + 1, mask=is_chunk, other=0.0)
    sums_CD = tl.load(
        sums_ptr + partial[:, None] * WIDTH + d[None, :], mask=is_chunk[:, None] & is_d[None, :], other=0.0
    )
    weights = tl.where(is_chunk, tl.exp2(maxima - tl.max(maxima, 0)), 0.0)
    total = tl.sum(weights * totals, 0)
    result_D = tl.where(total == 0, 0.0, tl.sum(weights[:, None] * sums_CD, 0) / total)
    at = row * out_stride_row + head * out_stride_head
    tl.store(out_ptr + at + d, result_D.to(out_ptr.dtype.element_ty), mask=is_d)
