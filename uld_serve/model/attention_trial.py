"""Small contexts on which an attention is tried before it is used: how far it is from the definition, and how long it
takes. Made by attention_backends at start. Knows no request.

Shapes: S sequences, Q query rows of a sequence (padded), N rows, H query heads, D head width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from uld_kernels.attention import prefill_reference, reference

from uld_serve.model.geometry import Attend, Heads, SequenceGroup
from uld_serve.model.kv_cache import KVCache

# Share of the largest value.
TOLERANCE = {torch.float32: 1e-4}
TOLERANCE_HALF = 0.02

NUM_KV_HEADS, NUM_HEADS = 2, 8
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Trial:
    """A group of sequences with random queries, keys and values in a pool of the engine's own layout."""

    group: SequenceGroup
    qkv_NX: torch.Tensor
    heads: Heads

    @classmethod
    def decode(cls, device: torch.device, dtype: torch.dtype, *, block_size: int, head_dim: int) -> Trial:
        """A target and an assistant a sequence; contexts of one token, of a block and one more, and of more than one
        chunk."""
        positions = [[0, 0], [block_size, block_size], [299, 299]]
        return cls._of(positions, (1, 1, 1), device, dtype, block_size, head_dim, is_decode=True)

    @classmethod
    def prefill(
        cls, device: torch.device, dtype: torch.dtype, *, block_size: int, head_dim: int, num_tokens: int = 40
    ) -> Trial:
        """A whole prompt with an assistant at its end, a chunk in mid-context with one before its end, and a prompt of
        two tokens."""
        chunk = range(block_size - 1, 2 * block_size + 30)
        positions = [[*range(num_tokens), num_tokens - 1], [*chunk, chunk[3]], [0, 1]]
        counts = (num_tokens, len(chunk), 2)
        return cls._of(positions, counts, device, dtype, block_size, head_dim, is_decode=False)

    @classmethod
    def _of(
        cls,
        positions: list[list[int]],
        num_targets: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        block_size: int,
        head_dim: int,
        *,
        is_decode: bool,
    ) -> Trial:
        generator = torch.Generator().manual_seed(0)
        num_blocks = max(map(max, positions)) // block_size + 1
        S, width = len(positions), max(map(len, positions))
        heads = Heads(NUM_HEADS, NUM_KV_HEADS, head_dim, None, None)
        cache = KVCache.allocate(
            1,
            S * num_blocks,
            block_size=block_size,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
        )
        pool_YSD = cache.pools_YSD[0]
        pool_YSD.copy_(torch.randn(pool_YSD.shape, generator=generator))
        first, rows = 0, []
        for own in positions:
            rows.append([*range(first, first + len(own)), *[-1] * (width - len(own))])
            first += len(own)
        padded = [[*own, *own[:1] * (width - len(own))] for own in positions]
        qkv_NX = torch.randn(first, heads.num_joint * head_dim, generator=generator)
        group = SequenceGroup(
            cache=cache,
            first_layer=0,
            rows_SQ=torch.tensor(rows, device=device),
            positions_SQ=torch.tensor(padded, device=device),
            blocks_SB=torch.randperm(S * num_blocks, generator=generator).view(S, -1).to(device),
            moves=None,
            first=0,
            same_position=is_decode,
            num_targets=num_targets,
        )
        return cls(group, qkv_NX.to(device, dtype), heads)

    def run(self, attend: Attend) -> torch.Tensor:
        """(N, H * D)"""
        out_NX = self.qkv_NX.new_zeros(self.qkv_NX.shape[0], self.heads.num_heads * self.heads.head_dim)
        attend(0, self.qkv_NX, self.group, self.heads, out_NX)
        return out_NX

    def exact(self) -> torch.Tensor:
        """The definition in fp32: (N, H * D)."""
        group, heads = self.group, self.heads
        joint_NHD = self.qkv_NX.float().view(-1, heads.num_joint, heads.head_dim)
        query_NHD = joint_NHD[:, : heads.num_heads]
        keys_SHD, values_SHD = (pool.float() for pool in group.cache.views(0))
        out_NHD = torch.zeros_like(query_NHD, memory_format=torch.contiguous_format)
        tables = {"rows_SQ": group.rows_SQ, "blocks_SB": group.blocks_SB, "out_NHD": out_NHD}
        size, scale = group.cache.block_size, heads.head_dim**-0.5
        if group.same_position:
            lengths_S = group.positions_SQ[:, 0] + 1
            reference(
                query_NHD,
                keys_SHD,
                values_SHD,
                lengths_S=lengths_S,
                block_size=size,
                scale=scale,
                window=None,
                **tables,
            )
        else:
            prefill_reference(
                query_NHD,
                keys_SHD,
                values_SHD,
                positions_SQ=group.positions_SQ,
                block_size=size,
                scale=scale,
                window=None,
                **tables,
            )
        return out_NHD.flatten(1)

    def gap(self, attend: Attend) -> float:
        """From the definition, as a share of the largest value."""
        exact_NX = self.exact()
        return float((self.run(attend).float() - exact_NX).abs().max() / exact_NX.abs().max())

    def obstacle(self, attend: Attend) -> str | None:
        """Why its outcome is not to be trusted, or None."""
        gap = self.gap(attend)
        if gap <= TOLERANCE.get(self.qkv_NX.dtype, TOLERANCE_HALF):
            return None
        return f"a trial of it was off by {gap:.1e} of the largest value"

    def seconds(self, attend: Attend) -> float:
        """The shortest of a few runs, after one that compiles."""
        times = []
        for _ in range(1 + REPEATS):
            started = time.perf_counter()
            self.run(attend)
            if self.qkv_NX.is_cuda:
                torch.cuda.synchronize(self.qkv_NX.device)
            times.append(time.perf_counter() - started)
        return min(times[1:])
