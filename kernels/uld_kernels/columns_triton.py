"""What all sampler kernels share: column numbers of the tables, and device functions for one block of one row.

Called by scan_triton, select_triton and finish_triton. Formulas are those of reference.py.

Pointer names: ints, floats, term_ints, term_floats are the tables of pack.py; partials and summaries are between
the kernels. A row of a table is found by its program, so all rules and parameters mix in one launch."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels import pack, rules

NUM_INTS = tl.constexpr(len(pack.INT_COLUMNS))
NUM_FLOATS = tl.constexpr(len(pack.FLOAT_COLUMNS))
NUM_TERM_INTS = tl.constexpr(len(pack.TERM_INT_COLUMNS))
NUM_TERM_FLOATS = tl.constexpr(len(pack.TERM_FLOAT_COLUMNS))


def _number(columns: tuple[str, ...], name: str) -> tl.constexpr:
    return tl.constexpr(columns.index(name))


ROW_B = _number(pack.INT_COLUMNS, "row_b")
NUM_TERMS = _number(pack.INT_COLUMNS, "num_terms")
ADD_PENALTIES = _number(pack.INT_COLUMNS, "add_penalties")
ROW_CLASS = _number(pack.INT_COLUMNS, "row_class")
PROTECT = _number(pack.INT_COLUMNS, "protect")
BAN_ROW = _number(pack.INT_COLUMNS, "ban_row")
HISTORY_ROW = _number(pack.INT_COLUMNS, "history_row")
BIAS_ROW = _number(pack.INT_COLUMNS, "bias_row")
TOP_K = _number(pack.INT_COLUMNS, "top_k")
NUM_LOGPROBS = _number(pack.INT_COLUMNS, "num_logprobs")
SEED_LOW = _number(pack.INT_COLUMNS, "seed_low")
SEED_HIGH = _number(pack.INT_COLUMNS, "seed_high")
POSITION = _number(pack.INT_COLUMNS, "position")
LIST_BEST = _number(pack.INT_COLUMNS, "list_best")
LIST_NUCLEUS = _number(pack.INT_COLUMNS, "list_nucleus")
TARGET_ID = _number(pack.INT_COLUMNS, "target_id")

TEMPERATURE = _number(pack.FLOAT_COLUMNS, "temperature")
TOP_P = _number(pack.FLOAT_COLUMNS, "top_p")
LOG_MIN_P = _number(pack.FLOAT_COLUMNS, "log_min_p")
REPETITION = _number(pack.FLOAT_COLUMNS, "repetition_penalty")
PRESENCE = _number(pack.FLOAT_COLUMNS, "presence_penalty")
FREQUENCY = _number(pack.FLOAT_COLUMNS, "frequency_penalty")
LOG_FUSED_TAU = _number(pack.FLOAT_COLUMNS, "log_fused_tau")
LIST_LOG_RATIO = _number(pack.FLOAT_COLUMNS, "list_log_ratio")

KIND = _number(pack.TERM_INT_COLUMNS, "kind")
ROW_1 = _number(pack.TERM_INT_COLUMNS, "row_1")
ROW_2 = _number(pack.TERM_INT_COLUMNS, "row_2")
NEEDS_NORMALIZER = _number(pack.TERM_INT_COLUMNS, "needs_normalizer")
RANK_K = _number(pack.TERM_INT_COLUMNS, "rank_k")
FILTER_KEEP = _number(pack.TERM_INT_COLUMNS, "filter_keep")
STRENGTH = _number(pack.TERM_FLOAT_COLUMNS, "strength")
LOG_FILTER_TAU = _number(pack.TERM_FLOAT_COLUMNS, "log_filter_tau")

SUBTRACT = tl.constexpr(rules.SUBTRACT)
RELU_DIFFERENCE = tl.constexpr(rules.RELU_DIFFERENCE)
PAIR_LINEAR = tl.constexpr(rules.PAIR_LINEAR)
PAIR_RANK = tl.constexpr(rules.PAIR_RANK)
STATUS_NUMERICAL = tl.constexpr(rules.NUMERICAL)
STATUS_NOTHING_KEPT = tl.constexpr(rules.NOTHING_KEPT)
FILTERED_BY_TARGET = tl.constexpr(pack.FILTERED_BY_TARGET)
FILTERED_BY_SCORE = tl.constexpr(pack.FILTERED_BY_SCORE)
UNFILTERED = tl.constexpr(pack.UNFILTERED)

GROUP = tl.constexpr(64)
"""Tokens whose maximum stands for them when candidates are sought."""

# Partial results of one tile of one row, from scan to select.
PARTIAL_MAX_B = tl.constexpr(0)
PARTIAL_SUM_B = tl.constexpr(1)
PARTIAL_MAX_OTHERS = tl.constexpr(2)
PARTIAL_SUM_OTHERS = tl.constexpr(3)
PARTIAL_MAX_S = tl.constexpr(4)
PARTIAL_SUM_S = tl.constexpr(5)
PARTIAL_KL = tl.constexpr(6)
PARTIAL_SUM_Z = tl.constexpr(7)
NUM_PARTIALS = tl.constexpr(8)
PARTIAL_ARGMAX_B = tl.constexpr(0)
PARTIAL_ARGMAX_S = tl.constexpr(1)
PARTIAL_COUNT = tl.constexpr(2)
PARTIAL_BAD = tl.constexpr(3)
NUM_INT_PARTIALS = tl.constexpr(4)

# What select hands to finish about one row.
SUMMARY_MAX_B = tl.constexpr(0)
SUMMARY_LSE_B = tl.constexpr(1)
SUMMARY_LSE_OTHERS = tl.constexpr(2)
SUMMARY_LSE_S = tl.constexpr(3)
SUMMARY_KL = tl.constexpr(4)
SUMMARY_MASS_Z = tl.constexpr(5)
NUM_SUMMARIES = tl.constexpr(6)
SUMMARY_NUM_LISTED = tl.constexpr(0)
SUMMARY_BAD = tl.constexpr(1)
SUMMARY_ARGMAX_B = tl.constexpr(2)
SUMMARY_ARGMAX_S = tl.constexpr(3)
SUMMARY_COUNT = tl.constexpr(4)
SUMMARY_IS_PARTIAL = tl.constexpr(5)
NUM_INT_SUMMARIES = tl.constexpr(6)

NO_ID = tl.constexpr(2**31 - 1)
"""Larger than any token id, so that a minimum over ids ignores it."""


@triton.jit
def spread(condition, ids):
    """A condition on the row as a mask on the block; the interpreter does not mix scalars into masks."""
    return ids < tl.where(condition, NO_ID, 0)


@triton.jit
def load_target(logits_ptr, stride_row, allowed_ptr, ints, ids, in_range, vocab_size):
    """Target logits of a block in fp32, -inf where banned or out of range; and whether any is NaN or +inf."""
    row_b = tl.load(ints + ROW_B).to(tl.int64)
    b = tl.load(logits_ptr + row_b * stride_row + ids, mask=in_range, other=float("-inf")).to(tl.float32)
    is_bad = (b != b) | (b == float("inf"))
    ban_row = tl.load(ints + BAN_ROW).to(tl.int64)
    allowed = tl.load(
        allowed_ptr + ban_row * vocab_size + ids, mask=in_range & spread(ban_row >= 0, ids), other=1
    )
    b = tl.where((allowed != 0) & (b == b), b, float("-inf"))
    return b, is_bad


@triton.jit
def combine(
    b,
    ids,
    live,
    logits_ptr,
    stride_row,
    ints,
    term_ints,
    term_floats,
    normalizers,
    rank_thresholds,
    num_terms,
):
    """Scores of a block after the rules and their composition, -inf where not live; NaN where a stream is."""
    total = tl.zeros_like(b)
    is_bad = live & (ids < 0)
    is_sum = tl.load(ints + ADD_PENALTIES) != 0
    for term in range(num_terms):
        term_int = term_ints + term * NUM_TERM_INTS
        kind = tl.load(term_int + KIND)
        strength = tl.load(term_floats + term * NUM_TERM_FLOATS + STRENGTH)
        row_1 = tl.load(term_int + ROW_1).to(tl.int64)
        row_2 = tl.load(term_int + ROW_2).to(tl.int64)
        x_1 = tl.load(logits_ptr + row_1 * stride_row + ids, mask=live, other=0.0).to(tl.float32)
        is_pair = live & spread(row_2 >= 0, ids)
        x_2 = tl.load(logits_ptr + row_2 * stride_row + ids, mask=is_pair, other=0.0).to(tl.float32)
        # x - x is NaN for NaN and both infinities.
        is_bad |= ((x_1 - x_1) != 0.0) | ((x_2 - x_2) != 0.0)
        rank_threshold = tl.load(rank_thresholds + term)
        is_bad |= live & spread(rank_threshold != rank_threshold, ids)
        log_1 = x_1 - tl.load(normalizers + term * 2)
        log_2 = x_2 - tl.load(normalizers + term * 2 + 1)
        # One-stream rules first, then the pairs: p is stream 2, q stream 1.
        penalty = tl.where(kind == SUBTRACT, strength * log_1, strength * tl.maximum(x_1 - b, 0.0))
        removed = tl.where(x_2 - x_1 >= rank_threshold, float("inf"), 0.0)
        paired = tl.where(kind == PAIR_LINEAR, strength * (log_2 - log_1), removed)
        penalty = tl.where(row_2 >= 0, paired, penalty)
        total = tl.where(is_sum, total + penalty, tl.maximum(total, penalty))
    s = tl.where(live, b - total, float("-inf"))
    return tl.where(is_bad, float("nan"), s)


@triton.jit
def sort_key(x):
    """An int64 in [0, 2**32) that orders as the fp32 number does."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def kth_largest_listed(values_ptr, num_values, k, BLOCK: tl.constexpr):
    """The k-th largest of values_ptr[:num_values], exactly; the smallest if there are fewer than k.

    Finds its key bit by bit: a bit is set if k values still reach the key with it. The first block, mostly all
    there is, stays in registers.
    """
    lane = tl.arange(0, BLOCK)
    first = tl.load(values_ptr + lane, mask=lane < num_values, other=0.0)
    first_keys = tl.where(lane < num_values, sort_key(first), -1)
    key = tl.full((), 0, tl.int64)
    for step in range(32):
        tried = key | (tl.full((), 2147483648, tl.int64) >> step)
        count = tl.sum((first_keys >= tried).to(tl.int32))
        for start in range(BLOCK, num_values, BLOCK):
            inside = start + lane < num_values
            x = tl.load(values_ptr + start + lane, mask=inside, other=0.0)
            count += tl.sum((inside & (sort_key(x) >= tried)).to(tl.int32))
        key = tl.where(count >= k, tried, key)
    smallest = tl.min(tl.where(first_keys >= key, first, float("inf")))
    for start in range(BLOCK, num_values, BLOCK):
        inside = start + lane < num_values
        x = tl.load(values_ptr + start + lane, mask=inside, other=0.0)
        smallest = tl.minimum(smallest, tl.min(tl.where(inside & (sort_key(x) >= key), x, float("inf"))))
    return smallest


