"""Last kernel of the sampler: from a row's tiles to its token. Launched by sampler_triton.

Merges the tiles, lists the candidates and works on the list alone, several times over, so that filters, truncation and
ties are decided exactly. Legend: s scores that log-probabilities are of, z log-weights of the draw."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels.columns_triton import (
    FILTER_KEEP,
    FILTERED_BY_TARGET,
    LEAST_KEY,
    LOG_FILTER_TAU,
    LOG_FUSED_TAU,
    NUM_LOGPROBS,
    NUM_TERMS,
    PROTECT,
    ROW_B,
    ROW_CLASS,
    STATUS_NOTHING_KEPT,
    STATUS_NUMERICAL,
    TARGET_ID,
    TERM_WORDS,
    UNFILTERED,
    best_key,
    combine_listed,
    id_of_best,
    kth_largest_listed,
    number_of_best,
    row_of,
    score_of_one,
)
from uld_kernels.draw_triton import draw, number_at, write_weights
from uld_kernels.merge_triton import merge
from uld_kernels.select_triton import list_protected_below, list_row


@triton.jit
def _target_threshold(row, b_ptr, num_listed, max_b, BLOCK: tl.constexpr):
    """The smallest target logit that the filters on the target leave: of these nested filters the strictest."""
    _, _, _, ints, _, _, _, _, term_ints, term_floats, _, _ = row
    threshold = tl.full((), float("-inf"), tl.float32)
    for term in range(tl.load(ints + NUM_TERMS)):
        keep = tl.load(term_ints + term * TERM_WORDS + FILTER_KEEP)
        if keep > 0:
            near_best = max_b + tl.load(term_floats + term * TERM_WORDS + LOG_FILTER_TAU)
            kth = kth_largest_listed(b_ptr, num_listed, keep, BLOCK)
            threshold = tl.maximum(threshold, tl.minimum(near_best, kth))
    return threshold


@triton.jit
def _filter(
    row, late_ptr, first_late, limit, protected_ptr, ids_ptr, s_ptr, b_ptr, num_listed, max_b, lse_others,
    BLOCK: tl.constexpr, HAS_LATE: tl.constexpr,
):  # fmt: skip
    """Applies filters and protection exactly, in place: s becomes -inf where filtered. Returns (is bad, shift that
    keeps s in range of exp)."""
    ints, floats = row[3], row[4]
    lane = tl.arange(0, BLOCK)
    by_target = tl.load(ints + ROW_CLASS) == FILTERED_BY_TARGET
    protect = tl.load(ints + PROTECT) != 0
    threshold_b = tl.full((), float("-inf"), tl.float32)
    if by_target:
        threshold_b = _target_threshold(row, b_ptr, num_listed, max_b, BLOCK)
        if HAS_LATE:
            threshold_b = tl.maximum(threshold_b, limit)
    num_bad = tl.full((), 0, tl.int32)
    max_s = tl.full((), float("-inf"), tl.float32)
    max_others = tl.full((), float("-inf"), tl.float32)
    max_protected = tl.full((), float("-inf"), tl.float32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        b = tl.load(b_ptr + start + lane, mask=inside, other=float("-inf"))
        s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
        kept = inside & (b >= threshold_b)
        if by_target:
            num_terms = tl.load(ints + NUM_TERMS)
            s = combine_listed(row, late_ptr, first_late, b, ids, start + lane, kept, num_terms, HAS_LATE)
        num_bad += tl.sum((kept & (s != s)).to(tl.int32))
        s = tl.where(kept & (s == s), s, float("-inf"))
        max_s = tl.maximum(max_s, tl.max(s))
        if protect:
            is_protected = tl.load(protected_ptr + ids, mask=inside, other=0) != 0
            max_others = tl.maximum(max_others, tl.max(tl.where(is_protected, float("-inf"), s)))
            max_protected = tl.maximum(max_protected, tl.max(tl.where(is_protected, b, float("-inf"))))
        tl.store(s_ptr + start + lane, s, mask=inside)
    tl.debug_barrier()

    threshold_s = max_s + tl.load(floats + LOG_FUSED_TAU)
    shift = tl.full((), 0.0, tl.float32)
    if protect:
        # LSE of the kept scores that are not protected, around their own maximum.
        sum_others = tl.full((), 0.0, tl.float32)
        for start in range(0, num_listed, BLOCK):
            inside = start + lane < num_listed
            s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
            ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
            is_protected = tl.load(protected_ptr + ids, mask=inside, other=0) != 0
            is_other = (s >= threshold_s) & (s > float("-inf")) & (is_protected == 0)
            sum_others += tl.sum(tl.where(is_other, tl.exp(s - max_others), 0.0))
        if sum_others > 0.0:
            shift = lse_others - (max_others + tl.log(sum_others))
        top_other = tl.where(sum_others > 0.0, max_others + shift, float("-inf"))
        max_s = tl.maximum(top_other, max_protected)
    return num_bad, threshold_s, shift, max_s


@triton.jit
def _statistics(
    row,
    protected_ptr,
    ids_ptr,
    s_ptr,
    b_ptr,
    num_listed,
    threshold_s,
    shift,
    max_s,
    lse_b,
    BLOCK: tl.constexpr,
):
    """Writes the final scores. Returns (number kept, most likely id, LSE of s, KL(s || b)) of the listed tokens."""
    ints = row[3]
    protect = tl.load(ints + PROTECT) != 0
    lane = tl.arange(0, BLOCK)
    best = tl.full((), LEAST_KEY, tl.int64)
    count = tl.full((), 0, tl.int32)
    sum_s = tl.full((), 0.0, tl.float32)
    kl_sum = tl.full((), 0.0, tl.float32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        b = tl.load(b_ptr + start + lane, mask=inside, other=float("-inf"))
        s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
        s = tl.where((s >= threshold_s) & (s > float("-inf")), s + shift, float("-inf"))
        if protect:
            s = tl.where(tl.load(protected_ptr + ids, mask=inside, other=0) != 0, b, s)
        tl.store(s_ptr + start + lane, s, mask=inside)
        kept = s > float("-inf")
        weight = tl.where(kept, tl.exp(s - max_s), 0.0)
        best = tl.maximum(best, tl.max(tl.where(kept, best_key(s, ids), LEAST_KEY)))
        count += tl.sum(kept.to(tl.int32))
        sum_s += tl.sum(weight)
        kl_sum += tl.sum(tl.where(kept, weight * (s - b), 0.0))
    tl.debug_barrier()
    sum_s = tl.maximum(sum_s, 1e-30)
    lse_s = max_s + tl.log(sum_s)
    return count, id_of_best(best), lse_s, kl_sum / sum_s - lse_s + lse_b


@triton.jit
def _num_higher(s_ptr, num_listed, lowest, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    count = tl.full((), 0, tl.int32)
    for start in range(0, num_listed, BLOCK):
        s = tl.load(s_ptr + start + lane, mask=start + lane < num_listed, other=float("-inf"))
        count += tl.sum((s > lowest).to(tl.int32))
    return count


@triton.jit
def _list_best(
    ids_ptr, s_ptr, num_listed, lse_s, num_logprobs, top_ids, top_logprobs, width, BLOCK: tl.constexpr
):
    """Writes the num_logprobs most likely tokens of a row, ties by lowest id, and nothing (-1, -inf) behind them."""
    lane = tl.arange(0, BLOCK)
    last = tl.full((), 2**63 - 1, tl.int64)
    for place in range(width):
        best = tl.full((), LEAST_KEY, tl.int64)
        for start in range(0, tl.where(place < num_logprobs, num_listed, 0), BLOCK):
            inside = start + lane < num_listed
            ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
            s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
            key = best_key(s, ids)
            is_next = (s > float("-inf")) & (key < last)
            best = tl.maximum(best, tl.max(tl.where(is_next, key, LEAST_KEY)))
        is_found = best > LEAST_KEY
        tl.store(top_ids + place, tl.where(is_found, id_of_best(best), -1).to(tl.int64))
        tl.store(top_logprobs + place, tl.where(is_found, number_of_best(best) - lse_s, float("-inf")))
        last = best


# What differs between shapes must not compile the kernel anew while somebody waits.
@triton.jit(do_not_specialize=["terms_at", "max_terms", "num_protected", "top_width", "first_late"])
def _finish_kernel(
    logits_ptr, stride_row, vocab_size, ints_ptr, floats_ptr, masks_ptr, touched_ptr, biases_ptr,
    normalizers_ptr, thresholds_ptr, terms_at, max_terms, protected_ptr, protected_ids_ptr, num_protected,
    bests_ptr, partials_ptr, int_partials_ptr, num_tiles, group_max_ptr, group_list_ptr, num_groups, lucky_ptr,
    num_lucky, listed_ids_ptr, listed_s_ptr, listed_b_ptr, counts_ptr, limits_ptr, late_ptr, first_late,
    token_ids_ptr, logprob_ptr, rank_ptr, status_ptr, num_kept_ptr, kl_ptr, argmax_changed_ptr, top_ids_ptr,
    top_logprobs_ptr, top_width,
    TILES: tl.constexpr, GROUPS: tl.constexpr, NOISE_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, LIST: tl.constexpr, IS_LISTED: tl.constexpr,
):  # fmt: skip
    """Program row: merge, list (unless list_triton has), filter, measure, draw, report."""
    index = tl.program_id(0)
    row = row_of(
        index, logits_ptr, stride_row, vocab_size, ints_ptr, floats_ptr, masks_ptr, touched_ptr, biases_ptr,
        normalizers_ptr, thresholds_ptr, terms_at, max_terms,
    )  # fmt: skip
    ints = row[3]
    if tl.load(ints + ROW_B) < 0:
        return
    best_b, lse_b, lse_others, best_s, lse_s, kl, max_value, mass, count, num_higher, is_bad = merge(
        row, index, bests_ptr, partials_ptr, int_partials_ptr, num_tiles, TILES
    )
    max_b, max_s = number_of_best(best_b), number_of_best(best_s)
    index_64 = index.to(tl.int64)
    ids_ptr, s_ptr = listed_ids_ptr + index_64 * vocab_size, listed_s_ptr + index_64 * vocab_size
    b_ptr, late = listed_b_ptr + index_64 * vocab_size, late_ptr + index_64 * max_terms * vocab_size
    limit = tl.full((), float("-inf"), tl.float32)
    if IS_LISTED:
        # Of a late row the list ends where its assistants were scored no further; others have no limit.
        num_listed, limit = tl.load(counts_ptr + index), tl.load(limits_ptr + index)
        num_below = tl.where((tl.load(ints + PROTECT) != 0) & (limit > float("-inf")), num_protected, 0)
        num_listed = list_protected_below(
            row, limit, protected_ids_ptr, num_below, ids_ptr, b_ptr, num_listed, LIST
        )
    else:
        num_listed = list_row(
            row, index, max_b, max_s, max_value, mass, count, is_bad, protected_ptr, protected_ids_ptr, num_protected,
            group_max_ptr, group_list_ptr, num_groups, lucky_ptr, num_lucky, ids_ptr, s_ptr, b_ptr,
            GROUPS, NOISE_GROUPS, BLOCK, CHUNK,
        )  # fmt: skip
    num_bad = is_bad.to(tl.int32)
    num_terms, target_id = tl.load(ints + NUM_TERMS), tl.load(ints + TARGET_ID)
    argmax_s = id_of_best(best_s)
    # The scan has measured all of an unfiltered row.
    is_measured = (tl.load(ints + ROW_CLASS) == UNFILTERED) & (tl.load(ints + PROTECT) == 0)
    if is_measured == 0:
        num_bad_kept, threshold_s, shift, max_s = _filter(
            row, late, first_late, limit, protected_ptr, ids_ptr, s_ptr, b_ptr, num_listed, max_b, lse_others, LIST,
            IS_LISTED,
        )  # fmt: skip
        num_bad += num_bad_kept
        count, argmax_s, lse_s, kl = _statistics(
            row, protected_ptr, ids_ptr, s_ptr, b_ptr, num_listed, threshold_s, shift, max_s, lse_b, LIST
        )

    token, token_s = target_id, tl.full((), float("-inf"), tl.float32)
    if target_id >= 0:
        if is_measured:
            token_s = score_of_one(row, target_id, num_terms, 16)
        else:
            token_s = number_at(ids_ptr, s_ptr, num_listed, target_id, LIST)
            num_higher = _num_higher(s_ptr, num_listed, token_s, LIST)
    elif num_bad == 0:
        # z takes the place of b.
        max_z, num_bad_z = write_weights(row, ids_ptr, s_ptr, b_ptr, num_listed, lse_b - lse_s, LIST)
        num_bad += num_bad_z
        is_partial = is_measured & (num_listed < count)
        token = draw(row, ids_ptr, b_ptr, num_listed, max_z, count, mass, is_partial, LIST)
        token_s = number_at(ids_ptr, s_ptr, num_listed, token, LIST)

    status = tl.where(num_bad != 0, STATUS_NUMERICAL, tl.where(count == 0, STATUS_NOTHING_KEPT, 0))
    is_ok = status == 0
    tl.store(token_ids_ptr + index, tl.where(is_ok, token, -1).to(tl.int64))
    tl.store(logprob_ptr + index, tl.where(is_ok, token_s - lse_s, float("-inf")))
    tl.store(rank_ptr + index, tl.where(is_ok, num_higher + 1, 0).to(tl.int64))
    tl.store(status_ptr + index, status)
    tl.store(num_kept_ptr + index, tl.where(is_ok, count, 0).to(tl.int64))
    tl.store(kl_ptr + index, tl.where(is_ok & (num_terms > 0), tl.maximum(kl, 0.0), 0.0))
    tl.store(argmax_changed_ptr + index, is_ok & (argmax_s != id_of_best(best_b)))
    _list_best(
        ids_ptr, s_ptr, num_listed, lse_s, tl.where(is_ok, tl.load(ints + NUM_LOGPROBS), 0),
        top_ids_ptr + index * top_width, top_logprobs_ptr + index * top_width, top_width, LIST,
    )  # fmt: skip
