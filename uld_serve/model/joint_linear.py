"""Linear layers over one input as one product, with the deltas of adapters on assistant rows. Made by the fused
layers; knows only weights and rows.

On a CPU each product saved is some 15 us at few rows, and a residual is added in the product itself.

Shapes: N rows, I input width, O output width of all parts together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from uld_serve.model.lora import LoraDelta
from uld_serve.model.lora_rows import LoraRows
from uld_serve.model.packed_linear import PackedLinear


class JointLinear:
    """y = x [W_1; W_2; …]^T + b, plus a residual, plus deltas."""

    def __init__(self, linears: Sequence[nn.Linear], rows: LoraRows, *, is_packed: bool) -> None:
        first = linears[0].weight
        self.sizes = [linear.out_features for linear in linears]
        weight_OI = torch.cat([linear.weight.detach() for linear in linears])
        bias_O = None
        if any(linear.bias is not None for linear in linears):
            biases = [
                first.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
                for linear in linears
            ]
            bias_O = torch.cat(biases)
        self.delta = LoraDelta(first.shape[1], self.sizes, rows, dtype=first.dtype, device=first.device)
        self._packed = PackedLinear(weight_OI, bias_O) if is_packed else None
        self._weight_OI = None if is_packed else weight_OI
        self._bias_O = bias_O

    def __call__(self, x_NI: torch.Tensor, residual_NO: torch.Tensor | None = None) -> torch.Tensor:
        return self.delta.product(x_NI, lambda: self._product(x_NI, residual_NO))

    def added_into(self, residual_NO: torch.Tensor, x_NI: torch.Tensor) -> torch.Tensor:
        """The same, where the residual is not needed any more: it may be overwritten, which saves copying it."""
        if self._weight_OI is None or self._bias_O is not None:
            return self(x_NI, residual_NO)
        weight_IO = self._weight_OI.T
        return self.delta.product(x_NI, lambda: residual_NO.addmm_(x_NI, weight_IO))

    def _product(self, x_NI: torch.Tensor, residual_NO: torch.Tensor | None) -> torch.Tensor:
        if self._packed is not None:
            return self._packed(x_NI) if residual_NO is None else self._packed.added_to(residual_NO, x_NI)
        assert self._weight_OI is not None
        if residual_NO is None:
            return F.linear(x_NI, self._weight_OI, self._bias_O)
        if self._bias_O is not None:
            residual_NO = residual_NO + self._bias_O
        return torch.addmm(residual_NO, x_NI, self._weight_OI.T)
