"""The steps of a decoder layer between its products, one launch each on CUDA: what they compute in plain torch, and the
choice of backend. Called by the model's fused layers. Knows no model and no cache.

Legend: N rows, D model width, H heads, W head width, I intermediate width."""

from __future__ import annotations

import torch
import torch.nn.functional as F

HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_WIDTH = 32768


def rms_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * w for each row (arXiv 1910.07467, Eq. 4), in fp32 and rounded once; (N, D).

    weight_D is fp32. Raises ValueError for shapes that do not fit."""
    if x_ND.shape[1:] != weight_D.shape or weight_D.dtype != torch.float32 or not weight_D.is_contiguous():
        raise ValueError(
            f"x {tuple(x_ND.shape)} and weight {tuple(weight_D.shape)}, {weight_D.dtype}, do not fit"
        )
    if _runs_on_triton(x_ND, x_ND.shape[1]):
        from uld_kernels import layer_triton

        return layer_triton.rms_norm(x_ND, weight_D, eps=eps)
    return rms_norm_reference(x_ND, weight_D, eps=eps)


def rms_norm_reference(x_ND: torch.Tensor, weight_D: torch.Tensor, *, eps: float) -> torch.Tensor:
    wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    scale_N1 = torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + eps)
    return (wide_ND * scale_N1 * weight_D).to(x_ND.dtype)


def rotate(
    heads_NHW: torch.Tensor,
    cos_NW: torch.Tensor,
    sin_NW: torch.Tensor,
    *,
    weight_HW: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate every head in place by its row's angles (arXiv 2104.09864, Eq. 34, halves split as Hugging Face has
    them), after norming it with its own weight where there is one; in fp32, rounded once.

    sin_NW      the sine, negated in the first half. Both tables may be of another dtype than the heads.
    weight_HW   fp32, for rms_norm of every head.

    Raises ValueError for shapes that do not fit."""
    N, H, W = heads_NHW.shape
    tables_fit = cos_NW.shape == sin_NW.shape == (N, W) and cos_NW.stride() == sin_NW.stride()
    if (
        W % 2
        or not tables_fit
        or cos_NW.dtype != sin_NW.dtype
        or {cos_NW.stride(1), heads_NHW.stride(2)} != {1}
    ):
        raise ValueError(
            f"heads {tuple(heads_NHW.shape)}, cosine {tuple(cos_NW.shape)} and sine {tuple(sin_NW.shape)} do not fit"
        )
    if weight_HW is not None and (weight_HW.shape != (H, W) or weight_HW.dtype != torch.float32):
        raise ValueError(
            f"norm weights {tuple(weight_HW.shape)}, {weight_HW.dtype}, do not fit {H} heads of {W}"
        )
    if _runs_on_triton(heads_NHW, W):
        from uld_kernels import layer_triton

        layer_triton.rotate(heads_NHW, cos_NW, sin_NW, weight_HW=weight_HW, eps=eps)
    else:
        rotate_reference(heads_NHW, cos_NW, sin_NW, weight_HW=weight_HW, eps=eps)


def rotate_reference(
    heads_NHW: torch.Tensor,
    cos_NW: torch.Tensor,
    sin_NW: torch.Tensor,
    *,
    weight_HW: torch.Tensor | None,
    eps: float,
) -> None:
    wide_NHW = heads_NHW.to(torch.promote_types(heads_NHW.dtype, torch.float32))
    if weight_HW is not None:
        scale_NH1 = torch.rsqrt(wide_NHW.square().mean(-1, keepdim=True) + eps)
        wide_NHW = wide_NHW * scale_NH1 * weight_HW
    swapped_NHW = wide_NHW.roll(wide_NHW.shape[-1] // 2, dims=-1)
    heads_NHW.copy_(wide_NHW * cos_NW[:, None] + swapped_NHW * sin_NW[:, None])


def silu_mul(gate_up_NX: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202, Eq. 5, as SwiGLU) of rows (N, 2 I) in which they lie side by side; (N, I), in
    fp32 and rounded once. Raises ValueError for rows of odd width."""
    if gate_up_NX.shape[1] % 2 or gate_up_NX.stride(1) != 1:
        raise ValueError(f"rows {tuple(gate_up_NX.shape)} must be of even width and lie contiguous")
    if _runs_on_triton(gate_up_NX, 0):
        from uld_kernels import layer_triton

        return layer_triton.silu_mul(gate_up_NX)
    return silu_mul_reference(gate_up_NX)


def silu_mul_reference(gate_up_NX: torch.Tensor) -> torch.Tensor:
    gate_NI, up_NI = gate_up_NX.to(torch.promote_types(gate_up_NX.dtype, torch.float32)).chunk(2, dim=1)
    return (F.silu(gate_NI) * up_NI).to(gate_up_NX.dtype)


def _runs_on_triton(x: torch.Tensor, width: int) -> bool:
    return x.is_cuda and x.dtype in HALF_OR_SINGLE and width <= LARGEST_WIDTH
