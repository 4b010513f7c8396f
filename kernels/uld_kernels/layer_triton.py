"""The steps of a decoder layer between its products on Triton, one launch each. Called by layer on CUDA tensors. Knows
no model and no cache.

Never waits for the device. A row's bits hang on nothing beside it.

Legend: N rows, D model width, H heads, W head width, I intermediate width."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Heads of one program: as many as give every thread of NUM_WARPS four values of a head of 128.
BLOCK_H = 4
BLOCK_I = 1024
NUM_WARPS = 4


def rms_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
    """layer.rms_norm for arguments that it has checked."""
    N, D = x_ND.shape
    out_ND = torch.empty((N, D), dtype=x_ND.dtype, device=x_ND.device)
    if N:
        _rms_norm_kernel[(N,)](
            x_ND, x_ND.stride(0), x_ND.stride(1), weight_D, out_ND, eps,
            WIDTH=D, BLOCK=triton.next_power_of_2(D), num_warps=norm_warps(D),
        )  # fmt: skip
    return out_ND


def norm_warps(width: int) -> int:
    """Up to 16 values a thread."""
    return max(1, min(16, int(triton.next_power_of_2(width)) // 512))


def rotate(
    heads_NHW: torch.Tensor,
    cos_NW: torch.Tensor,
    sin_NW: torch.Tensor,
    *,
    weight_HW: torch.Tensor | None,
    eps: float,
) -> None:
    """layer.rotate for arguments that it has checked."""
    N, H, W = heads_NHW.shape
    if N == 0:
        return
    _rotate_kernel[(N, triton.cdiv(H, BLOCK_H))](
        heads_NHW, heads_NHW.stride(0), heads_NHW.stride(1), cos_NW, sin_NW, cos_NW.stride(0),
        cos_NW if weight_HW is None else weight_HW, eps,
        NUM_HEADS=H, HALF=W // 2, BLOCK_HALF=triton.next_power_of_2(W // 2), BLOCK_H=BLOCK_H,
        HAS_NORM=weight_HW is not None, num_warps=NUM_WARPS,
    )  # fmt: skip


def silu_mul(gate_up_NX: torch.Tensor) -> torch.Tensor:
    """layer.silu_mul for arguments that it has checked."""
    N, width = gate_up_NX.shape[0], gate_up_NX.shape[1] // 2
    out_NI = torch.empty((N, width), dtype=gate_up_NX.dtype, device=gate_up_NX.device)
    if N and width:
        _silu_mul_kernel[(N, triton.cdiv(width, BLOCK_I))](
            gate_up_NX, gate_up_NX.stride(0), out_NI, width, BLOCK=BLOCK_I, num_warps=NUM_WARPS
        )
    return out_NI


@triton.jit
def _rms_norm_kernel(
    x_ptr, x_stride_row, x_stride_column, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """One row."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_d = d < WIDTH
    x_D = tl.load(x_ptr + row * x_stride_row + d * x_stride_column, mask=is_d, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x_D * x_D, 0) / WIDTH + eps)
    out_D = x_D * scale * tl.load(weight_ptr + d, mask=is_d, other=0.0)
    tl.store(out_ptr + row * WIDTH + d, out_D.to(out_ptr.dtype.element_ty), mask=is_d)


@triton.jit
def _rotate_kernel(
    heads_ptr, heads_stride_row, heads_stride_head, cos_ptr, sin_ptr, table_stride_row, weight_ptr, eps,
    NUM_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one row, in place."""
    row = tl.program_id(0).to(tl.int64)
    head, w = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_HALF)
    is_w = w < HALF
    is_held = (head < NUM_HEADS)[:, None] & is_w[None, :]
    at_HW = heads_ptr + row * heads_stride_row + head[:, None] * heads_stride_head + w[None, :]
    low_HW = tl.load(at_HW, mask=is_held, other=0.0).to(tl.float32)
    high_HW = tl.load(at_HW + HALF, mask=is_held, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(low_HW * low_HW, 1) + tl.sum(high_HW * high_HW, 1)
        scale = 1.0 / tl.sqrt_rn(squares / (2 * HALF) + eps)
        weight_at = weight_ptr + head[:, None] * (2 * HALF) + w[None, :]
        low_HW *= scale[:, None] * tl.load(weight_at, mask=is_held, other=0.0)
        high_HW *= scale[:, None] * tl.load(weight_at + HALF, mask=is_held, other=0.0)
    table = row * table_stride_row + w
    low_cos = tl.load(cos_ptr + table, mask=is_w, other=0.0).to(tl.float32)
    high_cos = tl.load(cos_ptr + table + HALF, mask=is_w, other=0.0).to(tl.float32)
    low_sin = tl.load(sin_ptr + table, mask=is_w, other=0.0).to(tl.float32)
    high_sin = tl.load(sin_ptr + table + HALF, mask=is_w, other=0.0).to(tl.float32)
    new_low_HW = low_HW * low_cos[None, :] + high_HW * low_sin[None, :]
    new_high_HW = high_HW * high_cos[None, :] + low_HW * high_sin[None, :]
    tl.store(at_HW, new_low_HW.to(heads_ptr.dtype.element_ty), mask=is_held)
    tl.store(at_HW + HALF, new_high_HW.to(heads_ptr.dtype.element_ty), mask=is_held)


@triton.jit
def _silu_mul_kernel(gate_up_ptr, gate_up_stride_row, out_ptr, width, BLOCK: tl.constexpr):
    """BLOCK columns of one row."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_i = i < width
    at = gate_up_ptr + row * gate_up_stride_row + i
    gate = tl.load(at, mask=is_i, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=is_i, other=0.0).to(tl.float32)
    # e^-gate overflows to inf for gates below -88: gate / inf is 0, as it should be.
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * width + i, out.to(out_ptr.dtype.element_ty), mask=is_i)
