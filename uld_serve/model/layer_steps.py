"""What a fused layer does between its products: norm, rotate, gate; in torch's operations, or each in one launch.
Chosen once at start, called by the fused layers. Knows no cache and no request.

Shapes: N rows, D model width, H heads that are rotated, W head width, X two intermediate widths.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from uld_kernels import layer

logger = logging.getLogger(__name__)

# Share of the largest value.
TOLERANCE = {torch.float32: 1e-5}
TOLERANCE_HALF = 0.02

Norm = Callable[[torch.Tensor], torch.Tensor]
Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(heads_NHW, cos_N1W, sin_N1W), in place; the sine of the first half negated."""


class RootMeanSquare:
    """x / sqrt(mean(x^2) + eps) * w in fp32, rounded once (arXiv 1910.07467). `weight` may have leading dimensions."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        width = weight.shape[-1]
        self.weight, self.eps = weight.detach().float().contiguous(), eps
        # sqrt(mean + eps) = hypot(|x|, sqrt(width * eps)) / sqrt(width): two operations less.
        self._weight = weight.detach().float() * width**0.5
        self._floor = torch.tensor((width * eps) ** 0.5, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float() if x.dtype != torch.float32 else x.clone()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).hypot_(self._floor)
        return wide.div_(norm).mul_(self._weight).to(x.dtype)


@dataclass(frozen=True, slots=True)
class LayerSteps:
    """`norm_of` and `rotate_of` make a layer's own step from its weights; `gate` is silu(gate) * up of rows in which
    both lie side by side."""

    norm_of: Callable[[RootMeanSquare], Norm]
    rotate_of: Callable[[RootMeanSquare | None], Rotate]
    gate: Callable[[torch.Tensor], torch.Tensor]


def _torch_rotation(head_norm: RootMeanSquare | None) -> Rotate:
    def rotate(heads_NHW: torch.Tensor, cos_N1W: torch.Tensor, sin_N1W: torch.Tensor) -> None:
        if head_norm is not None:
            heads_NHW.copy_(head_norm(heads_NHW))
        swapped_NHW = heads_NHW.roll(heads_NHW.shape[-1] // 2, dims=-1)
        heads_NHW.mul_(cos_N1W).addcmul_(swapped_NHW, sin_N1W)

    return rotate


def _torch_gate(gate_up_NX: torch.Tensor) -> torch.Tensor:
    width = gate_up_NX.shape[1] // 2
    return F.silu(gate_up_NX[:, :width]).mul_(gate_up_NX[:, width:])


def _kernel_norm(norm: RootMeanSquare) -> Norm:
    return partial(layer.rms_norm, weight_D=norm.weight, eps=norm.eps)


def _kernel_rotation(head_norm: RootMeanSquare | None) -> Rotate:
    weight_HW, eps = (None, 0.0) if head_norm is None else (head_norm.weight, head_norm.eps)

    def rotate(heads_NHW: torch.Tensor, cos_N1W: torch.Tensor, sin_N1W: torch.Tensor) -> None:
        layer.rotate(heads_NHW, cos_N1W[:, 0], sin_N1W[:, 0], weight_HW=weight_HW, eps=eps)

    return rotate


TORCH = LayerSteps(lambda norm: norm, _torch_rotation, _torch_gate)
KERNELS = LayerSteps(_kernel_norm, _kernel_rotation, layer.silu_mul)


def choose_steps(device: torch.device, dtype: torch.dtype) -> LayerSteps:
    """One launch a step on a GPU, where a trial gives what torch gives; a decode step of 32 layers is then 400 launches
    shorter. Torch's operations elsewhere: on a CPU a launch is a call, and its sums keep their order."""
    obstacle = _why_not(device, dtype)
    if obstacle is None:
        return KERNELS
    if device.type == "cuda":
        logger.warning("layers run in torch's operations between products: %s", obstacle)
    return TORCH


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"one launch a step needs a CUDA device, not {device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in layer.HALF_OR_SINGLE:
        return f"they take bfloat16, float16 and float32, not {dtype}"
    try:
        # In fp32 too: layers are compared with Hugging Face's in it.
        gap = max(
            _gap(device, tried) / TOLERANCE.get(tried, TOLERANCE_HALF) for tried in {dtype, torch.float32}
        )
    except (RuntimeError, ImportError) as error:
        logger.exception("a layer's steps do not run on %s", device)
        return f"a trial of one launch a step failed ({type(error).__name__})"
    return None if gap <= 1 else f"a trial of one launch a step was off by {gap:.1f} times what is allowed"


def _gap(device: torch.device, dtype: torch.dtype) -> float:
    """Between both on random rows, as a share of the largest value; inf for NaN."""
    outcomes = []
    for steps in (TORCH, KERNELS):
        generator = torch.Generator().manual_seed(0)
        joint_NHW = torch.randn(3, 6, 64, generator=generator).to(device, dtype)
        cos_N1W, sin_N1W = torch.randn(2, 3, 1, 64, generator=generator).to(device, dtype)
        weight_HW = torch.rand(4, 64, generator=generator).to(device)
        head_norm = RootMeanSquare(weight_HW, 1e-6)
        steps.rotate_of(None)(joint_NHW[:, :4], cos_N1W, sin_N1W)
        steps.rotate_of(head_norm)(joint_NHW[:, :4], cos_N1W, sin_N1W)
        rows_ND = joint_NHW.flatten(1)
        norm = RootMeanSquare(weight_HW.new_ones(rows_ND.shape[1]), 1e-6)
        outcomes += [rows_ND, steps.norm_of(norm)(rows_ND), steps.gate(rows_ND)]
    gaps = [
        float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
        for theirs, ours in zip(outcomes[:3], outcomes[3:], strict=True)
    ]
    return max(gap if gap == gap else float("inf") for gap in gaps)
