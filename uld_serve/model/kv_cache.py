"""Keys and values of every layer, in blocks. Written and read by attention; knows no request and no owner.

Shapes: S slots (num_blocks * block_size), H key/value heads, Y = 2 H (keys of all heads, then values), D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVCache:
    """One pool of slots a layer. A block id names the same slots in every layer.

    Heads come first, so that a head's gathered context is one matrix: on a CPU, attention over 32 contexts of 304 slots
    takes 1.7 times as long where slots come first.
    """

    pools_YSD: tuple[torch.Tensor, ...]
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
        shape = (2 * num_kv_heads, num_blocks * block_size, head_dim)
        pools = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers))
        return cls(pools, block_size)

    @property
    def num_blocks(self) -> int:
        return self.pools_YSD[0].shape[1] // self.block_size

    @property
    def keys_SHD(self) -> tuple[torch.Tensor, ...]:
        """Views, by layer."""
        return tuple(pool_YSD[: len(pool_YSD) // 2].transpose(0, 1) for pool_YSD in self.pools_YSD)

    @property
    def values_SHD(self) -> tuple[torch.Tensor, ...]:
        """Views, by layer."""
        return tuple(pool_YSD[len(pool_YSD) // 2 :].transpose(0, 1) for pool_YSD in self.pools_YSD)

    def views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys and values, (S, H, D) each, for what reads the pools themselves."""
        keys_values_2HSD = self.pools_YSD[layer].unflatten(0, (2, -1))  # type: ignore[no-untyped-call]
        return keys_values_2HSD[0].transpose(0, 1), keys_values_2HSD[1].transpose(0, 1)

    @staticmethod
    def bytes_per_token(num_layers: int, *, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize

    def write(self, layer: int, slots_T: torch.Tensor, keys_values_TX: torch.Tensor) -> None:
        """Rows (T, 2 * H * D) in which a slot's keys and values lie side by side."""
        pool_YSD = self.pools_YSD[layer]
        Y, _, D = pool_YSD.shape
        pool_YSD.index_copy_(1, slots_T, keys_values_TX.view(-1, Y, D).transpose(0, 1))

    def clear(self, block_ids: Sequence[int]) -> None:
        """Zeros in these blocks, in every layer."""
        if not block_ids:
            return
        for pool_YSD in self.pools_YSD:
            blocks = pool_YSD.view(len(pool_YSD), -1, self.block_size, pool_YSD.shape[2])
            blocks[:, torch.tensor(block_ids, device=pool_YSD.device)] = 0

    def gather(self, layer: int, blocks_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of N sequences with B blocks each: two views (N, H, C, D), C = B * block_size."""
        # Whole blocks are copied by index_select, several times as fast as indexing slot by slot.
        pool_YSD = self.pools_YSD[layer]
        Y, _, D = pool_YSD.shape
        blocks = pool_YSD.view(Y, -1, self.block_size * D).index_select(1, blocks_NB.flatten())
        context_2NHCD = blocks.view(2, Y // 2, blocks_NB.shape[0], -1, D).transpose(1, 2)
        return context_2NHCD[0], context_2NHCD[1]
