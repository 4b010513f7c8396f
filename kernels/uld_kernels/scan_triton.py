"""First kernels of the sampler: one read of the logits, tile by tile. Launched by sampler_triton.

touch     per (row, tile): bans, histories and biases over the vocabulary, only for batches that have any.
scan      per (row, tile): maxima and sums for LSE, KL and counts, and the maximum of every 16 tokens.
normalize per (row, term): LSE of assistants, only for batches that compose them."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels import workspace
from uld_kernels.columns_triton import (
    BAN_BIT,
    BANNED,
    BIASED,
    ENTRY_BITS,
    ENTRY_MASK,
    FILTERED_BY_TARGET,
    FIRST_ENTRY,
    GROUP,
    IN_PROMPT,
    KIND,
    LIST_MODE,
    LIST_NUCLEUS,
    NEEDS_NORMALIZER,
    NUM_ENTRIES,
    NUM_TERMS,
    ONE_OUTPUT,
    PAIR_LINEAR,
    PROMPT_BIT,
    PROTECT,
    PUT_OUT,
    ROW_1,
    ROW_2,
    ROW_B,
    ROW_CLASS,
    ROW_WORDS,
    SCAN_PENALIZES,
    SUBTRACT,
    TARGET_ID,
    TEMPERATURE,
    TERM_WORDS,
    TOUCH_ROW,
    UNFILTERED,
    best_key,
    combine,
    load_target,
    number_of_best,
    penalized,
    row_of,
    score_of_one,
    spread,
)

# Partial results of one tile of one row, for the finish: two keys, floats and ints.
BEST_B = tl.constexpr(0)
BEST_S = tl.constexpr(1)
NUM_BESTS = tl.constexpr(workspace.NUM_BESTS)
SUM_B = tl.constexpr(0)
MAX_OTHERS = tl.constexpr(1)
SUM_OTHERS = tl.constexpr(2)
SUM_S = tl.constexpr(3)
KL = tl.constexpr(4)
MAX_VALUE = tl.constexpr(5)
SUM_VALUE = tl.constexpr(6)
NUM_PARTIALS = tl.constexpr(workspace.NUM_PARTIALS)
COUNT = tl.constexpr(0)
NUM_HIGHER = tl.constexpr(1)
NUM_INT_PARTIALS = tl.constexpr(workspace.NUM_INT_PARTIALS)


@triton.jit
def _sum_exp(x, largest):
    """Sum of exp(x - largest), 0 where everything is -inf."""
    return tl.sum(tl.where(x > float("-inf"), tl.exp(x - largest), 0.0))


@triton.jit
def _touch_kernel(
    vocab_size, ints_ptr, entries_ptr, biases_of_ptr, touched_ptr, biases_ptr, BLOCK: tl.constexpr
):
    """Program (row, tile): writes which tokens of the tile are banned, seen or biased. Only integers are added, so no
    order matters."""
    index, first_id = tl.program_id(0), tl.program_id(1) * BLOCK
    ints = ints_ptr + index * ROW_WORDS
    touch_row = tl.load(ints + TOUCH_ROW).to(tl.int64)
    if (tl.load(ints + ROW_B) < 0) | (touch_row < 0):
        return
    touched, biases = touched_ptr + touch_row * vocab_size, biases_ptr + touch_row * vocab_size
    lane = tl.arange(0, BLOCK)
    in_range = first_id + lane < vocab_size
    tl.store(touched + first_id + lane, tl.zeros((BLOCK,), tl.int32), mask=in_range)
    tl.store(biases + first_id + lane, tl.zeros((BLOCK,), tl.float32), mask=in_range)
    tl.debug_barrier()
    first, num_entries = tl.load(ints + FIRST_ENTRY), tl.load(ints + NUM_ENTRIES)
    for start in range(0, num_entries, BLOCK):
        inside = start + lane < num_entries
        word = tl.load(entries_ptr + (first + start + lane) * 2, mask=inside, other=0)
        ids, effect = word & ENTRY_MASK, word >> ENTRY_BITS
        here = inside & (ids >= first_id) & (ids < first_id + BLOCK) & (ids < vocab_size)
        bit = tl.where(effect == BANNED, BAN_BIT, PROMPT_BIT)
        tl.atomic_or(touched + ids, bit, mask=here & ((effect == BANNED) | (effect == IN_PROMPT)))
        tl.atomic_add(touched + ids, bit * 0 + ONE_OUTPUT, mask=here & (effect == PUT_OUT))
        bias = tl.load(biases_of_ptr + (first + start + lane) * 2, mask=here & (effect == BIASED), other=0.0)
        tl.store(biases + ids, bias, mask=here & (effect == BIASED))


# What differs between shapes must not compile the kernel anew while somebody waits.
@triton.jit(do_not_specialize=["terms_at", "max_terms"])
def _scan_kernel(
    logits_ptr, stride_row, vocab_size, ints_ptr, floats_ptr, masks_ptr, touched_ptr, biases_ptr,
    normalizers_ptr, thresholds_ptr, terms_at, max_terms, protected_ptr,
    bests_ptr, partials_ptr, int_partials_ptr, group_max_ptr, num_groups,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, tile). Combines on the way unless the row is filtered by the target before combining."""
    index, tile, num_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = row_of(
        index, logits_ptr, stride_row, vocab_size, ints_ptr, floats_ptr, masks_ptr, touched_ptr, biases_ptr,
        normalizers_ptr, thresholds_ptr, terms_at, max_terms,
    )  # fmt: skip
    ints, floats = row[3], row[4]
    if tl.load(ints + ROW_B) < 0:
        return
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    b = load_target(row, ids, ids < vocab_size)
    best_b = tl.max(best_key(b, ids))
    max_b = number_of_best(best_b)
    sum_b = _sum_exp(b, max_b)
    out = partials_ptr + (index * num_tiles + tile).to(tl.int64) * NUM_PARTIALS
    tl.store(out + SUM_B, sum_b)
    if tl.load(ints + PROTECT) != 0:
        is_protected = tl.load(protected_ptr + ids, mask=ids < vocab_size, other=0) != 0
        others = tl.where(is_protected, float("-inf"), b)
        max_others = tl.max(others)
        tl.store(out + MAX_OTHERS, max_others)
        tl.store(out + SUM_OTHERS, _sum_exp(others, max_others))

    # A row filtered by the target reads its assistants on the candidates only.
    by_target = tl.load(ints + ROW_CLASS) == FILTERED_BY_TARGET
    num_terms = tl.where(by_target, 0, tl.load(ints + NUM_TERMS))
    s, best_s, max_value = b, best_b, max_b
    if num_terms > 0:
        s = combine(row, b, ids, b > float("-inf"), num_terms)
        best_s = tl.max(best_key(s, ids))
        max_value = number_of_best(best_s)
        weights = tl.where(s > float("-inf"), tl.exp(s - max_value), 0.0)
        tl.store(out + SUM_S, tl.sum(weights))
        tl.store(out + KL, tl.sum(tl.where(s > float("-inf"), weights * (s - b), 0.0)))
    best_out = bests_ptr + (index * num_tiles + tile).to(tl.int64) * NUM_BESTS
    tl.store(best_out + BEST_B, best_b)
    tl.store(best_out + BEST_S, best_s)
    int_out = int_partials_ptr + (index * num_tiles + tile).to(tl.int64) * NUM_INT_PARTIALS
    tl.store(int_out + COUNT, tl.sum((s > float("-inf")).to(tl.int32)))
    target_id = tl.load(ints + TARGET_ID)
    if (target_id >= 0) & (tl.load(ints + ROW_CLASS) == UNFILTERED):
        wanted = score_of_one(row, target_id, num_terms, 16)
        tl.store(int_out + NUM_HIGHER, tl.sum((s > wanted).to(tl.int32)))
    if tl.load(ints + SCAN_PENALIZES) != 0:
        kept = s > float("-inf")
        s = penalized(row, s, ids, kept, 0.0)
        # Infinity here tells the finish that this row cannot be drawn.
        s = tl.where(kept, tl.where(s - s == 0.0, s, float("inf")), float("-inf"))
        max_value = tl.max(s)
    tl.store(out + MAX_VALUE, max_value)
    if tl.load(ints + LIST_MODE) == LIST_NUCLEUS:
        weights = tl.exp((s - max_value) / tl.load(floats + TEMPERATURE))
        tl.store(out + SUM_VALUE, tl.sum(tl.where(s > float("-inf"), weights, 0.0)))
    by_group = tl.max(tl.reshape(s, (BLOCK // GROUP, GROUP)), axis=1)
    groups = tile * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(group_max_ptr + index.to(tl.int64) * num_groups + groups, by_group, mask=groups < num_groups)


@triton.jit
def _normalizer_tile_kernel(
    logits_ptr, stride_row, vocab_size, terms_ptr, stream_max_ptr, stream_sum_ptr, BLOCK: tl.constexpr
):
    """Program (row * terms * 2 + stream, tile): maximum and sum of exp of one assistant's tile."""
    stream, tile, num_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    term = terms_ptr + (stream // 2) * TERM_WORDS
    row = tl.load(term + tl.where(stream % 2 == 0, ROW_1, ROW_2)).to(tl.int64)
    needed = (tl.load(term + NEEDS_NORMALIZER) != 0) & (row >= 0)
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
    terms_ptr,
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
    term = terms_ptr + (stream // 2) * TERM_WORDS
    tile = tl.arange(0, TILES)
    largest = tl.load(stream_max_ptr + stream * num_tiles + tile, mask=tile < num_tiles, other=float("-inf"))
    sums = tl.load(stream_sum_ptr + stream * num_tiles + tile, mask=tile < num_tiles, other=0.0)
    top = tl.max(largest)
    total = tl.sum(tl.where(largest > float("-inf"), sums * tl.exp(largest - top), sums))
    normalizer = top + tl.log(total)
    normalizer = tl.where(tl.load(term + KIND) == SUBTRACT, normalizer - log_vocab_size, normalizer)
    needed = tl.load(term + NEEDS_NORMALIZER) != 0
    is_read = (stream % 2 == 0) | (tl.load(term + KIND) == PAIR_LINEAR)
    tl.store(normalizers_ptr + stream, tl.where(needed & is_read, normalizer, 0.0))
