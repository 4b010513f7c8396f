"""The LM head, in fp32 whatever the base's dtype. Called by the decoder; knows only hidden rows.

Logits rounded to bf16 change which tokens survive the filter on 22 % of rows and flip the argmax on 1 to 3 %
(measured on SmolLM2-135M), so the product is kept in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from uld_kernels import LateRows

from uld_serve.model.packed_linear import PackedLinear


@dataclass(frozen=True, slots=True)
class Scores:
    """One step's scores: fp32 logits (R, W), and further rows whose logits are computed where they are needed."""

    logits_RW: torch.Tensor
    late: LateRows | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """`logits` maps hidden rows (R, D) of the base's dtype to fp32 (R, W); `late` puts the same product off."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    weight_WD: torch.Tensor
    bias_W: torch.Tensor | None

    def late(self, hidden_AD: torch.Tensor) -> LateRows:
        return LateRows(hidden_AD, self.weight_WD, self.bias_W)

    @classmethod
    def of(cls, head: nn.Linear, *, is_packed: bool) -> Head:
        bias_W = None if head.bias is None else head.bias.detach().float()
        return cls.of_weight(head.weight.detach(), bias_W, is_packed=is_packed)

    @classmethod
    def of_weight(cls, weight_WD: torch.Tensor, bias_W: torch.Tensor | None, *, is_packed: bool) -> Head:
        """`bias_W` in fp32."""
        if weight_WD.is_cuda and weight_WD.dtype != torch.float32:
            return cls(lambda hidden_RD: _mixed_product(hidden_RD, weight_WD, bias_W), weight_WD, bias_W)
        fp32_WD = weight_WD.float()
        if is_packed:
            packed = PackedLinear(fp32_WD, bias_W)
            return cls(lambda hidden_RD: packed.forward(hidden_RD.float()), weight_WD, bias_W)
        return cls(lambda hidden_RD: F.linear(hidden_RD.float(), fp32_WD, bias_W), weight_WD, bias_W)


def _mixed_product(
    hidden_RD: torch.Tensor, weight_WD: torch.Tensor, bias_W: torch.Tensor | None
) -> torch.Tensor:
    """Half-precision factors, fp32 sums and result, in one product (CUDA only)."""
    logits_RW = torch.mm(hidden_RD, weight_WD.T, out_dtype=torch.float32)
    return logits_RW if bias_W is None else logits_RW + bias_W
