"""Last kernel of the sampler: from a row's candidates to its token. Launched by sampler_triton.

Works on the list alone, several times over, so that filters, truncation and ties are decided exactly and nothing is
sorted: thresholds are found bit by bit. Legend: s scores that log-probabilities are of, z log-weights of the draw."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels.columns_triton import (
    BIAS_ROW,
    FILTER_KEEP,
    FREQUENCY,
    HISTORY_ROW,
    LOG_FILTER_TAU,
    LOG_FUSED_TAU,
    LOG_MIN_P,
    NO_ID,
    NUM_FLOATS,
    NUM_INT_SUMMARIES,
    NUM_INTS,
    NUM_LOGPROBS,
    NUM_SUMMARIES,
    NUM_TERM_FLOATS,
    NUM_TERM_INTS,
    NUM_TERMS,
    POSITION,
    PRESENCE,
    PROTECT,
    REPETITION,
    ROW_B,
    SEED_HIGH,
    SEED_LOW,
    STATUS_NOTHING_KEPT,
    STATUS_NUMERICAL,
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
    TARGET_ID,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    gumbel_noise,
    kth_largest_listed,
    spread,
)
from uld_kernels.truncate_triton import mass_from, top_k_cut, top_p_cut

# More than the noise can span (noise.NOISE_SPAN): a token this far below the best is never drawn.
_NOISE_SPAN = tl.constexpr(31.0)


@triton.jit
def _penalized(s, ids, kept, ints, floats, history_ptr, bias_ptr, anchor, vocab_size):
    """Scores after the three penalties on history and logit_bias; the repetition penalty scales s + anchor."""
    history_row = tl.load(ints + HISTORY_ROW).to(tl.int64)
    history = tl.load(
        history_ptr + history_row * vocab_size + ids, mask=kept & spread(history_row >= 0, ids), other=0
    )
    repetition = tl.load(floats + REPETITION)
    anchored = s + anchor
    repeated = tl.where(anchored > 0.0, tl.div_rn(anchored, repetition), anchored * repetition)
    z = tl.where(repetition != 1.0, tl.where(history != 0, repeated, anchored), s)
    counts = (history // 2).to(tl.float32)
    z = z - tl.load(floats + PRESENCE) * (counts > 0.0).to(tl.float32)
    z = z - tl.load(floats + FREQUENCY) * counts
    bias_row = tl.load(ints + BIAS_ROW).to(tl.int64)
    return z + tl.load(
        bias_ptr + bias_row * vocab_size + ids, mask=kept & spread(bias_row >= 0, ids), other=0.0
    )


@triton.jit
def _filter_scores(
    logits_ptr, stride_row, ints, floats, term_ints, term_floats, protected_ptr, ids_ptr, s_ptr, z_ptr, num_listed,
    max_b, lse_others, BLOCK: tl.constexpr,
):  # fmt: skip
    """Applies the filters and protection exactly, in place: s becomes -inf where filtered. Returns is_bad."""
    lane = tl.arange(0, BLOCK)
    row_b = tl.load(ints + ROW_B).to(tl.int64)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        b = tl.load(logits_ptr + row_b * stride_row + ids, mask=inside, other=0.0).to(tl.float32)
        tl.store(z_ptr + start + lane, b, mask=inside)
    tl.debug_barrier()
    threshold_b = tl.full((), float("-inf"), tl.float32)
    for term in range(tl.load(ints + NUM_TERMS)):
        keep = tl.load(term_ints + term * NUM_TERM_INTS + FILTER_KEEP)
        if keep > 0:
            near_best = max_b + tl.load(term_floats + term * NUM_TERM_FLOATS + LOG_FILTER_TAU)
            kth = kth_largest_listed(z_ptr, num_listed, keep, BLOCK)
            threshold_b = tl.maximum(threshold_b, tl.minimum(near_best, kth))

    is_bad = tl.full((), 0, tl.int32)
    max_s = tl.full((), float("-inf"), tl.float32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        b = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf"))
        s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
        kept_by_b = inside & (b >= threshold_b)
        is_bad |= tl.max((kept_by_b & (s != s)).to(tl.int32))
        s = tl.where(kept_by_b & (s == s), s, float("-inf"))
        max_s = tl.maximum(max_s, tl.max(s))
        tl.store(s_ptr + start + lane, s, mask=inside)
    tl.debug_barrier()

    threshold_s = max_s + tl.load(floats + LOG_FUSED_TAU)
    protect = tl.load(ints + PROTECT) != 0
    # LSE of the kept scores that are not protected, around their own maximum.
    max_others = tl.full((), float("-inf"), tl.float32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        is_protected = tl.load(protected_ptr + ids, mask=inside & spread(protect, ids), other=0) != 0
        max_others = tl.maximum(max_others, tl.max(tl.where(is_protected, float("-inf"), s)))
    sum_others = tl.full((), 0.0, tl.float32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        is_protected = tl.load(protected_ptr + ids, mask=inside & spread(protect, ids), other=0) != 0
        is_other = (s >= threshold_s) & (s > float("-inf")) & (is_protected == 0)
        sum_others += tl.sum(tl.where(is_other, tl.exp(s - max_others), 0.0))
    shift = lse_others - (max_others + tl.log(sum_others))
    shift = tl.where(protect & (sum_others > 0.0), shift, 0.0)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        b = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf"))
        s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        is_protected = tl.load(protected_ptr + ids, mask=inside & spread(protect, ids), other=0) != 0
        kept = (s >= threshold_s) & (s > float("-inf"))
        s = tl.where(is_protected, b, tl.where(kept, s + shift, float("-inf")))
        tl.store(s_ptr + start + lane, s, mask=inside)
    tl.debug_barrier()
    return is_bad


@triton.jit
def _statistics(ids_ptr, s_ptr, b_ptr, num_listed, lse_b, BLOCK: tl.constexpr):
    """(number kept, most likely id, LSE of s, KL(s || b)) of the listed tokens."""
    lane = tl.arange(0, BLOCK)
    max_s = tl.full((), float("-inf"), tl.float32)
    argmax_s = tl.full((), NO_ID, tl.int32)
    count = tl.full((), 0, tl.int32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
        best = tl.max(s)
        best_id = tl.min(tl.where(inside & (s == best), ids, NO_ID))
        argmax_s = tl.where(
            best > max_s, best_id, tl.where(best == max_s, tl.minimum(best_id, argmax_s), argmax_s)
        )
        max_s = tl.maximum(max_s, best)
        count += tl.sum((s > float("-inf")).to(tl.int32))
    sum_s = tl.full((), 0.0, tl.float32)
    kl_sum = tl.full((), 0.0, tl.float32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
        b = tl.load(b_ptr + start + lane, mask=inside, other=0.0)
        kept = s > float("-inf")
        weight = tl.where(kept, tl.exp(s - max_s), 0.0)
        sum_s += tl.sum(weight)
        kl_sum += tl.sum(tl.where(kept, weight * (s - b), 0.0))
    lse_s = max_s + tl.log(tl.maximum(sum_s, 1e-30))
    kl = kl_sum / tl.maximum(sum_s, 1e-30) - lse_s + lse_b
    return count, argmax_s, lse_s, kl


@triton.jit
def _draw(
    ids_ptr,
    z_ptr,
    num_listed,
    num_drawn_from,
    count,
    is_partial,
    mass_z,
    max_z,
    ints,
    floats,
    BLOCK: tl.constexpr,
):
    """Truncates z in place and returns the id with the largest z plus noise; greedy at temperature 0."""
    lane = tl.arange(0, BLOCK)
    temperature = tl.load(floats + TEMPERATURE)
    num_cut = tl.where(temperature > 0.0, num_drawn_from, 0)
    top_k = tl.load(ints + TOP_K)
    is_top_k = (top_k > 0) & (top_k < count) & (num_cut > 0)
    if is_top_k:
        top_k_cut(z_ptr, ids_ptr, num_listed, top_k, BLOCK)
    top_p = tl.load(floats + TOP_P)
    if (top_p < 1.0) & (num_cut > 0):
        mass = mass_from(z_ptr, num_listed, max_z, tl.full((), 0, tl.int64), BLOCK)
        if is_partial & (is_top_k == 0):
            # The scan's mass is around the maximum of s / T, which max_z is where nothing was penalised.
            mass = mass_z.to(tl.float64)
        top_p_cut(z_ptr, ids_ptr, num_listed, max_z, top_p.to(tl.float64) * mass, BLOCK)
    lowest_z = max_z + tl.where(temperature > 0.0, tl.maximum(tl.load(floats + LOG_MIN_P), -_NOISE_SPAN), 0.0)
    seed = (tl.load(ints + SEED_HIGH).to(tl.int64) << 32) | (
        tl.load(ints + SEED_LOW).to(tl.int64) & 0xFFFFFFFF
    )
    position = tl.load(ints + POSITION)
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), NO_ID, tl.int32)
    for start in range(0, num_drawn_from, BLOCK):
        inside = start + lane < num_listed
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        z = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf"))
        is_left = (z >= lowest_z) & (z > float("-inf"))
        if temperature > 0.0:
            z = z + gumbel_noise(ids, seed, position)
        z = tl.where(is_left, z, float("-inf"))
        here = tl.max(z)
        here_id = tl.min(tl.where(is_left & (z == here), ids, NO_ID))
        token = tl.where(here > best, here_id, tl.where(here == best, tl.minimum(here_id, token), token))
        best = tl.maximum(best, here)
    return token


@triton.jit
def _list_best(ids_ptr, s_ptr, num_listed, lse_s, num_logprobs, top_ids, top_logprobs, BLOCK: tl.constexpr):
    """Writes the num_logprobs most likely tokens of a row, ties by lowest id."""
    lane = tl.arange(0, BLOCK)
    # The next best each time: smaller, or equal with a larger id.
    last_s = tl.full((), float("inf"), tl.float32)
    last_id = tl.full((), -1, tl.int32)
    for place in range(num_logprobs):
        next_s = tl.full((), float("-inf"), tl.float32)
        next_id = tl.full((), NO_ID, tl.int32)
        for start in range(0, num_listed, BLOCK):
            inside = start + lane < num_listed
            ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
            s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
            is_next = (s > float("-inf")) & ((s < last_s) | ((s == last_s) & (ids > last_id)))
            here = tl.max(tl.where(is_next, s, float("-inf")))
            here_id = tl.min(tl.where(is_next & (s == here), ids, NO_ID))
            next_id = tl.where(
                here > next_s, here_id, tl.where(here == next_s, tl.minimum(here_id, next_id), next_id)
            )
            next_s = tl.maximum(next_s, here)
        if next_s > float("-inf"):
            tl.store(top_ids + place, next_id.to(tl.int64))
            tl.store(top_logprobs + place, next_s - lse_s)
        last_s, last_id = next_s, next_id


@triton.jit
def _finish_kernel(
    logits_ptr, stride_row, vocab_size, ints_ptr, floats_ptr, term_ints_ptr, term_floats_ptr, protected_ptr,
    history_ptr, bias_ptr, summaries_ptr, int_summaries_ptr, listed_ids_ptr, listed_scores_ptr, listed_z_ptr,
    token_ids_ptr, logprob_ptr, rank_ptr, status_ptr, num_kept_ptr, kl_ptr, argmax_changed_ptr, top_ids_ptr,
    top_logprobs_ptr, top_stride,
    MAX_TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program row: filters, protection, statistics, penalties, truncation, draw, listed log-probabilities."""
    row = tl.program_id(0)
    row_64 = row.to(tl.int64)
    ints, floats = ints_ptr + row * NUM_INTS, floats_ptr + row * NUM_FLOATS
    term_ints = term_ints_ptr + row * MAX_TERMS * NUM_TERM_INTS
    term_floats = term_floats_ptr + row * MAX_TERMS * NUM_TERM_FLOATS
    summary, int_summary = summaries_ptr + row * NUM_SUMMARIES, int_summaries_ptr + row * NUM_INT_SUMMARIES
    ids_ptr, s_ptr = listed_ids_ptr + row_64 * vocab_size, listed_scores_ptr + row_64 * vocab_size
    z_ptr = listed_z_ptr + row_64 * vocab_size
    num_listed = tl.load(int_summary + SUMMARY_NUM_LISTED)
    lane = tl.arange(0, BLOCK)
    is_bad = tl.load(int_summary + SUMMARY_BAD)
    lse_b = tl.load(summary + SUMMARY_LSE_B)
    is_bad |= _filter_scores(
        logits_ptr, stride_row, ints, floats, term_ints, term_floats, protected_ptr, ids_ptr, s_ptr, z_ptr,
        num_listed, tl.load(summary + SUMMARY_MAX_B), tl.load(summary + SUMMARY_LSE_OTHERS), BLOCK,
    )  # fmt: skip

    count, argmax_s, lse_s, kl = _statistics(ids_ptr, s_ptr, z_ptr, num_listed, lse_b, BLOCK)
    num_kept = count
    # A list that is not the whole kept set knows these only from the scan.
    is_partial = tl.load(int_summary + SUMMARY_IS_PARTIAL) != 0
    if is_partial:
        lse_s = tl.load(summary + SUMMARY_LSE_S)
        kl = tl.load(summary + SUMMARY_KL)
        num_kept = tl.load(int_summary + SUMMARY_COUNT)
        argmax_s = tl.load(int_summary + SUMMARY_ARGMAX_S)
    kl = tl.where(tl.load(ints + NUM_TERMS) > 0, tl.maximum(kl, 0.0), 0.0)

    target_id = tl.load(ints + TARGET_ID)
    temperature = tl.load(floats + TEMPERATURE)
    is_drawn = (target_id < 0) & (is_bad == 0)
    num_drawn_from = tl.where(is_drawn, num_listed, 0)
    warmth = tl.where(temperature > 0.0, temperature, 1.0)
    max_z = tl.full((), float("-inf"), tl.float32)
    # z takes the place of b, which _statistics may still be reading.
    tl.debug_barrier()
    for start in range(0, num_drawn_from, BLOCK):
        inside = start + lane < num_listed
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
        kept = s > float("-inf")
        z = _penalized(s, ids, kept, ints, floats, history_ptr, bias_ptr, lse_b - lse_s, vocab_size)
        is_bad |= tl.max((kept & ((z - z) != 0.0)).to(tl.int32))
        z = tl.where(kept, tl.div_rn(z, warmth), float("-inf"))
        max_z = tl.maximum(max_z, tl.max(z))
        tl.store(z_ptr + start + lane, z, mask=inside)
    tl.debug_barrier()

    mass_z = tl.load(summary + SUMMARY_MASS_Z)
    token = _draw(
        ids_ptr, z_ptr, num_listed, num_drawn_from, count, is_partial, mass_z, max_z, ints, floats, BLOCK
    )
    token = tl.where(target_id >= 0, target_id, token)

    status = tl.where(num_kept == 0, STATUS_NOTHING_KEPT, 0)
    status = tl.where(is_bad != 0, STATUS_NUMERICAL, status)
    num_reported = tl.where(status == 0, num_listed, 0)
    token_s = tl.full((), float("-inf"), tl.float32)
    for start in range(0, num_reported, BLOCK):
        inside = start + lane < num_listed
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=-1)
        s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
        token_s = tl.maximum(token_s, tl.max(tl.where(ids == token, s, float("-inf"))))
    num_higher = tl.full((), 0, tl.int32)
    for start in range(0, tl.where(target_id >= 0, num_reported, 0), BLOCK):
        inside = start + lane < num_listed
        s = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
        num_higher += tl.sum((s > token_s).to(tl.int32))
    is_ok = status == 0
    tl.store(token_ids_ptr + row, tl.where(is_ok, token, -1).to(tl.int64))
    tl.store(logprob_ptr + row, tl.where(is_ok, token_s - lse_s, float("-inf")))
    tl.store(rank_ptr + row, tl.where(is_ok, num_higher + 1, 0).to(tl.int64))
    tl.store(status_ptr + row, status)
    tl.store(num_kept_ptr + row, tl.where(is_ok, num_kept, 0).to(tl.int64))
    tl.store(kl_ptr + row, tl.where(is_ok, kl, 0.0))
    changed = is_ok & (argmax_s != tl.load(int_summary + SUMMARY_ARGMAX_B))
    tl.store(argmax_changed_ptr + row, changed)

    num_logprobs = tl.where(is_ok, tl.load(ints + NUM_LOGPROBS), 0)
    _list_best(
        ids_ptr, s_ptr, num_listed, lse_s, num_logprobs, top_ids_ptr + row * top_stride,
        top_logprobs_ptr + row * top_stride, BLOCK,
    )  # fmt: skip
