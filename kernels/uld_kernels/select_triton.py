"""Second kernel of the sampler: finds each row's candidates through the maxima of its groups. Launched by
sampler_triton.

The list is a superset of what filters and truncation leave (an upper set of the value they look at, plus the
protected tokens), so that finish can decide exactly on it alone; where no bound is known it is the vocabulary."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels.columns_triton import (
    FILTER_KEEP,
    FILTERED_BY_SCORE,
    FILTERED_BY_TARGET,
    GROUP,
    LIST_BEST,
    LIST_LOG_RATIO,
    LIST_NUCLEUS,
    LOG_FILTER_TAU,
    LOG_FUSED_TAU,
    NO_ID,
    NUM_FLOATS,
    NUM_INT_PARTIALS,
    NUM_INT_SUMMARIES,
    NUM_INTS,
    NUM_PARTIALS,
    NUM_SUMMARIES,
    NUM_TERM_FLOATS,
    NUM_TERM_INTS,
    NUM_TERMS,
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
    ROW_CLASS,
    SUMMARY_ARGMAX_B,
    SUMMARY_ARGMAX_S,
    SUMMARY_BAD,
    SUMMARY_COUNT,
    SUMMARY_IS_PARTIAL,
    SUMMARY_KL,
    SUMMARY_LSE_B,
    SUMMARY_LSE_OTHERS,
    SUMMARY_LSE_S,
    SUMMARY_MASS_Z,
    SUMMARY_MAX_B,
    SUMMARY_NUM_LISTED,
    TEMPERATURE,
    TOP_P,
    UNFILTERED,
    combine,
    load_target,
    sort_key,
    spread,
)

# Candidates lie this much below a bound that rounding may have moved; finish decides exactly.
_SLACK = tl.constexpr(1e-3)


@triton.jit
def _merged_lse(largest, sums):
    """(maximum, LSE) of a row from the maxima and sums of its tiles, in their order."""
    top = tl.max(largest)
    total = tl.sum(tl.where(largest > float("-inf"), sums * tl.exp(largest - top), 0.0))
    return top, tl.where(top > float("-inf"), top + tl.log(total), float("-inf"))


@triton.jit
def _bound_of_kth(group_max, is_group, num_groups, k):
    """A number that at least k tokens reach and few more: the k-th largest maximum of a group; -inf if too few."""
    keys = tl.where(is_group, sort_key(group_max), -1)
    key = tl.full((), 0, tl.int64)
    for step in range(32):
        tried = key | (tl.full((), 2147483648, tl.int64) >> step)
        key = tl.where(tl.sum((keys >= tried).to(tl.int32)) >= k, tried, key)
    bound = tl.min(tl.where(keys >= key, group_max, float("inf")))
    return tl.where(num_groups >= k, bound, float("-inf"))


@triton.jit
def _append(ids_ptr, scores_ptr, num_listed, ids, s, taken):
    """Writes the taken tokens of a block behind the list; returns its new length."""
    taken_int = taken.to(tl.int32)
    slots = num_listed + tl.cumsum(taken_int, 0) - taken_int
    tl.store(ids_ptr + slots, ids, mask=taken)
    tl.store(scores_ptr + slots, s, mask=taken)
    return num_listed + tl.sum(taken_int)


@triton.jit
def _select_kernel(
    logits_ptr, stride_row, vocab_size, ints_ptr, floats_ptr, term_ints_ptr, term_floats_ptr, allowed_ptr,
    protected_ptr, protected_ids_ptr, num_protected, normalizers_ptr, rank_thresholds_ptr, partials_ptr,
    int_partials_ptr, num_tiles, group_max_ptr, group_list_ptr, num_groups, listed_ids_ptr, listed_scores_ptr,
    summaries_ptr, int_summaries_ptr,
    MAX_TERMS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program row: merge the tiles, bound the candidates, list them with their exact scores."""
    row = tl.program_id(0)
    row_64 = row.to(tl.int64)
    ints, floats = ints_ptr + row * NUM_INTS, floats_ptr + row * NUM_FLOATS
    term_ints = term_ints_ptr + row * MAX_TERMS * NUM_TERM_INTS
    term_floats = term_floats_ptr + row * MAX_TERMS * NUM_TERM_FLOATS
    normalizers, rank_thresholds = (
        normalizers_ptr + row * MAX_TERMS * 2,
        rank_thresholds_ptr + row * MAX_TERMS,
    )
    row_class, num_terms = tl.load(ints + ROW_CLASS), tl.load(ints + NUM_TERMS)
    protect = tl.load(ints + PROTECT) != 0

    tile = tl.arange(0, TILES)
    is_tile = tile < num_tiles
    part = partials_ptr + (row_64 * num_tiles + tile) * NUM_PARTIALS
    part_max_b = tl.load(part + PARTIAL_MAX_B, mask=is_tile, other=float("-inf"))
    max_b, lse_b = _merged_lse(part_max_b, tl.load(part + PARTIAL_SUM_B, mask=is_tile, other=0.0))
    _max_others, lse_others = _merged_lse(
        tl.load(part + PARTIAL_MAX_OTHERS, mask=is_tile, other=float("-inf")),
        tl.load(part + PARTIAL_SUM_OTHERS, mask=is_tile, other=0.0),
    )
    part_max_s = tl.load(part + PARTIAL_MAX_S, mask=is_tile, other=float("-inf"))
    max_s, lse_s = _merged_lse(part_max_s, tl.load(part + PARTIAL_SUM_S, mask=is_tile, other=0.0))
    temperature = tl.load(floats + TEMPERATURE)
    warmth = tl.where(temperature > 0.0, temperature, 1.0)
    tile_share = tl.where(part_max_s > float("-inf"), tl.exp(part_max_s - max_s), 0.0)
    tile_share_z = tl.where(part_max_s > float("-inf"), tl.exp((part_max_s - max_s) / warmth), 0.0)
    kl_sum = tl.sum(tile_share * tl.load(part + PARTIAL_KL, mask=is_tile, other=0.0))
    mass_z = tl.sum(tile_share_z * tl.load(part + PARTIAL_SUM_Z, mask=is_tile, other=0.0))
    int_part = int_partials_ptr + (row_64 * num_tiles + tile) * NUM_INT_PARTIALS
    argmax_b = tl.load(int_part + PARTIAL_ARGMAX_B, mask=is_tile & (part_max_b == max_b), other=NO_ID)
    argmax_s = tl.load(int_part + PARTIAL_ARGMAX_S, mask=is_tile & (part_max_s == max_s), other=NO_ID)
    count = tl.sum(tl.load(int_part + PARTIAL_COUNT, mask=is_tile, other=0))
    is_bad = tl.max(tl.load(int_part + PARTIAL_BAD, mask=is_tile, other=0))

    group = tl.arange(0, GROUPS)
    is_group = group < num_groups
    group_max = tl.load(group_max_ptr + row_64 * num_groups + group, mask=is_group, other=float("-inf"))
    threshold = tl.full((), float("-inf"), tl.float32)
    if row_class == FILTERED_BY_TARGET:
        for term in range(num_terms):
            keep = tl.load(term_ints + term * NUM_TERM_INTS + FILTER_KEEP)
            if keep > 0:
                near_best = max_b + tl.load(term_floats + term * NUM_TERM_FLOATS + LOG_FILTER_TAU)
                bound = _bound_of_kth(group_max, is_group, num_groups, keep)
                threshold = tl.maximum(threshold, tl.minimum(near_best, bound))
    elif row_class == FILTERED_BY_SCORE:
        threshold = max_s + tl.load(floats + LOG_FUSED_TAU)
    else:
        list_best = tl.load(ints + LIST_BEST)
        if list_best > 0:
            near_best = max_s + tl.load(floats + LIST_LOG_RATIO)
            threshold = tl.minimum(near_best, _bound_of_kth(group_max, is_group, num_groups, list_best))
    threshold -= _SLACK + 1e-6 * tl.abs(threshold)

    listed_ids, listed_scores = listed_ids_ptr + row_64 * vocab_size, listed_scores_ptr + row_64 * vocab_size
    group_list = group_list_ptr + row_64 * num_groups
    lane = tl.arange(0, BLOCK)
    num_listed = tl.full((), 0, tl.int32)
    # A second round lists everything: a nucleus that is not inside the best tokens, which only the first can tell.
    num_rounds = tl.where(is_bad != 0, 0, 1)
    for attempt in range(2):
        if attempt < num_rounds:
            num_listed = tl.full((), 0, tl.int32)
            mass_listed = tl.full((), 0.0, tl.float32)
            picked = is_group & (group_max >= threshold) & (group_max > float("-inf"))
            picked_int = picked.to(tl.int32)
            tl.store(group_list + tl.cumsum(picked_int, 0) - picked_int, group, mask=picked)
            num_picked = tl.sum(picked_int)
            tl.debug_barrier()
            for start in range(0, num_picked, BLOCK // GROUP):
                place = start + lane // GROUP
                ids = tl.load(group_list + place, mask=place < num_picked, other=0) * GROUP + lane % GROUP
                in_range = (place < num_picked) & (ids < vocab_size)
                b, _is_bad_here = load_target(
                    logits_ptr, stride_row, allowed_ptr, ints, ids, in_range, vocab_size
                )
                live = b > float("-inf")
                s = combine(
                    b, ids, live, logits_ptr, stride_row, ints, term_ints, term_floats, normalizers, rank_thresholds,
                    num_terms,
                )  # fmt: skip
                value = tl.where(row_class == FILTERED_BY_TARGET, b, s)
                taken = live & (value >= threshold) & (value > float("-inf"))
                taken = taken & (
                    tl.load(protected_ptr + ids, mask=in_range & spread(protect, ids), other=0) == 0
                )
                num_listed = _append(listed_ids, listed_scores, num_listed, ids, s, taken)
                mass_listed += tl.sum(tl.where(taken, tl.exp((s - max_s) / warmth), 0.0))
            tl.debug_barrier()
            wanted = tl.load(floats + TOP_P) * mass_z
            # Sums of the list and of the tiles round apart; near equality everything is listed as well.
            is_short = (mass_listed < wanted * (1.0 + 1e-5)) & (num_listed < count)
            if is_short & (row_class == UNFILTERED) & (tl.load(ints + LIST_NUCLEUS) != 0):
                num_rounds = tl.full((), 2, tl.int32)
                threshold = tl.full((), float("-inf"), tl.float32)
    for start in range(0, tl.where(protect & (is_bad == 0), num_protected, 0), BLOCK):
        inside = start + lane < num_protected
        ids = tl.load(protected_ids_ptr + start + lane, mask=inside, other=0).to(tl.int32)
        b, _is_bad_here = load_target(logits_ptr, stride_row, allowed_ptr, ints, ids, inside, vocab_size)
        live = b > float("-inf")
        s = combine(
            b, ids, live, logits_ptr, stride_row, ints, term_ints, term_floats, normalizers, rank_thresholds,
            num_terms,
        )  # fmt: skip
        num_listed = _append(listed_ids, listed_scores, num_listed, ids, s, live)

    summary = summaries_ptr + row * NUM_SUMMARIES
    tl.store(summary + SUMMARY_MAX_B, max_b)
    tl.store(summary + SUMMARY_LSE_B, lse_b)
    tl.store(summary + SUMMARY_LSE_OTHERS, lse_others)
    tl.store(summary + SUMMARY_LSE_S, lse_s)
    tl.store(summary + SUMMARY_KL, kl_sum / tl.exp(lse_s - max_s) - lse_s + lse_b)
    tl.store(summary + SUMMARY_MASS_Z, mass_z)
    int_summary = int_summaries_ptr + row * NUM_INT_SUMMARIES
    tl.store(int_summary + SUMMARY_NUM_LISTED, num_listed)
    tl.store(int_summary + SUMMARY_BAD, is_bad)
    tl.store(int_summary + SUMMARY_ARGMAX_B, tl.min(argmax_b))
    tl.store(int_summary + SUMMARY_ARGMAX_S, tl.min(argmax_s))
    tl.store(int_summary + SUMMARY_COUNT, count)
    is_partial = (row_class == UNFILTERED) & (num_listed < count)
    tl.store(int_summary + SUMMARY_IS_PARTIAL, is_partial.to(tl.int32))
