"""How a row finds its candidates through the maxima of its groups. Device functions, called by rank_triton,
list_triton and finish_triton.

A list is a superset of what filters and truncation leave (an upper set of the value they look at, plus the protected
tokens), so that all later decisions are exact on it alone; where no bound is known it is the vocabulary."""

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
    LIST_LUCKY,
    LIST_MODE,
    LIST_NUCLEUS,
    LOG_FILTER_TAU,
    LOG_FUSED_TAU,
    NOISE_GROUP,
    NUM_TERMS,
    PROTECT,
    ROW_CLASS,
    SCAN_PENALIZES,
    TEMPERATURE,
    TERM_WORDS,
    TOP_P,
    combine,
    load_target,
    penalized,
)
from uld_kernels.noise_triton import SMALLEST_NOISE, group_noise, stream_of

# Candidates lie this much below a bound that rounding may have moved; the finish decides exactly.
_SLACK = tl.constexpr(1e-3)
_RELATIVE_SLACK = tl.constexpr(2e-6)


@triton.jit
def lowered(bound):
    """A little below a bound, where rounding could not matter."""
    return bound - (_SLACK + _RELATIVE_SLACK * tl.abs(bound))


@triton.jit
def bound_of_kth(group_max, k):
    """A number that at least k tokens reach and not many more: about the k-th largest maximum of a group.

    -inf if fewer than k groups have a token. Any such number will do, so halving the range stops early.
    """
    largest = tl.max(group_max)
    low = tl.min(tl.where(group_max > float("-inf"), group_max, float("inf")))
    num_groups = tl.sum((group_max > float("-inf")).to(tl.int32))
    is_wide = (num_groups >= k) & (k > 1)
    low = tl.where(k == 1, largest, tl.where(num_groups >= k, low, float("-inf")))
    high, enough = largest, k + k // 8
    while is_wide:
        tried = low + 0.5 * (high - low)
        count = tl.sum((group_max >= tried).to(tl.int32))
        is_between = (tried > low) & (tried < high)
        low, high = tl.where(is_between & (count >= k), tried, low), tl.where(count < k, tried, high)
        is_wide = is_between & ((count < k) | (count > enough))
    return low


