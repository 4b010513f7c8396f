"""Keys and values of every layer, in blocks. Written and read by attention; knows no request and no owner.

Shapes: S slots (num_blocks * block_size), H key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVCache:
    """One pool of slots a layer. A block id names the same slots in every layer."""

    keys_SHD: tuple[torch.Tensor, ...]
    values_SHD: tuple[torch.Tensor, ...]
    block_size: int

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        num_blocks: int,
        *,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        shape = (num_blocks * block_size, num_kv_heads, head_dim)

        def pool() -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        layers = range(num_layers)
        return cls(tuple(pool() for _ in layers), tuple(pool() for _ in layers), block_size)

    @property
    def num_blocks(self) -> int:
        return self.keys_SHD[0].shape[0] // self.block_size

    @staticmethod
    def bytes_per_token(num_layers: int, *, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize

    def write(
        self, layer: int, slots_T: torch.Tensor, keys_THD: torch.Tensor, values_THD: torch.Tensor
    ) -> None:
        self.keys_SHD[layer][slots_T] = keys_THD
        self.values_SHD[layer][slots_T] = values_THD

    def gather(self, layer: int, slots_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of N sequences with C context slots each: two tensors (N, H, C, D)."""
        keys_NHCD = self.keys_SHD[layer][slots_NC].transpose(1, 2)
        values_NHCD = self.values_SHD[layer][slots_NC].transpose(1, 2)
        return keys_NHCD, values_NHCD
