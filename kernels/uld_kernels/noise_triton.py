"""The noise of noise.py on a device, bit for bit. Device functions, called by select_triton and draw_triton."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels.columns_triton import POSITION, SEED_HIGH, SEED_LOW

NOISE_SPAN = tl.constexpr(31.0)
"""noise.NOISE_SPAN: a token this far below the best is never drawn."""
SMALLEST_NOISE = tl.constexpr(-3.3)
"""Less than any noise."""


@triton.jit
def stream_of(ints):
    """(seed, position) of a row's record."""
    seed = (tl.load(ints + SEED_HIGH).to(tl.int64) << 32) | (
        tl.load(ints + SEED_LOW).to(tl.int64) & 0xFFFFFFFF
    )
    return seed, tl.load(ints + POSITION)


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
def group_noise(groups, seed, position):
    """noise.group_noise: the largest noise of 256 token ids in fp64, and the member that has it."""
    size_word, member_word = _words(groups, seed, position, 1)
    highest = 5.545177444479562 - tl.log(_exponential(size_word))
    return highest, member_word.to(tl.int32, bitcast=True) & 255


@triton.jit
def gumbel_noise(ids, seed, position):
    """noise.gumbel_noise: the same fp32 bits for the same (seed, position, token id)."""
    highest, member = group_noise(ids >> 8, seed, position)
    word, _ = _words(ids, seed, position, 0)
    below = tl.minimum(-tl.log(tl.exp(-highest) + _exponential(word)), highest)
    return tl.where((ids & 255) == member, highest, below).to(tl.float32)
