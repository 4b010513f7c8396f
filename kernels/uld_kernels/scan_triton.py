"""First kernels of the sampler: one read of the logits, tile by tile. Launched by sampler_triton.

scan      per (row, tile): maxima and sums for LSE, KL and counts, and the maximum of every 64 tokens.
normalize per (row, term): LSE of assistants and the pair_rank threshold, only for batches that need them."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels.columns_triton import (
    FILTERED_BY_TARGET,
    GROUP,
    KIND,
    NEEDS_NORMALIZER,
    NO_ID,
    NUM_FLOATS,
    NUM_INT_PARTIALS,
    NUM_INTS,
    NUM_PARTIALS,
    NUM_TERM_FLOATS,
    NUM_TERM_INTS,
    NUM_TERMS,
    PAIR_LINEAR,
    PARTIAL_ARGMAX_B,
    PARTIAL_ARGMAX_S,
    PARTIAL_BAD,
    PARTIAL_COUNT,
    PARTIAL_KL,
    PARTIAL_MAX_B,
    PARTIAL_MAX_OTHERS,
    PARTIAL_MAX_S,
    PARTIAL_SUM_B,
    PARTIAL_SUM_OTHERS,
    PARTIAL_SUM_S,
    PARTIAL_SUM_Z,
    PROTECT,
    RANK_K,
    ROW_1,
    ROW_2,
    ROW_CLASS,
    SUBTRACT,
    TEMPERATURE,
    combine,
    kth_largest_listed,
    load_target,
    spread,
)


@triton.jit
def _sum_exp(x, largest):
    """Sum of exp(x - largest), 0 where everything is -inf."""
    return tl.sum(tl.where(x > float("-inf"), tl.exp(x - largest), 0.0))


@triton.jit
def _scan_kernel(
    logits_ptr, stride_row, vocab_size, ints_ptr, floats_ptr, term_ints_ptr, term_floats_ptr, allowed_ptr,
    protected_ptr, normalizers_ptr, rank_thresholds_ptr, partials_ptr, int_partials_ptr, group_max_ptr, num_groups,
    MAX_TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, tile). Combines on the way unless the row is filtered by the target before combining."""
    row, tile, num_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    ints, floats = ints_ptr + row * NUM_INTS, floats_ptr + row * NUM_FLOATS
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    in_range = ids < vocab_size
    b, is_bad = load_target(logits_ptr, stride_row, allowed_ptr, ints, ids, in_range, vocab_size)
    live = b > float("-inf")
    by_target = tl.load(ints + ROW_CLASS) == FILTERED_BY_TARGET
    # A row filtered by the target reads its assistants on the candidates only.
    num_terms = tl.where(by_target, 0, tl.load(ints + NUM_TERMS))
    s = combine(
        b, ids, live, logits_ptr, stride_row, ints,
        term_ints_ptr + row * MAX_TERMS * NUM_TERM_INTS, term_floats_ptr + row * MAX_TERMS * NUM_TERM_FLOATS,
        normalizers_ptr + row * MAX_TERMS * 2, rank_thresholds_ptr + row * MAX_TERMS, num_terms,
    )  # fmt: skip
    is_bad |= live & (s != s)
    s = tl.where(s == s, s, float("-inf"))

    max_b, max_s = tl.max(b), tl.max(s)
    protected = tl.load(
        protected_ptr + ids, mask=in_range & spread(tl.load(ints + PROTECT) != 0, ids), other=0
    )
    others = tl.where(protected != 0, float("-inf"), b)
    max_others = tl.max(others)
    temperature = tl.load(floats + TEMPERATURE)
    kept = s > float("-inf")
    weights = tl.where(kept, tl.exp(s - max_s), 0.0)
    # Greedy rows have no temperature; their mass is never read.
    scaled = tl.where(kept, (s - max_s) / tl.where(temperature > 0.0, temperature, 1.0), float("-inf"))

    out = partials_ptr + (row * num_tiles + tile).to(tl.int64) * NUM_PARTIALS
    tl.store(out + PARTIAL_MAX_B, max_b)
    tl.store(out + PARTIAL_SUM_B, _sum_exp(b, max_b))
    tl.store(out + PARTIAL_MAX_OTHERS, max_others)
    tl.store(out + PARTIAL_SUM_OTHERS, _sum_exp(others, max_others))
    tl.store(out + PARTIAL_MAX_S, max_s)
    tl.store(out + PARTIAL_SUM_S, tl.sum(weights))
    tl.store(out + PARTIAL_KL, tl.sum(tl.where(kept, weights * (s - b), 0.0)))
    tl.store(out + PARTIAL_SUM_Z, tl.sum(tl.where(kept, tl.exp(scaled), 0.0)))
    int_out = int_partials_ptr + (row * num_tiles + tile).to(tl.int64) * NUM_INT_PARTIALS
    tl.store(int_out + PARTIAL_ARGMAX_B, tl.min(tl.where(b == max_b, ids, NO_ID)))
    tl.store(int_out + PARTIAL_ARGMAX_S, tl.min(tl.where(s == max_s, ids, NO_ID)))
    tl.store(int_out + PARTIAL_COUNT, tl.sum(kept.to(tl.int32)))
    tl.store(int_out + PARTIAL_BAD, tl.max(is_bad.to(tl.int32)))
    by_group = tl.max(tl.reshape(tl.where(by_target, b, s), (BLOCK // GROUP, GROUP)), axis=1)
    groups = tile * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(group_max_ptr + row.to(tl.int64) * num_groups + groups, by_group, mask=groups < num_groups)


@triton.jit
def _normalizer_tile_kernel(
    logits_ptr, stride_row, vocab_size, term_ints_ptr, stream_max_ptr, stream_sum_ptr, BLOCK: tl.constexpr
):
    """Program (row * terms * 2 + stream, tile): maximum and sum of exp of one assistant's tile."""
    stream, tile, num_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    term_int = term_ints_ptr + (stream // 2) * NUM_TERM_INTS
    row = tl.load(term_int + tl.where(stream % 2 == 0, ROW_1, ROW_2)).to(tl.int64)
    needed = (tl.load(term_int + NEEDS_NORMALIZER) != 0) & (row >= 0)
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(
        logits_ptr + row * stride_row + ids,
        mask=(ids < vocab_size) & spread(needed, ids),
        other=float("-inf"),
    )
    x = x.to(tl.float32)
    # NaN would vanish in a maximum.
    is_bad = tl.max(((x != x) | (x == float("inf"))).to(tl.int32)) > 0
    largest = tl.max(tl.where(x == x, x, float("-inf")))
    total = tl.where(is_bad, float("nan"), _sum_exp(x, largest))
    tl.store(stream_max_ptr + stream * num_tiles + tile, largest)
    tl.store(stream_sum_ptr + stream * num_tiles + tile, total)


@triton.jit
def _normalizer_kernel(
    term_ints_ptr,
    stream_max_ptr,
    stream_sum_ptr,
    normalizers_ptr,
    num_tiles,
    log_vocab_size,
    TILES: tl.constexpr,
):
    """Program row * terms * 2 + stream: what to take from that stream's logits so that they are log-probabilities.

    For `subtract` log V is added back: its penalty is zero where the assistant is uniform.
    """
    stream = tl.program_id(0)
    term_int = term_ints_ptr + (stream // 2) * NUM_TERM_INTS
    tile = tl.arange(0, TILES)
    largest = tl.load(stream_max_ptr + stream * num_tiles + tile, mask=tile < num_tiles, other=float("-inf"))
    sums = tl.load(stream_sum_ptr + stream * num_tiles + tile, mask=tile < num_tiles, other=0.0)
    top = tl.max(largest)
    total = tl.sum(tl.where(largest > float("-inf"), sums * tl.exp(largest - top), sums))
    normalizer = top + tl.log(total)
    normalizer = tl.where(tl.load(term_int + KIND) == SUBTRACT, normalizer - log_vocab_size, normalizer)
    needed = tl.load(term_int + NEEDS_NORMALIZER) != 0
    is_read = (stream % 2 == 0) | (tl.load(term_int + KIND) == PAIR_LINEAR)
    tl.store(normalizers_ptr + stream, tl.where(needed & is_read, normalizer, 0.0))


@triton.jit
def _rank_kernel(
    logits_ptr,
    stride_row,
    vocab_size,
    term_ints_ptr,
    differences_ptr,
    rank_thresholds_ptr,
    BLOCK: tl.constexpr,
):
    """Program row * terms + term: the rank_k-th largest p - q, NaN if any difference is; +inf for other rules."""
    term = tl.program_id(0)
    term_int = term_ints_ptr + term * NUM_TERM_INTS
    rank_k = tl.load(term_int + RANK_K)
    num_tokens = tl.where(rank_k > 0, vocab_size, 0)
    row_q, row_p = tl.load(term_int + ROW_1).to(tl.int64), tl.load(term_int + ROW_2).to(tl.int64)
    differences = differences_ptr + term.to(tl.int64) * vocab_size
    lane = tl.arange(0, BLOCK)
    is_bad = tl.full((), 0, tl.int32)
    for start in range(0, num_tokens, BLOCK):
        inside = start + lane < num_tokens
        q = tl.load(logits_ptr + row_q * stride_row + start + lane, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(logits_ptr + row_p * stride_row + start + lane, mask=inside, other=0.0).to(tl.float32)
        is_bad |= tl.max((inside & (p - q != p - q)).to(tl.int32))
        tl.store(differences + start + lane, p - q, mask=inside)
    tl.debug_barrier()
    threshold = kth_largest_listed(differences, num_tokens, rank_k, BLOCK)
    threshold = tl.where(is_bad != 0, float("nan"), threshold)
    tl.store(rank_thresholds_ptr + term, tl.where(rank_k > 0, threshold, float("inf")))
