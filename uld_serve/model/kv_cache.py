"""Keys and values of every layer, in blocks. Written and read by attention; knows no request and no owner.

Shapes: S slots (num_blocks * block_size), H key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVCache:
    """One pool of slots a layer, a slot's key before its value. A block id names the same slots in every layer."""

    pools_S2HD: tuple[torch.Tensor, ...]
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
        shape = (num_blocks * block_size, 2, num_kv_heads, head_dim)
        pools = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers))
        return cls(pools, block_size)

    @property
    def num_blocks(self) -> int:
        return self.pools_S2HD[0].shape[0] // self.block_size

    @property
    def keys_SHD(self) -> tuple[torch.Tensor, ...]:
        """Views, by layer."""
        return tuple(pool_S2HD[:, 0] for pool_S2HD in self.pools_S2HD)

    @property
    def values_SHD(self) -> tuple[torch.Tensor, ...]:
        """Views, by layer."""
        return tuple(pool_S2HD[:, 1] for pool_S2HD in self.pools_S2HD)

    @staticmethod
    def bytes_per_token(num_layers: int, *, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize

    def write(
        self, layer: int, slots_T: torch.Tensor, keys_THD: torch.Tensor, values_THD: torch.Tensor
    ) -> None:
        pool_S2HD = self.pools_S2HD[layer]
        pool_S2HD[:, 0].index_copy_(0, slots_T, keys_THD)
        pool_S2HD[:, 1].index_copy_(0, slots_T, values_THD)

    def write_joint(self, layer: int, slots_T: torch.Tensor, keys_values_TX: torch.Tensor) -> None:
        """`write` of rows (T, 2 * H * D) in which a slot's key and value already lie side by side."""
        pool_S2HD = self.pools_S2HD[layer]
        pool_S2HD.view(pool_S2HD.shape[0], -1).index_copy_(0, slots_T, keys_values_TX)

    def clear(self, block_ids: Sequence[int]) -> None:
        """Zeros in these blocks, in every layer."""
        if not block_ids:
            return
        for pool_S2HD in self.pools_S2HD:
            blocks = pool_S2HD.view(-1, self.block_size, *pool_S2HD.shape[1:])
            blocks[torch.tensor(block_ids, device=pool_S2HD.device)] = 0

    def gather(self, layer: int, blocks_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of N sequences with B blocks each: two views (N, H, C, D), C = B * block_size."""
        # Whole blocks are copied by index_select, seven times as fast as indexing slot by slot (32 x 304 slots).
        pool_S2HD = self.pools_S2HD[layer]
        _, _, H, D = pool_S2HD.shape
        rows = pool_S2HD.view(-1, self.block_size * 2 * H * D).index_select(0, blocks_NB.flatten())
        context_N2HCD = rows.view(blocks_NB.shape[0], -1, 2, H, D).permute(0, 2, 3, 1, 4)
        return context_N2HCD[:, 0], context_N2HCD[:, 1]
