"""What all sampler kernels share: columns of the records, and device functions for one block of one row.

Called by scan_triton, rank_triton, select_triton, list_triton and finish_triton. Formulas are those of reference.py.

A row is handed on as one tuple, see `row_of`: all rules and parameters mix in one launch."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels import late, pack, rules, workspace

ROW_WORDS = tl.constexpr(pack.ROW_WORDS)
TERM_WORDS = tl.constexpr(pack.TERM_WORDS)
ENTRY_BITS = tl.constexpr(pack.ENTRY_BITS)
ENTRY_MASK = tl.constexpr((1 << pack.ENTRY_BITS) - 1)


def _int(name: str) -> tl.constexpr:
    return tl.constexpr(pack.INT_COLUMNS.index(name))


def _float(name: str) -> tl.constexpr:
    return tl.constexpr(len(pack.INT_COLUMNS) + pack.FLOAT_COLUMNS.index(name))


def _term(name: str) -> tl.constexpr:
    return tl.constexpr((*pack.TERM_INT_COLUMNS, *pack.TERM_FLOAT_COLUMNS).index(name))


ROW_B = _int("row_b")
NUM_TERMS = _int("num_terms")
ADD_PENALTIES = _int("add_penalties")
ROW_CLASS = _int("row_class")
PROTECT = _int("protect")
TOUCH_ROW = _int("touch_row")
FIRST_ENTRY = _int("first_entry")
NUM_ENTRIES = _int("num_entries")
MASK_ROW = _int("mask_row")
HAS_PENALTIES = _int("has_penalties")
SCAN_PENALIZES = _int("scan_penalizes")
TOP_K = _int("top_k")
NUM_LOGPROBS = _int("num_logprobs")
SEED_LOW = _int("seed_low")
SEED_HIGH = _int("seed_high")
POSITION = _int("position")
LIST_MODE = _int("list_mode")
LIST_BEST = _int("list_best")
TARGET_ID = _int("target_id")
LATE_LIST = _int("late_list")

TEMPERATURE = _float("temperature")
TOP_P = _float("top_p")
LOG_MIN_P = _float("log_min_p")
REPETITION = _float("repetition_penalty")
PRESENCE = _float("presence_penalty")
FREQUENCY = _float("frequency_penalty")
LOG_FUSED_TAU = _float("log_fused_tau")
LIST_LOG_RATIO = _float("list_log_ratio")

KIND = _term("kind")
ROW_1 = _term("row_1")
ROW_2 = _term("row_2")
NEEDS_NORMALIZER = _term("needs_normalizer")
RANK_K = _term("rank_k")
FILTER_KEEP = _term("filter_keep")
STRENGTH = _term("strength")
LOG_FILTER_TAU = _term("log_filter_tau")
DEAD_ZONE = _term("dead_zone")

SUBTRACT = tl.constexpr(rules.SUBTRACT)
PAIR_LINEAR = tl.constexpr(rules.PAIR_LINEAR)
STATUS_NUMERICAL = tl.constexpr(rules.NUMERICAL)
STATUS_NOTHING_KEPT = tl.constexpr(rules.NOTHING_KEPT)
FILTERED_BY_TARGET = tl.constexpr(pack.FILTERED_BY_TARGET)
FILTERED_BY_SCORE = tl.constexpr(pack.FILTERED_BY_SCORE)
UNFILTERED = tl.constexpr(pack.UNFILTERED)
LIST_ALL = tl.constexpr(pack.LIST_ALL)
LIST_NUCLEUS = tl.constexpr(pack.LIST_NUCLEUS)
LIST_LUCKY = tl.constexpr(pack.LIST_LUCKY)
NOT_LATE = tl.constexpr(late.NOT_LATE)
LATE_BY_SCORE = tl.constexpr(late.LATE_BY_SCORE)
IN_PROMPT = tl.constexpr(pack.IN_PROMPT)
PUT_OUT = tl.constexpr(pack.PUT_OUT)
BANNED = tl.constexpr(pack.BANNED)
BIASED = tl.constexpr(pack.BIASED)

# A touched token's word: these bits, and how often it was put out above them.
PROMPT_BIT = tl.constexpr(1)
BAN_BIT = tl.constexpr(2)
ONE_OUTPUT = tl.constexpr(4)

GROUP = tl.constexpr(workspace.GROUP_SIZE)
"""Tokens whose maximum stands for them when candidates are sought. Smaller groups list fewer tokens in vain; each
costs 4 bytes: V / 4 bytes a row."""
NOISE_GROUP = tl.constexpr(workspace.NOISE_GROUP_SIZE)
"""noise.GROUP_SIZE."""

NO_ID = tl.constexpr(2**31 - 1)
"""Larger than any token id, so that a minimum over ids ignores it."""
LEAST_KEY = tl.constexpr(-(2**63))
"""Less than any best_key."""


@triton.jit
def spread(condition, ids):
    """A condition on the row as a mask on the block; the interpreter does not mix scalars into masks."""
    return ids < tl.where(condition, NO_ID, 0)


@triton.jit
def row_of(
    index, logits_ptr, stride_row, vocab_size, ints_ptr, floats_ptr, masks_ptr, touched_ptr, biases_ptr,
    normalizers_ptr, thresholds_ptr, terms_at, max_terms,
):  # fmt: skip
    """All that is read of row `index`: logits, their stride, V, its record as ints and as floats, its mask, touched
    words and biases over the vocabulary, its terms as ints and as floats, their normalizers and rank thresholds."""
    ints, floats = ints_ptr + index * ROW_WORDS, floats_ptr + index * ROW_WORDS
    first_term = terms_at + index * max_terms * TERM_WORDS
    mask_row, touch_row = tl.load(ints + MASK_ROW).to(tl.int64), tl.load(ints + TOUCH_ROW).to(tl.int64)
    return (
        logits_ptr,
        stride_row,
        vocab_size,
        ints,
        floats,
        masks_ptr + mask_row * vocab_size,
        touched_ptr + touch_row * vocab_size,
        biases_ptr + touch_row * vocab_size,
        ints_ptr + first_term,
        floats_ptr + first_term,
        normalizers_ptr + index * max_terms * 2,
        thresholds_ptr + index * max_terms,
    )


@triton.jit
def load_target(row, ids, in_range):
    """Target logits of a block in fp32: -inf where banned or out of range, NaN where they are NaN or +inf, banned or
    not."""
    logits_ptr, stride_row, _, ints, _, mask, touched_ptr, _, _, _, _, _ = row
    row_b = tl.load(ints + ROW_B).to(tl.int64)
    raw = tl.load(logits_ptr + row_b * stride_row + ids, mask=in_range, other=float("-inf")).to(tl.float32)
    b = tl.where(raw < float("inf"), raw, float("nan"))
    if tl.load(ints + MASK_ROW) >= 0:
        is_allowed = tl.load(mask + ids, mask=in_range, other=0) != 0
        b = tl.where(is_allowed | (b != b), b, float("-inf"))
    if tl.load(ints + TOUCH_ROW) >= 0:
        touched = tl.load(touched_ptr + ids, mask=in_range, other=0)
        b = tl.where(((touched & BAN_BIT) == 0) | (b != b), b, float("-inf"))
    return b


@triton.jit
def combine(row, b, ids, live, num_terms):
    """combine_listed of a row none of whose streams is late."""
    return combine_listed(row, row[0], 0, b, ids, ids, live, num_terms, False)


@triton.jit
def combine_listed(row, late_ptr, first_late, b, ids, places, live, num_terms, HAS_LATE: tl.constexpr):
    """Scores of a block after the rules and their composition: -inf where not live, NaN where a live one is not below
    infinity or a stream is not finite.

    With HAS_LATE, term m's stream is read at late_ptr[m, places] (fp32, V apart) if its row is first_late or a later
    one. No pair has a late stream.
    """
    logits_ptr, stride_row, vocab_size, ints, _, _, _, _, term_ints, term_floats, normalizers, thresholds = (
        row
    )
    total = tl.zeros_like(b)
    is_bad = live & (ids < 0)
    is_sum = tl.load(ints + ADD_PENALTIES) != 0
    for term in range(num_terms):
        kind = tl.load(term_ints + term * TERM_WORDS + KIND)
        strength = tl.load(term_floats + term * TERM_WORDS + STRENGTH)
        row_1 = tl.load(term_ints + term * TERM_WORDS + ROW_1).to(tl.int64)
        row_2 = tl.load(term_ints + term * TERM_WORDS + ROW_2).to(tl.int64)
        if HAS_LATE:
            if row_1 >= first_late:
                x_1 = tl.load(late_ptr + term * vocab_size + places, mask=live, other=0.0)
            else:
                x_1 = tl.load(logits_ptr + row_1 * stride_row + ids, mask=live, other=0.0).to(tl.float32)
        else:
            x_1 = tl.load(logits_ptr + row_1 * stride_row + ids, mask=live, other=0.0).to(tl.float32)
        # x - x is NaN for NaN and both infinities.
        is_bad |= (x_1 - x_1) != 0.0
        if row_2 >= 0:
            x_2 = tl.load(logits_ptr + row_2 * stride_row + ids, mask=live, other=0.0).to(tl.float32)
            is_bad |= (x_2 - x_2) != 0.0
            if kind == PAIR_LINEAR:
                log_1 = x_1 - tl.load(normalizers + term * 2)
                penalty = strength * ((x_2 - tl.load(normalizers + term * 2 + 1)) - log_1)
            else:
                threshold = tl.load(thresholds + term)
                is_bad |= live & spread(threshold != threshold, ids)
                penalty = tl.where(x_2 - x_1 >= threshold, float("inf"), 0.0)
        elif kind == SUBTRACT:
            penalty = strength * (x_1 - tl.load(normalizers + term * 2))
        else:
            dead_zone = tl.load(term_floats + term * TERM_WORDS + DEAD_ZONE)
            penalty = strength * tl.maximum((x_1 - b) - dead_zone, 0.0)
        # A normaliser is NaN where its stream is spoiled anywhere; a maximum that drops NaN would drop the term.
        larger = tl.maximum(total, penalty, propagate_nan=tl.PropagateNan.ALL)
        total = tl.where(is_sum, total + penalty, larger)
    s = b - total
    s = tl.where((s < float("inf")) & (is_bad == 0), s, float("nan"))
    return tl.where(live, s, float("-inf"))


@triton.jit
def penalized(row, s, ids, kept, anchor):
    """Scores after the three penalties on history and logit_bias; the repetition penalty scales s + anchor."""
    floats, touched_ptr, biases_ptr = row[4], row[6], row[7]
    touched = tl.load(touched_ptr + ids, mask=kept, other=0)
    repetition = tl.load(floats + REPETITION)
    z = s
    if repetition != 1.0:
        z = s + anchor
        is_seen = (touched & ~BAN_BIT) != 0
        z = tl.where(is_seen, tl.where(z > 0.0, tl.div_rn(z, repetition), z * repetition), z)
    counts = (touched // ONE_OUTPUT).to(tl.float32)
    z = z - tl.load(floats + PRESENCE) * (counts > 0.0).to(tl.float32)
    z = z - tl.load(floats + FREQUENCY) * counts
    return z + tl.load(biases_ptr + ids, mask=kept, other=0.0)


@triton.jit
def score_of_one(row, token, num_terms, BLOCK: tl.constexpr):
    """The score of one token; -inf where it is banned or out of range."""
    vocab_size = row[2]
    ids = token + tl.zeros((BLOCK,), tl.int32)
    in_range = (ids >= 0) & (ids < vocab_size)
    b = load_target(row, ids, in_range)
    s = combine(row, b, ids, b > float("-inf"), num_terms)
    return tl.max(tl.where(s == s, s, float("-inf")))


@triton.jit
def sort_key(x):
    """An int32 that orders as the fp32 number does; -0 counts as 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def number_of(key):
    """The fp32 number of a sort_key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_key(x, ids):
    """An int64 whose maximum is the largest x, ties by lowest id; NaN as tl.where writes it is larger than all."""
    return (sort_key(x).to(tl.int64) << 32) | (-ids + NO_ID).to(tl.int64)


@triton.jit
def number_of_best(key):
    return number_of((key >> 32).to(tl.int32))


@triton.jit
def id_of_best(key):
    return -(key & 0x7FFFFFFF).to(tl.int32) + NO_ID


@triton.jit
def kth_largest_listed(values_ptr, num_values, k, BLOCK: tl.constexpr):
    """The k-th largest of values_ptr[:num_values], exactly; the smallest if there are fewer than k, inf of none.

    Halves the range of keys until exactly k reach its lower end, or one key is left. The first block, mostly all
    there is, stays in registers.
    """
    lane = tl.arange(0, BLOCK)
    first = tl.load(values_ptr + lane, mask=lane < num_values, other=float("-inf"))
    first_keys = sort_key(first)
    smallest, largest = tl.min(tl.where(lane < num_values, first_keys, NO_ID)), tl.max(first_keys)
    for start in range(BLOCK, num_values, BLOCK):
        inside = start + lane < num_values
        keys = sort_key(tl.load(values_ptr + start + lane, mask=inside, other=0.0))
        smallest = tl.minimum(smallest, tl.min(tl.where(inside, keys, NO_ID)))
        largest = tl.maximum(largest, tl.max(tl.where(inside, keys, -NO_ID)))
    low, high = smallest.to(tl.int64), largest.to(tl.int64) + 1
    while high - low > 1:
        tried = low + (high - low) // 2
        tried_key = tried.to(tl.int32)
        count = tl.sum(((lane < num_values) & (first_keys >= tried_key)).to(tl.int32))
        for start in range(BLOCK, num_values, BLOCK):
            inside = start + lane < num_values
            x = tl.load(values_ptr + start + lane, mask=inside, other=0.0)
            count += tl.sum((inside & (sort_key(x) >= tried_key)).to(tl.int32))
        low = tl.where(count >= k, tried, low)
        high = tl.where(count > k, high, tl.where(count == k, low + 1, tried))
    # If exactly k reach `low`, the smallest of them is the one; else it is `low` itself.
    low_key = low.to(tl.int32)
    found = tl.min(tl.where((lane < num_values) & (first_keys >= low_key), first_keys, NO_ID))
    for start in range(BLOCK, num_values, BLOCK):
        inside = start + lane < num_values
        keys = sort_key(tl.load(values_ptr + start + lane, mask=inside, other=0.0))
        found = tl.minimum(found, tl.min(tl.where(inside & (keys >= low_key), keys, NO_ID)))
    return tl.where(num_values > 0, number_of(found), float("inf"))
