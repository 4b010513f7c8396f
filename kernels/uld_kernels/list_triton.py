"""Lists for late assistants, between the scan and the finish: which tokens late_triton is to score. Launched by
sampler_triton for shapes that have late rows; for others the finish lists by itself.

A list is exact: it holds whatever the row's filters could leave, and is as long as it has to be. Of a fused filter that
is known only once some scores are: a first look takes what could stay if nothing were hushed, further ones go down to
what the best score so far rules out. No rule that is listed so raises a score above the target's."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels.columns_triton import (
    LATE_BY_SCORE,
    LATE_LIST,
    LOG_FUSED_TAU,
    NOT_LATE,
    NUM_TERMS,
    ROW_B,
    combine_listed,
    number_of_best,
    row_of,
)
from uld_kernels.merge_triton import merge
from uld_kernels.select_triton import list_between, list_row, lowered, threshold_of


# What differs between shapes must not compile the kernel anew while somebody waits.
@triton.jit(do_not_specialize=["terms_at", "max_terms", "num_protected"])
def _list_kernel(
    logits_ptr, stride_row, vocab_size, ints_ptr, floats_ptr, masks_ptr, touched_ptr, biases_ptr,
    normalizers_ptr, thresholds_ptr, terms_at, max_terms, protected_ptr, protected_ids_ptr, num_protected,
    bests_ptr, partials_ptr, int_partials_ptr, num_tiles, group_max_ptr, group_list_ptr, num_groups, lucky_ptr,
    num_lucky, listed_ids_ptr, listed_s_ptr, listed_b_ptr, starts_ptr, counts_ptr, limits_ptr,
    TILES: tl.constexpr, GROUPS: tl.constexpr, NOISE_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program row: the whole list of a row without late assistants, and the first look of one with.

    Writes where the tokens that are to be scored begin and end, and down to which target logit a late row is listed.
    """
    index = tl.program_id(0)
    tl.store(starts_ptr + index, 0)
    tl.store(counts_ptr + index, 0)
    tl.store(limits_ptr + index, float("-inf"))
    row = row_of(
        index, logits_ptr, stride_row, vocab_size, ints_ptr, floats_ptr, masks_ptr, touched_ptr, biases_ptr,
        normalizers_ptr, thresholds_ptr, terms_at, max_terms,
    )  # fmt: skip
    ints, floats = row[3], row[4]
    if tl.load(ints + ROW_B) < 0:
        return
    best_b, _, _, best_s, _, _, max_value, mass, count, _, is_bad = merge(
        row, index, bests_ptr, partials_ptr, int_partials_ptr, num_tiles, TILES
    )
    max_b, max_s = number_of_best(best_b), number_of_best(best_s)
    index_64 = index.to(tl.int64)
    ids_ptr, s_ptr = listed_ids_ptr + index_64 * vocab_size, listed_s_ptr + index_64 * vocab_size
    b_ptr = listed_b_ptr + index_64 * vocab_size
    late_list = tl.load(ints + LATE_LIST)
    num_listed = tl.full((), 0, tl.int32)
    if late_list == NOT_LATE:
        num_listed = list_row(
            row, index, max_b, max_s, max_value, mass, count, is_bad, protected_ptr, protected_ids_ptr, num_protected,
            group_max_ptr, group_list_ptr, num_groups, lucky_ptr, num_lucky, ids_ptr, s_ptr, b_ptr,
            GROUPS, NOISE_GROUPS, BLOCK, CHUNK,
        )  # fmt: skip
    else:
        group, group_max_ptr = tl.arange(0, GROUPS), group_max_ptr + index_64 * num_groups
        num_live = tl.where(is_bad, 0, num_groups)
        limit = lowered(max_b + tl.load(floats + LOG_FUSED_TAU))
        if late_list != LATE_BY_SCORE:
            group_max = tl.load(group_max_ptr + group, mask=group < num_live, other=float("-inf"))
            limit = threshold_of(row, group_max, max_b, max_b, max_value)
        num_listed = list_between(
            row, limit, float("inf"), group_max_ptr, num_live, group_list_ptr + index_64 * num_groups, ids_ptr, b_ptr,
            num_listed, BLOCK, CHUNK,
        )  # fmt: skip
        tl.store(limits_ptr + index, limit)
    tl.store(counts_ptr + index, num_listed)


@triton.jit(do_not_specialize=["terms_at", "max_terms", "first_late", "step"])
def _look_further_kernel(
    logits_ptr, stride_row, vocab_size, ints_ptr, floats_ptr, masks_ptr, touched_ptr, biases_ptr,
    normalizers_ptr, thresholds_ptr, terms_at, max_terms, group_max_ptr, group_list_ptr, num_groups,
    listed_ids_ptr, listed_b_ptr, starts_ptr, counts_ptr, limits_ptr, late_ptr, first_late, step,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Program row: lists what a fused filter could leave below the last look, at most `step` further down.

    The best score so far is one that the filter keeps; a token so far below it that the filter drops it even unhushed
    need not be looked at. With an infinite step nothing is left out.
    """
    index = tl.program_id(0)
    row = row_of(
        index, logits_ptr, stride_row, vocab_size, ints_ptr, floats_ptr, masks_ptr, touched_ptr, biases_ptr,
        normalizers_ptr, thresholds_ptr, terms_at, max_terms,
    )  # fmt: skip
    ints, floats = row[3], row[4]
    num_listed = tl.load(counts_ptr + index)
    # What has been scored is not scored again.
    tl.store(starts_ptr + index, num_listed)
    if (tl.load(ints + ROW_B) < 0) | (tl.load(ints + LATE_LIST) != LATE_BY_SCORE):
        return
    index_64 = index.to(tl.int64)
    ids_ptr, b_ptr = listed_ids_ptr + index_64 * vocab_size, listed_b_ptr + index_64 * vocab_size
    late, lane = late_ptr + index_64 * max_terms * vocab_size, tl.arange(0, LIST)
    best, num_bad = tl.full((), float("-inf"), tl.float32), tl.full((), 0, tl.int32)
    for start in range(0, num_listed, LIST):
        inside = start + lane < num_listed
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        b = tl.load(b_ptr + start + lane, mask=inside, other=float("-inf"))
        s = combine_listed(
            row, late, first_late, b, ids, start + lane, inside, tl.load(ints + NUM_TERMS), True
        )
        num_bad += tl.sum((s != s).to(tl.int32))
        best = tl.maximum(best, tl.max(tl.where(s == s, s, float("-inf"))))
    high = tl.load(limits_ptr + index)
    low = tl.maximum(lowered(best + tl.load(floats + LOG_FUSED_TAU)), high - step)
    # A row that has failed already, or lists nothing because its target has, looks no further.
    if (num_bad == 0) & (num_listed > 0) & (low < high):
        num_listed = list_between(
            row, low, high, group_max_ptr + index_64 * num_groups, num_groups, group_list_ptr + index_64 * num_groups,
            ids_ptr, b_ptr, num_listed, BLOCK, CHUNK,
        )  # fmt: skip
        tl.store(limits_ptr + index, low)
        tl.store(counts_ptr + index, num_listed)
