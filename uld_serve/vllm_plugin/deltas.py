"""Low-rank deltas on blocks of rows, where linear layers are joined as vLLM joins them. Made by blocks. Knows no
profile and no vLLM.

Shapes: T rows of one block, I input width, O output width of the joined layer, X ranks of its parts side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from uld_serve.profiles.adapter import LoraAdapter

# vLLM's name in a layer -> the linear layers that it joins, in the order of their outputs.
JOINED: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


@dataclass(frozen=True, slots=True)
class Part:
    """Ranks [low, high) of a block's A go to outputs [first, end)."""

    block: int
    low: int
    high: int
    first: int
    end: int


class BlockDeltas(nn.Module):
    """y[block] += scaling * B (A x[block]), for blocks of equally many rows, arXiv 2106.09685 Eq. 3.

    Computed in fp32 on a CPU, as in our own engine, and in the model's type elsewhere. All tensors are buffers that no
    checkpoint has: vLLM counts the parameters that it has loaded.
    """

    def __init__(
        self,
        adapters: Mapping[int, LoraAdapter],
        layer: int,
        modules: Sequence[str],
        sizes: Sequence[int],
        *,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.dtype = torch.float32 if device.type == "cpu" else dtype
        self.parts: list[Part] = []
        for block, adapter in adapters.items():
            self._put(block, adapter, layer, modules, sizes, device)

    def _put(
        self,
        block: int,
        adapter: LoraAdapter,
        layer: int,
        modules: Sequence[str],
        sizes: Sequence[int],
        device: torch.device,
    ) -> None:
        factors: list[torch.Tensor] = []
        first, rank = 0, adapter.rank
        for module, size in zip(modules, sizes, strict=True):
            A_rI = adapter.tensors.get(f"layers.{layer}.{module}.lora_A")
            if A_rI is not None:
                B_Or = adapter.tensors[f"layers.{layer}.{module}.lora_B"].float() * adapter.scaling
                low = len(factors) * rank
                self.parts.append(Part(block, low, low + rank, first, first + size))
                self._keep(f"B_{block}_{first}", B_Or.T, device)
                factors.append(A_rI.float())
            first += size
        if factors:
            self._keep(f"A_{block}", torch.cat(factors).T, device)

    def _keep(self, name: str, tensor: torch.Tensor, device: torch.device) -> None:
        self.register_buffer(name, tensor.to(device, self.dtype).contiguous(), persistent=False)

    def forward(self, y_NO: torch.Tensor, x_NI: torch.Tensor) -> torch.Tensor:
        """In place."""
        y_GTO = y_NO.view(self.num_blocks, -1, y_NO.shape[1])
        x_GTI = x_NI.view(self.num_blocks, -1, x_NI.shape[1])
        shrunk = {
            block: x_GTI[block].to(self.dtype) @ self.get_buffer(f"A_{block}")
            for block in sorted({part.block for part in self.parts})
        }
        for part in self.parts:
            B_XO = self.get_buffer(f"B_{part.block}_{part.first}")
            delta_TO = shrunk[part.block][:, part.low : part.high] @ B_XO
            y_GTO[part.block, :, part.first : part.end].add_(delta_TO)
        return y_NO
