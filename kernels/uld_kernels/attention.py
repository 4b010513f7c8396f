"""Decode attention over a block table: what it computes in plain torch, and the choice of backend. Called by the
model's attention. Knows no request and no cache beyond the tensors that it is given.

Legend: N rows of queries, S sequences, Q rows of a sequence, H query heads, K key/value heads, D head width,
P slots of a pool, B blocks of a context, C tokens of a context, X rows of a sequence that share a key/value head."""

from __future__ import annotations

import torch

HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_WIDTH = 256


def decode_attention(
    query_NHD: torch.Tensor,
    keys_PKD: torch.Tensor,
    values_PKD: torch.Tensor,
    *,
    rows_SQ: torch.Tensor,
    blocks_SB: torch.Tensor,
    lengths_S: torch.Tensor,
    block_size: int,
    scale: float | None = None,
    window: int | None = None,
    out_NHD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of rows that all stand at the last position of their sequence; (N, H, D).

    rows_SQ     row of the query of each of a sequence's rows, a target and its assistants; negative: none.
                They are further query heads of one product, so keys and values are read once for all.
    blocks_SB   blocks of each context in order; slot b * block_size + i holds token i of block b. What lies
                past the end of a context is not read.
    lengths_S   tokens of each context, those of the rows themselves included. Longer than the table gives NaN.
    window      only the last `window` tokens count.
    out_NHD     rows that rows_SQ does not name are left as they are; without it they are 0.

    A row without context is 0. Products are summed in fp32. A row's bits hang on nothing beside it in the batch.
    Raises ValueError for shapes that do not fit; ids in the tables are not looked at, since that would wait for
    the device.
    """
    _check(query_NHD, keys_PKD, values_PKD, rows_SQ, blocks_SB, lengths_S, block_size, window)
    scale = query_NHD.shape[-1] ** -0.5 if scale is None else scale
    if out_NHD is None:
        out_NHD = torch.zeros_like(query_NHD, memory_format=torch.contiguous_format)
    if query_NHD.is_cuda and query_NHD.dtype in HALF_OR_SINGLE:
        # Imported where used: triton is not there on every machine that serves from the CPU.
        from uld_kernels import attention_triton

        run = attention_triton.decode_attention
    else:
        run = reference
    run(
        query_NHD,
        keys_PKD,
        values_PKD,
        rows_SQ=rows_SQ,
        blocks_SB=blocks_SB,
        lengths_S=lengths_S,
        block_size=block_size,
        scale=scale,
        window=window,
        out_NHD=out_NHD,
    )
    return out_NHD


def reference(
    query_NHD: torch.Tensor,
    keys_PKD: torch.Tensor,
    values_PKD: torch.Tensor,
    *,
    rows_SQ: torch.Tensor,
    blocks_SB: torch.Tensor,
    lengths_S: torch.Tensor,
    block_size: int,
    scale: float,
    window: int | None,
    out_NHD: torch.Tensor,
) -> None:
    """The definition, one sequence after the other: softmax(scale * q kᵀ) v. Waits for the device; fp32, or fp64
    for fp64 queries."""
    dtype = torch.promote_types(query_NHD.dtype, torch.float32)
    H, D = query_NHD.shape[1:]
    K, capacity = keys_PKD.shape[1], blocks_SB.shape[1] * block_size
    offsets = torch.arange(block_size, device=blocks_SB.device)
    for rows_Q, blocks_B, length in zip(rows_SQ, blocks_SB, lengths_S.tolist(), strict=True):
        rows = rows_Q[rows_Q >= 0]
        if length == 0 or length > capacity:
            out_NHD[rows] = 0 if length == 0 else torch.nan
            continue
        first = 0 if window is None else max(length - window, 0)
        slots_C = (blocks_B[:, None] * block_size + offsets).flatten()[first:length]
        keys_KCD = keys_PKD[slots_C].to(dtype).transpose(0, 1)
        values_KCD = values_PKD[slots_C].to(dtype).transpose(0, 1)
        query_KXD = query_NHD[rows].to(dtype).view(-1, K, H // K, D).transpose(0, 1).flatten(1, 2)
        weights_KXC = torch.softmax(query_KXD @ keys_KCD.transpose(1, 2) * scale, dim=-1)
        out_QHD = (weights_KXC @ values_KCD).view(K, -1, H // K, D).transpose(0, 1).reshape(-1, H, D)
        out_NHD[rows] = out_QHD.to(out_NHD.dtype)


def _check(
    query_NHD: torch.Tensor,
    keys_PKD: torch.Tensor,
    values_PKD: torch.Tensor,
    rows_SQ: torch.Tensor,
    blocks_SB: torch.Tensor,
    lengths_S: torch.Tensor,
    block_size: int,
    window: int | None,
) -> None:
    _, H, D = query_NHD.shape
    P, K, width = keys_PKD.shape
    if width != D or keys_PKD.shape != values_PKD.shape or H % K:
        raise ValueError(
            f"queries {tuple(query_NHD.shape)} do not fit keys {tuple(keys_PKD.shape)} and values "
            f"{tuple(values_PKD.shape)}"
        )
    if keys_PKD.dtype != query_NHD.dtype or values_PKD.dtype != query_NHD.dtype:
        raise ValueError(
            f"queries are {query_NHD.dtype}, keys {keys_PKD.dtype}, values {values_PKD.dtype}; one dtype"
        )
    if D > LARGEST_WIDTH:
        raise ValueError(f"heads of width {D}; up to {LARGEST_WIDTH} are taken")
    if not rows_SQ.shape[0] == blocks_SB.shape[0] == lengths_S.shape[0]:
        raise ValueError("rows_SQ, blocks_SB and lengths_S tell of different numbers of sequences")
    if block_size < 1 or P % block_size or (window is not None and window < 1):
        raise ValueError(
            f"block_size {block_size} of {P} slots, window {window}: both must be at least 1 and fit"
        )
    packed = (query_NHD.stride(2), keys_PKD.stride(2), rows_SQ.stride(-1), blocks_SB.stride(-1))
    if (
        set(packed) != {1}
        or keys_PKD.stride() != values_PKD.stride()
        or not (rows_SQ.is_contiguous() and blocks_SB.is_contiguous())
    ):
        raise ValueError("heads and tables must lie contiguous, keys and values alike")
