"""The threshold of pair_rank: the rank_k-th largest p - q of a whole vocabulary. Launched by sampler_triton, for
batches with such a term only."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels.columns_triton import GROUP, RANK_K, ROW_1, ROW_2, TERM_WORDS, kth_largest_listed
from uld_kernels.select_triton import bound_of_kth, pick_groups


@triton.jit
def _difference(logits_ptr, stride_row, term, ids, in_range):
    """p - q of a block, -inf out of range."""
    row_q, row_p = tl.load(term + ROW_1).to(tl.int64), tl.load(term + ROW_2).to(tl.int64)
    q = tl.load(logits_ptr + row_q * stride_row + ids, mask=in_range, other=0.0).to(tl.float32)
    p = tl.load(logits_ptr + row_p * stride_row + ids, mask=in_range, other=0.0).to(tl.float32)
    return tl.where(in_range, p - q, float("-inf"))


@triton.jit
def _rank_tile_kernel(
    logits_ptr, stride_row, vocab_size, terms_ptr, group_max_ptr, num_groups, is_bad_ptr, BLOCK: tl.constexpr
):
    """Program (row * terms + term, tile): the largest p - q of every 16 tokens, and whether any is not a number."""
    index, tile, num_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    term = terms_ptr + index * TERM_WORDS
    if tl.load(term + RANK_K) == 0:
        return
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    x = _difference(logits_ptr, stride_row, term, ids, ids < vocab_size)
    tl.store(is_bad_ptr + index * num_tiles + tile, tl.max((x != x).to(tl.int32)))
    x = tl.where(x == x, x, float("-inf"))
    groups = tile * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    by_group = tl.max(tl.reshape(x, (BLOCK // GROUP, GROUP)), axis=1)
    tl.store(group_max_ptr + index.to(tl.int64) * num_groups + groups, by_group, mask=groups < num_groups)


@triton.jit
def _rank_kernel(
    logits_ptr, stride_row, vocab_size, terms_ptr, group_max_ptr, group_list_ptr, num_groups, is_bad_ptr, num_tiles,
    listed_ptr, thresholds_ptr,
    TILES: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Program row * terms + term: the rank_k-th largest p - q, NaN if any difference is; +inf for other rules."""
    index = tl.program_id(0)
    term = terms_ptr + index * TERM_WORDS
    rank_k = tl.load(term + RANK_K)
    threshold = tl.full((), float("inf"), tl.float32)
    if rank_k > 0:
        group, tile, lane = tl.arange(0, GROUPS), tl.arange(0, TILES), tl.arange(0, BLOCK)
        first = index.to(tl.int64) * num_groups
        group_max = tl.load(group_max_ptr + first + group, mask=group < num_groups, other=float("-inf"))
        bound = bound_of_kth(group_max, rank_k)
        num_picked = pick_groups(
            group_max_ptr + first,
            num_groups,
            bound,
            group_max_ptr,
            bound != bound,
            group_list_ptr + first,
            CHUNK,
        )
        listed = listed_ptr + index.to(tl.int64) * vocab_size
        num_listed = tl.full((), 0, tl.int32)
        for start in range(0, num_picked, BLOCK // GROUP):
            place = start + lane // GROUP
            ids = (
                tl.load(group_list_ptr + first + place, mask=place < num_picked, other=0) * GROUP
                + lane % GROUP
            )
            in_range = (place < num_picked) & (ids < vocab_size)
            x = _difference(logits_ptr, stride_row, term, ids, in_range)
            taken_int = (in_range & (x >= bound)).to(tl.int32)
            tl.store(listed + num_listed + tl.cumsum(taken_int, 0) - taken_int, x, mask=taken_int != 0)
            num_listed += tl.sum(taken_int)
        tl.debug_barrier()
        threshold = kth_largest_listed(listed, num_listed, rank_k, LIST)
        is_bad = tl.max(tl.load(is_bad_ptr + index * num_tiles + tile, mask=tile < num_tiles, other=0))
        threshold = tl.where(is_bad != 0, float("nan"), threshold)
    tl.store(thresholds_ptr + index, threshold)
