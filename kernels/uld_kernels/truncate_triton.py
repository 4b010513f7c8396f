"""Truncation of a listed row in place: top-k and top-p by thresholds found bit by bit, ties by lowest id.

Device functions, called by finish_triton. z are log-weights of the draw; a token that is cut becomes -inf."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from uld_kernels.columns_triton import NO_ID, kth_largest_listed, sort_key


@triton.jit
def _lowest_ids_bound(z_ptr, ids_ptr, num_listed, value, wanted, BLOCK: tl.constexpr):
    """The largest id that may stay, so that `wanted` tokens with z == value do: those with the lowest ids."""
    lane = tl.arange(0, BLOCK)
    bound = tl.full((), 0, tl.int32)
    for step in range(31):
        # The largest bound that fewer than `wanted` ids lie below; one more bit of it each step.
        tried = bound | (tl.full((), 1073741824, tl.int32) >> step)
        count = tl.full((), 0, tl.int32)
        for start in range(0, num_listed, BLOCK):
            inside = start + lane < num_listed
            z = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf"))
            ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
            count += tl.sum((inside & (z == value) & (ids < tried)).to(tl.int32))
        bound = tl.where(count < wanted, tried, bound)
    return bound


@triton.jit
def _cut(z_ptr, ids_ptr, num_listed, value, num_tied_kept, BLOCK: tl.constexpr):
    """Sets z to -inf below `value`, and for all but the `num_tied_kept` lowest ids at it."""
    lane = tl.arange(0, BLOCK)
    num_tied = tl.full((), 0, tl.int32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        z = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf"))
        num_tied += tl.sum((inside & (z == value)).to(tl.int32))
    last_id = tl.full((), NO_ID, tl.int32)
    if num_tied > num_tied_kept:
        last_id = _lowest_ids_bound(z_ptr, ids_ptr, num_listed, value, num_tied_kept, BLOCK)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        z = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf"))
        ids = tl.load(ids_ptr + start + lane, mask=inside, other=0)
        stays = (z > value) | ((z == value) & (ids <= last_id))
        tl.store(z_ptr + start + lane, tl.where(stays, z, float("-inf")), mask=inside)
    tl.debug_barrier()


@triton.jit
def top_k_cut(z_ptr, ids_ptr, num_listed, top_k, BLOCK: tl.constexpr):
    """Leaves the top_k largest z, of equal ones the lowest ids."""
    lane = tl.arange(0, BLOCK)
    value = kth_largest_listed(z_ptr, num_listed, top_k, BLOCK)
    num_above = tl.full((), 0, tl.int32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        z = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf"))
        num_above += tl.sum((inside & (z > value)).to(tl.int32))
    _cut(z_ptr, ids_ptr, num_listed, value, top_k - num_above, BLOCK)


@triton.jit
def mass_from(z_ptr, num_listed, max_z, key, BLOCK: tl.constexpr):
    """Sum of exp(z - max_z) over the z whose key is at least `key`, in fp64."""
    lane = tl.arange(0, BLOCK)
    mass = tl.full((), 0.0, tl.float64)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        z = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf"))
        reached = inside & (z > float("-inf")) & (sort_key(z) >= key)
        mass += tl.sum(tl.where(reached, tl.exp(z.to(tl.float64) - max_z.to(tl.float64)), 0.0))
    return mass


@triton.jit
def top_p_cut(z_ptr, ids_ptr, num_listed, max_z, wanted, BLOCK: tl.constexpr):
    """Leaves the fewest largest z whose mass reaches `wanted` (in units of exp(max_z)), ties by lowest id."""
    lane = tl.arange(0, BLOCK)
    key = tl.full((), 0, tl.int64)
    for step in range(32):
        tried = key | (tl.full((), 2147483648, tl.int64) >> step)
        mass = mass_from(z_ptr, num_listed, max_z, tried, BLOCK)
        key = tl.where(mass >= wanted, tried, key)
    value = tl.full((), float("inf"), tl.float32)
    for start in range(0, num_listed, BLOCK):
        inside = start + lane < num_listed
        z = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf"))
        reached = inside & (z > float("-inf")) & (sort_key(z) >= key)
        value = tl.minimum(value, tl.min(tl.where(reached, z, float("inf"))))
    above = mass_from(z_ptr, num_listed, max_z, sort_key(value) + 1, BLOCK)
    each = tl.exp(value.to(tl.float64) - max_z.to(tl.float64))
    # Tied token j (from 0) is needed while above + j * each < wanted.
    num_tied_kept = tl.ceil((wanted - above) / each)
    num_tied_kept = tl.maximum(tl.minimum(num_tied_kept, 1e9), 1.0).to(tl.int32)
    _cut(z_ptr, ids_ptr, num_listed, value, num_tied_kept, BLOCK)
