"""A stand-in for torch.nn.attention.varlen.varlen_attn with a block table: refuses what the CUDA kernel refuses and
computes what its documentation says, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class StandIn:
    """What it was last called with, and how often."""

    num_calls: int = 0
    key_pointer: int = 0
    cu_seq_q: list[int] = field(default_factory=list)
    seqused_k: list[int] = field(default_factory=list)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        num_splits: int | None = None,
    ) -> torch.Tensor:
        assert seqused_k is not None
        assert block_table is not None
        assert cu_seq_k is not None
        (T, H, D), (_, page, K, _) = query.shape, key.shape
        assert key.shape == value.shape
        assert key.shape[3] == D
        assert page % 256 == 0
        assert enable_gqa or H == K
        assert query.stride(2) == key.stride(3) == value.stride(3) == block_table.stride(1) == 1
        tables = (cu_seq_q, cu_seq_k, seqused_k, block_table)
        assert {table.dtype for table in tables} == {torch.int32}
        runs = len(seqused_k)
        assert cu_seq_q.shape == cu_seq_k.shape == (runs + 1,)
        assert block_table.shape[0] == runs
        assert int(cu_seq_q[-1]) == T
        assert int(cu_seq_q.diff().max()) <= max_q
        assert int(seqused_k.max()) <= max_k == block_table.shape[1] * page
        assert window_size[1] == 0
        assert num_splits == 1
        self.num_calls += 1
        self.key_pointer = key.data_ptr()
        self.cu_seq_q, self.seqused_k = cu_seq_q.tolist(), seqused_k.tolist()
        out = torch.full_like(query, torch.nan)
        for run, length in enumerate(self.seqused_k):
            first, end = self.cu_seq_q[run : run + 2]
            keys, values = (
                pool[block_table[run].long()]
                .flatten(0, 1)[:length]
                .repeat_interleave(H // K, 1)
                .transpose(0, 1)
                for pool in (key, value)
            )
            # The last query stands at the context's last token.
            at, context = torch.arange(length - (end - first), length)[:, None], torch.arange(length)
            hidden = context > at
            if window_size[0] >= 0:
                hidden |= context < at - window_size[0]
            scores = query[first:end].transpose(0, 1) @ keys.transpose(1, 2) * (scale or D**-0.5)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[first:end] = (weights @ values).transpose(0, 1)
        return out
