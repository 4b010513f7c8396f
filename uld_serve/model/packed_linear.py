"""Linear layers whose weights are laid out once for the CPU's matrix kernels. Put in by the decoder at start; knows
only weights.

oneDNN otherwise reorders the weight on every call. Measured on 1 core of an AMD EPYC with AVX-512 BF16, 1536 x 576:
0.083 -> 0.044 ms at 1 row, 0.127 -> 0.086 at 8, 0.314 -> 0.270 at 32; the bf16 results are bit-equal.
"""

from __future__ import annotations

import torch
from torch import nn

# oneDNN picks a layout for about this many rows. In bf16 any hint gives the same; in fp32 a hint of 1 is slow at 8.
ROWS_HINT = 8
# oneDNN sums such a product in another order for one row than for more, so that a request alone would not get the
# very logits that it gets beside others. Two rows cost what one does.
DEEP = 1024


class PackedLinear(nn.Module):
    """y = x W^T + b with W in oneDNN's own layout. `weight` tells shape and dtype only; it holds no values."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.weight = torch.empty_like(weight_OI, device="meta")
        self.bias = bias_O
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), ROWS_HINT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_features >= DEEP and x.shape[-2] == 1:
            return self._product(torch.cat([x, x], dim=-2))[..., :1, :]
        return self._product(x)

    def added_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + x W^T + b, rounded once."""
        if self.in_features >= DEEP and x.shape[-2] == 1:
            x, residual = torch.cat([x, x], dim=-2), torch.cat([residual, residual], dim=-2)
            return self._sum(residual, x)[..., :1, :]
        return self._sum(residual, x)

    def _sum(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self._packed, self.bias, "add"
        )
        return y

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine's oneDNN takes packed weights of `dtype`."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack_linears(module: nn.Module) -> None:
    """Replace every linear layer below `module`. The unpacked weights are let go, so memory stays the same."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            bias = None if child.bias is None else child.bias.detach()
            setattr(module, name, PackedLinear(child.weight.detach(), bias))
        else:
            pack_linears(child)
