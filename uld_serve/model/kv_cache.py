"""Keys and values of every layer, in blocks. Written and read by attention; knows no request and no owner.

Shapes: S slots (num_blocks * block_size), H key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self.keys_SHD[layer].index_copy_(0, slots_T, keys_THD)
        self.values_SHD[layer].index_copy_(0, slots_T, values_THD)

    def clear(self, block_ids: Sequence[int]) -> None:
        """Zeros in these blocks, in every layer."""
        if not block_ids:
            return
        for pool_SHD in (*self.keys_SHD, *self.values_SHD):
            blocks = pool_SHD.view(-1, self.block_size, *pool_SHD.shape[1:])
            blocks[torch.tensor(block_ids, device=pool_SHD.device)] = 0

    def gather(self, layer: int, blocks_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of N sequences with B blocks each: two tensors (N, H, C, D), C = B * block_size."""
        return self._gather(self.keys_SHD[layer], blocks_NB), self._gather(self.values_SHD[layer], blocks_NB)

    def _gather(self, pool_SHD: torch.Tensor, blocks_NB: torch.Tensor) -> torch.Tensor:
        # Whole blocks are copied by index_select, seven times as fast as indexing slot by slot (32 x 304 slots).
        _, H, D = pool_SHD.shape
        rows = pool_SHD.view(-1, self.block_size * H * D).index_select(0, blocks_NB.flatten())
        return rows.view(blocks_NB.shape[0], -1, H, D).transpose(1, 2)
