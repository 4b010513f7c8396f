"""From a row's scores to its token: penalties, temperature, top-k, top-p, min-p, noise. Device functions, called by
finish_triton.

What truncation leaves is a beginning of the tokens in order (z falling, then id rising). So nothing is sorted and
nothing is cut: a token is drawn, and counts if few enough tokens come before it; else the next one is drawn from those
before it, and so on. Mostly the first counts. Legend: s scores, z log-weights of the draw."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels.columns_triton import (
    HAS_PENALTIES,
    LEAST_KEY,
    LOG_MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    best_key,
    id_of_best,
    kth_largest_listed,
    penalized,
)
from uld_kernels.noise_triton import NOISE_SPAN, gumbel_noise, stream_of


@triton.jit
def write_weights(row, ids_ptr, s_ptr, z_ptr, num_listed, anchor, BLOCK: tl.constexpr):
    """Writes z = penalised s / temperature, -inf where s is; returns the largest z and whether any is not finite."""
    ints, floats = row[3], row[4]
    temperature = tl.load(floats + TEMPERATURE)
    has_penalties = tl.load(ints + HAS_PENALTIES) != 0
    warmth = tl.where(temperature > 0.0, temperature, 1.0)
    lane = tl.arange(0, BLOCK)
    max_z = tl.full((), float("-inf"), tl.float32)
    num_bad = tl.full((), 0, tl.int32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        z = tl.load(s_ptr + start + lane, mask=inside, other=float("-inf"))
        kept = z > float("-inf")
        if has_penalties:
            ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
            z = penalized(row, z, ids, kept, anchor)
            num_bad += tl.sum((kept & ((z - z) != 0.0)).to(tl.int32))
        z = tl.where(kept, tl.div_rn(z, warmth), float("-inf"))
        max_z = tl.maximum(max_z, tl.max(z))
        tl.store(z_ptr + start + lane, z, mask=inside)
    tl.debug_barrier()
    return max_z, num_bad


@triton.jit
def _mass_above(z_ptr, num_listed, max_z, lowest, BLOCK: tl.constexpr):
    """(sum of exp(z - max_z) over z > lowest in fp64, their number)."""
    lane = tl.arange(0, BLOCK)
    mass = tl.full((), 0.0, tl.float64)
    count = tl.full((), 0, tl.int32)
    for start in range(0, num_listed, BLOCK):
        z = tl.load(z_ptr + start + lane, mask=start + lane < num_listed, other=float("-inf"))
        above = z > lowest
        mass += tl.sum(tl.where(above, tl.exp(z.to(tl.float64) - max_z.to(tl.float64)), 0.0))
        count += tl.sum(above.to(tl.int32))
    return mass, count


@triton.jit
def _draw_before(ids_ptr, z_ptr, num_listed, lowest_z, cut_z, cut_id, ints, is_noisy, BLOCK: tl.constexpr):
    """The id with the largest z plus noise of those before (cut_z, cut_id) in order and not below lowest_z."""
    lane = tl.arange(0, BLOCK)
    seed, position = stream_of(ints)
    best = tl.full((), LEAST_KEY, tl.int64)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        z = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf"))
        is_left = (z >= lowest_z) & ((z > cut_z) | ((z == cut_z) & (ids < cut_id))) & (z > float("-inf"))
        if is_noisy:
            z = z + gumbel_noise(ids, seed, position)
        here = tl.max(tl.where(is_left, best_key(z, ids), LEAST_KEY))
        best = tl.maximum(best, here)
    return id_of_best(best)


@triton.jit
def number_at(ids_ptr, values_ptr, num_listed, token, BLOCK: tl.constexpr):
    """The value of one listed token; -inf if it is not listed."""
    lane = tl.arange(0, BLOCK)
    found = tl.full((), float("-inf"), tl.float32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        is_it = tl.load(ids_ptr + start + lane, mask=inside, other=-1) == token
        x = tl.load(values_ptr + start + lane, mask=is_it, other=float("-inf"))
        found = tl.maximum(found, tl.max(x))
    return found


@triton.jit
def _before(ids_ptr, z_ptr, num_listed, max_z, token, token_z, BLOCK: tl.constexpr):
    """(number, mass in fp64) of the tokens that come before `token` in order."""
    lane = tl.arange(0, BLOCK)
    mass = tl.full((), 0.0, tl.float64)
    count = tl.full((), 0, tl.int32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        z = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf"))
        is_before = inside & ((z > token_z) | ((z == token_z) & (ids < token)))
        mass += tl.sum(tl.where(is_before, tl.exp(z.to(tl.float64) - max_z.to(tl.float64)), 0.0))
        count += tl.sum(is_before.to(tl.int32))
    return count, mass


@triton.jit
def draw(row, ids_ptr, z_ptr, num_listed, max_z, num_weights, mass_z, is_partial, BLOCK: tl.constexpr):
    """The token of a row whose list holds at least what truncation leaves. `num_weights` tokens could be drawn, with
    a mass of `mass_z` around max_z where the list is partial."""
    ints, floats = row[3], row[4]
    is_noisy = tl.load(floats + TEMPERATURE) > 0.0
    top_k, top_p = tl.load(ints + TOP_K), tl.load(floats + TOP_P)
    has_top_k = is_noisy & (top_k > 0) & (top_k < num_weights)
    has_top_p = is_noisy & (top_p < 1.0)
    wanted = tl.full((), float("inf"), tl.float64)
    if has_top_p:
        if has_top_k:
            # The tokens tied at the end of the top k weigh the same, so their sum does not hang on which they are.
            last = kth_largest_listed(z_ptr, num_listed, top_k, BLOCK)
            mass, num_above = _mass_above(z_ptr, num_listed, max_z, last, BLOCK)
            each = tl.exp(last.to(tl.float64) - max_z.to(tl.float64))
            wanted = top_p.to(tl.float64) * (mass + (top_k - num_above).to(tl.float64) * each)
        elif is_partial:
            wanted = top_p.to(tl.float64) * mass_z.to(tl.float64)
        else:
            mass, _ = _mass_above(z_ptr, num_listed, max_z, tl.full((), float("-inf"), tl.float32), BLOCK)
            wanted = top_p.to(tl.float64) * mass
    lowest_z = max_z + tl.where(is_noisy, tl.maximum(tl.load(floats + LOG_MIN_P), -NOISE_SPAN), 0.0)
    cut_z = tl.full((), float("-inf"), tl.float32)
    cut_id = tl.full((), 0, tl.int32)
    token = tl.full((), -1, tl.int32)
    is_drawing = num_listed > 0
    while is_drawing:
        token = _draw_before(ids_ptr, z_ptr, num_listed, lowest_z, cut_z, cut_id, ints, is_noisy, BLOCK)
        is_drawing = has_top_k | has_top_p
        if is_drawing:
            cut_z, cut_id = number_at(ids_ptr, z_ptr, num_listed, token, BLOCK), token
            count, mass_before = _before(ids_ptr, z_ptr, num_listed, max_z, token, cut_z, BLOCK)
            is_drawing = (has_top_k & (count >= top_k)) | (has_top_p & (mass_before >= wanted) & (count > 0))
    return token