@triton.jit
def _words(ids, seed, position, DOMAIN: tl.constexpr):
    zero = (ids * 0).to(tl.uint32)
    first, second, _, _ = tl.philox(
        seed, ids.to(tl.uint32), zero + position.to(tl.uint32), zero + DOMAIN, zero
    )
    return first, second


@triton.jit
def _exponential(word):
    folded = word.to(tl.int32, bitcast=True)
    folded = tl.where(folded < 0, ~folded, folded)
    uniform = tl.maximum(folded.to(tl.float32) * 4.6566127342e-10, 2.0**-32)
    x = -uniform.to(tl.float64)
    # log1p by log alone (Kahan): 1 + x as it rounds, corrected by how it rounds.
    shifted = 1.0 + x
    return -tl.where(shifted == 1.0, x, tl.log(shifted) * (x / (shifted - 1.0)))


@triton.jit
def gumbel_noise(ids, seed, position):
    """noise.gumbel_noise: the same fp32 bits for the same (seed, position, token id)."""
    size_word, member_word = _words(ids >> 8, seed, position, 1)
    highest = 5.545177444479562 - tl.log(_exponential(size_word))
    word, _ = _words(ids, seed, position, 0)
    below = tl.minimum(-tl.log(tl.exp(-highest) + _exponential(word)), highest)
    is_highest = (ids & 255) == (member_word.to(tl.int32, bitcast=True) & 255)
    return tl.where(is_highest, highest, below).to(tl.float32)