@triton.jit
def pick_groups(group_max_ptr, num_groups, threshold, lucky_ptr, is_lucky, list_ptr, CHUNK: tl.constexpr):
    """Writes the numbers of the groups that reach the threshold (their own where is_lucky), ascending; returns how
    many."""
    lane = tl.arange(0, CHUNK)
    num_picked = tl.full((), 0, tl.int32)
    for start in range(0, num_groups, CHUNK):
        group = start + lane
        largest = tl.load(group_max_ptr + group, mask=group < num_groups, other=float("-inf"))
        picked = (group < num_groups) & (largest >= threshold)
        if is_lucky:
            needed = tl.load(lucky_ptr + group // (NOISE_GROUP // GROUP), mask=group < num_groups, other=0.0)
            picked = (group < num_groups) & (largest >= needed)
        picked_int = picked.to(tl.int32)
        tl.store(list_ptr + num_picked + tl.cumsum(picked_int, 0) - picked_int, group, mask=picked)
        num_picked += tl.sum(picked_int)
    tl.debug_barrier()
    return num_picked


@triton.jit
def threshold_of(row, group_max, max_b, max_s, max_value):
    """What a listed token's value reaches at least, a little below where rounding could matter."""
    _, _, _, ints, floats, _, _, _, term_ints, term_floats, _, _ = row
    row_class = tl.load(ints + ROW_CLASS)
    threshold = tl.full((), float("-inf"), tl.float32)
    if row_class == FILTERED_BY_TARGET:
        for term in range(tl.load(ints + NUM_TERMS)):
            keep = tl.load(term_ints + term * TERM_WORDS + FILTER_KEEP)
            if keep > 0:
                near_best = max_b + tl.load(term_floats + term * TERM_WORDS + LOG_FILTER_TAU)
                bound = near_best
                if tl.sum((group_max >= near_best).to(tl.int32)) < keep:
                    bound = tl.minimum(near_best, bound_of_kth(group_max, keep))
                threshold = tl.maximum(threshold, bound)
    elif row_class == FILTERED_BY_SCORE:
        threshold = max_s + tl.load(floats + LOG_FUSED_TAU)
    else:
        list_best = tl.load(ints + LIST_BEST)
        if list_best > 0:
            bound = bound_of_kth(group_max, list_best)
            is_lucky = tl.load(ints + LIST_MODE) == LIST_LUCKY
            near_best = tl.where(is_lucky, float("inf"), max_value + tl.load(floats + LIST_LOG_RATIO))
            threshold = tl.minimum(near_best, bound)
        elif tl.load(ints + LIST_MODE) == LIST_LUCKY:
            threshold = tl.full((), float("inf"), tl.float32)
    return tl.where(threshold < float("inf"), lowered(threshold), threshold)


@triton.jit
def value_of(row, ids, in_range, num_terms):
    """(what candidates are selected by, its target logit, its score, whether it is live) of a block."""
    b = load_target(row, ids, in_range)
    live = b > float("-inf")
    s = combine(row, b, ids, live, num_terms)
    value = s
    if tl.load(row[3] + SCAN_PENALIZES) != 0:
        value = penalized(row, s, ids, live & (s > float("-inf")), 0.0)
    return value, b, s, live


@triton.jit
def lucky_thresholds(row, lucky_ptr, max_value, threshold, NOISE_GROUPS: tl.constexpr):
    """Writes for every 256 tokens which value the noise could still lift to the top; nothing above `threshold`.

    No token has more noise than its group's largest. Of those with the largest noise, and of the best token, one
    reaches a height that rules out nearly all the others.
    """
    vocab_size, ints, floats = row[2], row[3], row[4]
    temperature = tl.load(floats + TEMPERATURE)
    groups = tl.arange(0, NOISE_GROUPS)
    seed, position = stream_of(ints)
    highest, member = group_noise(groups, seed, position)
    highest = highest.to(tl.float32)
    ids = groups * NOISE_GROUP + member
    value, _, _, live = value_of(row, ids, ids < vocab_size, tl.load(ints + NUM_TERMS))
    lowest = max_value + tl.load(floats + LIST_LOG_RATIO)
    may_win = live & (value >= lowest) & (value > float("-inf"))
    lucky = tl.max(tl.where(may_win, value / temperature + highest, float("-inf")))
    reached = tl.maximum(lucky, max_value / temperature + SMALLEST_NOISE)
    needed = tl.maximum((lowered(reached) - highest) * temperature, lowest)
    tl.store(
        lucky_ptr + groups, tl.minimum(lowered(needed), threshold), mask=groups * NOISE_GROUP < vocab_size
    )
    tl.debug_barrier()


@triton.jit
def _append(ids_ptr, s_ptr, b_ptr, num_listed, ids, s, b, taken):
    """Writes the taken tokens of a block behind the list; returns its new length."""
    taken_int = tl.where(taken, 1, 0)
    slots = num_listed + tl.cumsum(taken_int, 0) - taken_int
    tl.store(ids_ptr + slots, ids, mask=taken_int != 0)
    tl.store(s_ptr + slots, s, mask=taken_int != 0)
    tl.store(b_ptr + slots, b, mask=taken_int != 0)
    return num_listed + tl.sum(taken_int)


@triton.jit
def list_candidates(
    row, group_max_ptr, num_groups, threshold, max_value, mass, count, protected_ptr, protected_ids_ptr, num_protected,
    group_list_ptr, lucky_ptr, ids_ptr, s_ptr, b_ptr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the candidates with their scores and target logits, ids ascending, protected ones last; returns how
    many. Of a row filtered by the target the scores are left out."""
    vocab_size, ints, floats = row[2], row[3], row[4]
    row_class, list_mode = tl.load(ints + ROW_CLASS), tl.load(ints + LIST_MODE)
    protect = tl.load(ints + PROTECT) != 0
    by_target = row_class == FILTERED_BY_TARGET
    num_terms = tl.where(by_target, 0, tl.load(ints + NUM_TERMS))
    lane = tl.arange(0, BLOCK)
    num_listed = tl.full((), 0, tl.int32)
    is_short = list_mode >= 0
    # A second round lists everything: a nucleus that is not inside the best tokens, which only the first can tell.
    while is_short:
        num_listed = tl.full((), 0, tl.int32)
        mass_listed = tl.full((), 0.0, tl.float32)
        num_picked = pick_groups(
            group_max_ptr, num_groups, threshold, lucky_ptr, list_mode == LIST_LUCKY, group_list_ptr, CHUNK
        )
        for start in range(0, num_picked, BLOCK // GROUP):
            place = start + lane // GROUP
            ids = tl.load(group_list_ptr + place, mask=place < num_picked, other=0) * GROUP + lane % GROUP
            in_range = (place < num_picked) & (ids < vocab_size)
            value, b, s, live = value_of(row, ids, in_range, num_terms)
            taken = live & (value > float("-inf"))
            if list_mode == LIST_LUCKY:
                taken = taken & (value >= tl.load(lucky_ptr + ids // NOISE_GROUP, mask=in_range, other=0.0))
            else:
                taken = taken & (value >= threshold)
            if protect:
                taken = taken & (tl.load(protected_ptr + ids, mask=in_range, other=0) == 0)
            num_listed = _append(ids_ptr, s_ptr, b_ptr, num_listed, ids, s, b, taken)
            if list_mode == LIST_NUCLEUS:
                weights = tl.exp((value - max_value) / tl.load(floats + TEMPERATURE))
                mass_listed += tl.sum(tl.where(taken, weights, 0.0))
        # Sums of the list and of the tiles round apart; near equality everything is listed as well.
        wanted = tl.load(floats + TOP_P) * mass * (1.0 + 1e-5)
        is_short = (list_mode == LIST_NUCLEUS) & (mass_listed < wanted) & (num_listed < count)
        is_short = is_short & (threshold > float("-inf"))
        threshold = tl.full((), float("-inf"), tl.float32)
        tl.debug_barrier()
    for start in range(0, tl.where(protect, num_protected, 0), BLOCK):
        inside = start + lane < num_protected
        ids = tl.load(protected_ids_ptr + start + lane, mask=inside, other=0).to(tl.int32)
        _, b, s, live = value_of(row, ids, inside, num_terms)
        num_listed = _append(ids_ptr, s_ptr, b_ptr, num_listed, ids, s, b, live)
    tl.debug_barrier()
    return num_listed


@triton.jit
def list_row(
    row, index, max_b, max_s, max_value, mass, count, is_bad, protected_ptr, protected_ids_ptr, num_protected,
    group_max_ptr, group_list_ptr, num_groups, lucky_ptr, num_lucky, ids_ptr, s_ptr, b_ptr,
    GROUPS: tl.constexpr, NOISE_GROUPS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """list_candidates of one row by what its tiles said; `ids_ptr`, `s_ptr` and `b_ptr` are the row's own."""
    index_64 = index.to(tl.int64)
    group, lucky = tl.arange(0, GROUPS), lucky_ptr + index_64 * num_lucky
    group_max_ptr += index_64 * num_groups
    # A row that has failed lists nothing.
    num_listed_groups = tl.where(is_bad, 0, num_groups)
    group_max = tl.load(group_max_ptr + group, mask=group < num_listed_groups, other=float("-inf"))
    threshold = threshold_of(row, group_max, max_b, max_s, max_value)
    if tl.load(row[3] + LIST_MODE) == LIST_LUCKY:
        lucky_thresholds(row, lucky, max_value, threshold, NOISE_GROUPS)
    return list_candidates(
        row, group_max_ptr, num_listed_groups, threshold, max_value, mass, count, protected_ptr, protected_ids_ptr,
        num_protected, group_list_ptr + index_64 * num_groups, lucky, ids_ptr, s_ptr, b_ptr, BLOCK, CHUNK,
    )  # fmt: skip


@triton.jit
def list_between(
    row, low, high, group_max_ptr, num_groups, group_list_ptr, ids_ptr, b_ptr, num_listed,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Appends the tokens whose target logit is at least `low` and less than `high`, protected or not, ids ascending;
    returns the list's new length."""
    vocab_size = row[2]
    lane = tl.arange(0, BLOCK)
    num_picked = pick_groups(group_max_ptr, num_groups, low, group_max_ptr, False, group_list_ptr, CHUNK)
    for start in range(0, num_picked, BLOCK // GROUP):
        place = start + lane // GROUP
        ids = tl.load(group_list_ptr + place, mask=place < num_picked, other=0) * GROUP + lane % GROUP
        b = load_target(row, ids, (place < num_picked) & (ids < vocab_size))
        num_listed = _append_targets(
            ids_ptr, b_ptr, num_listed, ids, b, (b > float("-inf")) & (b >= low) & (b < high)
        )
    return num_listed


@triton.jit
def list_protected_below(
    row, high, protected_ids_ptr, num_protected, ids_ptr, b_ptr, num_listed, BLOCK: tl.constexpr
):
    """Appends the protected tokens whose target logit is less than `high`; returns the list's new length."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, num_protected, BLOCK):
        inside = start + lane < num_protected
        ids = tl.load(protected_ids_ptr + start + lane, mask=inside, other=0).to(tl.int32)
        b = load_target(row, ids, inside)
        num_listed = _append_targets(ids_ptr, b_ptr, num_listed, ids, b, (b > float("-inf")) & (b < high))
    tl.debug_barrier()
    return num_listed


@triton.jit
def _append_targets(ids_ptr, b_ptr, num_listed, ids, b, taken):
    taken_int = tl.where(taken, 1, 0)
    slots = num_listed + tl.cumsum(taken_int, 0) - taken_int
    tl.store(ids_ptr + slots, ids, mask=taken_int != 0)
    tl.store(b_ptr + slots, b, mask=taken_int != 0)
    return num_listed + tl.sum(taken_int)
