"""What the tiles of a row say together. A device function, called by list_triton and finish_triton."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels.columns_triton import (
    FILTERED_BY_TARGET,
    LEAST_KEY,
    LIST_MODE,
    LIST_NUCLEUS,
    NUM_TERMS,
    PROTECT,
    ROW_CLASS,
    TARGET_ID,
    TEMPERATURE,
    number_of_best,
)
from uld_kernels.scan_triton import (
    BEST_B,
    BEST_S,
    COUNT,
    KL,
    MAX_OTHERS,
    MAX_VALUE,
    NUM_BESTS,
    NUM_HIGHER,
    NUM_INT_PARTIALS,
    NUM_PARTIALS,
    SUM_B,
    SUM_OTHERS,
    SUM_S,
    SUM_VALUE,
)


@triton.jit
def _merged(largest, sums):
    """(maximum, LSE) of a row from the maxima and sums of its tiles, in their order."""
    top = tl.max(largest)
    total = tl.sum(tl.where(largest > float("-inf"), sums * tl.exp(largest - top), 0.0))
    return top, tl.where(top > float("-inf"), top + tl.log(total), float("-inf"))


@triton.jit
def merge(row, index, bests_ptr, partials_ptr, int_partials_ptr, num_tiles, TILES: tl.constexpr):
    """What the tiles say of the row: (best key of b, LSE of b, LSE of b without protected tokens, best key of s, LSE
    of s, KL, largest value, mass of the values, number kept, number higher than the target token, is bad)."""
    _, _, _, ints, floats, _, _, _, _, _, _, _ = row
    tile = tl.arange(0, TILES)
    is_tile = tile < num_tiles
    at = index.to(tl.int64) * num_tiles + tile
    part, best = partials_ptr + at * NUM_PARTIALS, bests_ptr + at * NUM_BESTS
    tile_best_b = tl.load(best + BEST_B, mask=is_tile, other=LEAST_KEY)
    tile_max_b = tl.where(is_tile, number_of_best(tile_best_b), float("-inf"))
    best_b = tl.max(tile_best_b)
    max_b, lse_b = _merged(tile_max_b, tl.load(part + SUM_B, mask=is_tile, other=0.0))
    lse_others = lse_b
    if tl.load(ints + PROTECT) != 0:
        max_others = tl.load(part + MAX_OTHERS, mask=is_tile, other=float("-inf"))
        _top, lse_others = _merged(max_others, tl.load(part + SUM_OTHERS, mask=is_tile, other=0.0))
    best_s, lse_s, max_s = best_b, lse_b, max_b
    kl = tl.full((), 0.0, tl.float32)
    if (tl.load(ints + ROW_CLASS) != FILTERED_BY_TARGET) & (tl.load(ints + NUM_TERMS) > 0):
        tile_best_s = tl.load(best + BEST_S, mask=is_tile, other=LEAST_KEY)
        tile_max_s = tl.where(is_tile, number_of_best(tile_best_s), float("-inf"))
        best_s = tl.max(tile_best_s)
        max_s, lse_s = _merged(tile_max_s, tl.load(part + SUM_S, mask=is_tile, other=0.0))
        share = tl.where(tile_max_s > float("-inf"), tl.exp(tile_max_s - max_s), 0.0)
        kl_sum = tl.sum(share * tl.load(part + KL, mask=is_tile, other=0.0))
        kl = kl_sum / tl.exp(lse_s - max_s) - lse_s + lse_b
    tile_value = tl.load(part + MAX_VALUE, mask=is_tile, other=float("-inf"))
    max_value = tl.max(tile_value)
    mass = tl.full((), 0.0, tl.float32)
    if tl.load(ints + LIST_MODE) == LIST_NUCLEUS:
        shifted = (tile_value - max_value) / tl.load(floats + TEMPERATURE)
        share = tl.where(tile_value > float("-inf"), tl.exp(shifted), 0.0)
        mass = tl.sum(share * tl.load(part + SUM_VALUE, mask=is_tile, other=0.0))
    count = tl.sum(tl.load(int_partials_ptr + at * NUM_INT_PARTIALS + COUNT, mask=is_tile, other=0))
    # NaN is the largest key of all.
    is_bad = ((number_of_best(best_b) < float("inf")) & (number_of_best(best_s) < float("inf"))) == 0
    is_bad |= max_value == float("inf")
    num_higher = tl.full((), 0, tl.int32)
    if tl.load(ints + TARGET_ID) >= 0:
        num_higher = tl.sum(
            tl.load(int_partials_ptr + at * NUM_INT_PARTIALS + NUM_HIGHER, mask=is_tile, other=0)
        )
    return best_b, lse_b, lse_others, best_s, lse_s, kl, max_value, mass, count, num_higher, is_bad
