"""Keys and values of every layer, in blocks. Written and read by attention; knows no request and no owner.

Shapes: S slots (num_blocks * block_size), H key/value heads, Y = 2 H (keys of all heads, then values), D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Workspace:
    """Room for what is read at once and then overwritten: the C library gives back a block of megabytes when it is
    freed, and fills the next one with zeros, page by page."""

    _room: torch.Tensor | None = None

    def like(self, other: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
        """A tensor of this shape with anything in it; None on a GPU, whose allocator keeps what is freed."""
        if other.device.type != "cpu":
            return None
        size = math.prod(shape)
        if self._room is None or self._room.numel() < size:
            self._room = other.new_empty(size)
        return self._room[:size].view(shape)


@dataclass(frozen=True, slots=True)
class KVCache:
    """One pool of slots a layer. A block id names the same slots in every layer.

    Heads come first, so that a head's gathered context is one matrix: on a CPU, attention over 32 contexts of 304 slots
    takes 1.7 times as long where slots come first.
    """

    pools_YSD: tuple[torch.Tensor, ...]
    block_size: int
    _workspace: Workspace = field(default_factory=lambda: Workspace())

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
        return tuple(self.views(layer)[0] for layer in range(len(self.pools_YSD)))

    @property
    def values_SHD(self) -> tuple[torch.Tensor, ...]:
        """Views, by layer."""
        return tuple(self.views(layer)[1] for layer in range(len(self.pools_YSD)))

    def views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys and values, (S, H, D) each, for what reads the pools themselves."""
        keys_HSD, values_HSD = self.pools_YSD[layer].chunk(2)
        return keys_HSD.transpose(0, 1), values_HSD.transpose(0, 1)

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

    def rows_of(self, blocks_NB: torch.Tensor) -> torch.Tensor:
        """Of a pool seen as heads times blocks: these blocks of the first head, then of the second, and so on. The
        same for all layers of a step."""
        first_of_head = (
            torch.arange(len(self.pools_YSD[0]), device=blocks_NB.device)[:, None] * self.num_blocks
        )
        return (first_of_head + blocks_NB.flatten()).flatten()

    def gather(
        self, layer: int, rows: torch.Tensor, *, num_contexts: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the blocks that `rows` (of rows_of) stand for: two views (N, H, C, D) of N contexts with
        C slots each. On a CPU they hold until the next call."""
        # Whole blocks are copied by index_select, several times as fast as indexing slot by slot; along the first
        # dimension all threads take part.
        pool_YSD = self.pools_YSD[layer]
        Y, _, D = pool_YSD.shape
        out = self._workspace.like(pool_YSD, (len(rows), self.block_size * D))
        blocks = torch.index_select(pool_YSD.view(-1, self.block_size * D), 0, rows, out=out)
        context_2NHCD = blocks.view(2, Y // 2, num_contexts, -1, D).transpose(1, 2)
        return context_2NHCD[0], context_2NHCD[1]
