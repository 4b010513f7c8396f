"""Attention over a block table, of decode steps and of prompts: what it computes in plain torch, and the choice of
backend. Called by the model's attention. Knows no request and no cache beyond the tensors that it is given.

Legend: N rows of queries, S sequences, Q rows of a sequence, H query heads, K key/value heads, D head width,
P slots of a pool, B blocks of a context, C tokens of a context, X rows of a sequence that share a key/value head."""

from __future__ import annotations

from math import inf, nan

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

    A row without context is 0. Products are summed in fp32. On CUDA a row's bits hang on nothing beside it.
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
    """The definition: softmax(scale * q kᵀ) v over the tokens that a sequence sees. Gathers whole contexts; fp32, or
    fp64 for fp64 queries."""
    dtype = torch.promote_types(query_NHD.dtype, torch.float32)
    (S, Q), (N, H, D), K = rows_SQ.shape, query_NHD.shape, keys_PKD.shape[1]
    offsets = torch.arange(block_size, device=blocks_SB.device)
    slots_SC = (blocks_SB[..., None] * block_size + offsets).flatten(1)
    context_C, lengths_S1 = torch.arange(slots_SC.shape[1], device=slots_SC.device), lengths_S[:, None]
    is_seen_SC = context_C < lengths_S1
    if window is not None:
        is_seen_SC &= context_C >= lengths_S1 - window

    def seen_SKCD(pool_PKD: torch.Tensor) -> torch.Tensor:
        # Replaced, not multiplied by 0: what lies past the end may be NaN.
        found_SCKD = pool_PKD[slots_SC].to(dtype).masked_fill(~is_seen_SC[..., None, None], 0)
        return found_SCKD.transpose(1, 2)

    query_SQHD = query_NHD[rows_SQ.clamp_min(0)].to(dtype)
    query_SKXD = query_SQHD.view(S, Q, K, H // K, D).transpose(1, 2).flatten(2, 3)
    scores_SKXC = query_SKXD @ seen_SKCD(keys_PKD).transpose(2, 3) * scale
    scores_SKXC = scores_SKXC.masked_fill(~is_seen_SC[:, None, None], -inf)
    out_SKXD = torch.softmax(scores_SKXC, dim=-1) @ seen_SKCD(values_PKD)
    out_SQHD = out_SKXD.view(S, K, Q, H // K, D).transpose(1, 2).reshape(S, Q, H, D)
    out_SQHD = out_SQHD.masked_fill((lengths_S == 0)[:, None, None, None], 0)
    out_SQHD = out_SQHD.masked_fill((lengths_S > slots_SC.shape[1])[:, None, None, None], nan)
    # Rows that are not there are written to one that nobody sees.
    at_P = torch.where(rows_SQ < 0, N, rows_SQ).flatten().long()
    wide_NHD = torch.cat([out_NHD, out_NHD[:1]]).index_copy_(
        0, at_P, out_SQHD.flatten(0, 1).to(out_NHD.dtype)
    )
    out_NHD.copy_(wide_NHD[:N])


def prefill_attention(
    query_NHD: torch.Tensor,
    keys_PKD: torch.Tensor,
    values_PKD: torch.Tensor,
    *,
    rows_SQ: torch.Tensor,
    positions_SQ: torch.Tensor,
    blocks_SB: torch.Tensor,
    block_size: int,
    scale: float | None = None,
    window: int | None = None,
    out_NHD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of rows that stand anywhere in their sequence, each up to its own position; (N, H, D).

    rows_SQ       row of each of a sequence's queries, in any order; negative: none.
    positions_SQ  where it stands: it sees the tokens 0 to there, both included. Beyond the table gives NaN,
                  a negative position 0.
    blocks_SB     blocks of each context in order, as in decode_attention. What lies past a sequence's last position is
                  not read; a NaN before it may show in all of the sequence's rows.
    window        a row sees the last `window` tokens up to its position only.
    out_NHD       rows that rows_SQ does not name are left as they are; without it they are 0.

    A row may be named twice. Products are summed in fp32. On CUDA a row's bits hang on nothing beside it, nor on how
    a prompt is cut into chunks. Raises ValueError for shapes that do not fit; ids in the tables are not looked at.
    """
    _check(query_NHD, keys_PKD, values_PKD, rows_SQ, blocks_SB, rows_SQ[:, 0], block_size, window)
    if positions_SQ.shape != rows_SQ.shape or not positions_SQ.is_contiguous():
        raise ValueError(
            f"positions {tuple(positions_SQ.shape)} are not those of rows {tuple(rows_SQ.shape)}"
        )
    scale = query_NHD.shape[-1] ** -0.5 if scale is None else scale
    if out_NHD is None:
        out_NHD = torch.zeros_like(query_NHD, memory_format=torch.contiguous_format)
    if query_NHD.is_cuda and query_NHD.dtype in HALF_OR_SINGLE:
        from uld_kernels import prefill_triton

        run = prefill_triton.prefill_attention
    else:
        run = prefill_reference
    run(
        query_NHD,
        keys_PKD,
        values_PKD,
        rows_SQ=rows_SQ,
        positions_SQ=positions_SQ,
        blocks_SB=blocks_SB,
        block_size=block_size,
        scale=scale,
        window=window,
        out_NHD=out_NHD,
    )
    return out_NHD


def prefill_reference(
    query_NHD: torch.Tensor,
    keys_PKD: torch.Tensor,
    values_PKD: torch.Tensor,
    *,
    rows_SQ: torch.Tensor,
    positions_SQ: torch.Tensor,
    blocks_SB: torch.Tensor,
    block_size: int,
    scale: float,
    window: int | None,
    out_NHD: torch.Tensor,
) -> None:
    """The definition: softmax(scale * q kᵀ) v over the tokens that a row sees. Gathers contexts; fp32, or fp64 for
    fp64 queries."""
    dtype = torch.promote_types(query_NHD.dtype, torch.float32)
    H, K = query_NHD.shape[1], keys_PKD.shape[1]
    offsets = torch.arange(block_size, device=blocks_SB.device)
    for rows_Q, positions_Q, blocks_B in zip(rows_SQ, positions_SQ, blocks_SB, strict=True):
        slots_C = (blocks_B[:, None] * block_size + offsets).flatten()
        context_C = torch.arange(slots_C.shape[0], device=slots_C.device)
        is_row_Q = rows_Q >= 0
        rows_Q, positions_Q = rows_Q[is_row_Q].long(), positions_Q[is_row_Q, None]
        is_seen_QC = context_C <= positions_Q
        if window is not None:
            is_seen_QC &= context_C > positions_Q - window
        # Replaced, not multiplied by 0: what lies past the last row may be NaN.
        is_read_C1 = is_seen_QC.any(0)[:, None, None]
        keys_HCD, values_HCD = (
            torch.where(is_read_C1, pool_PKD[slots_C].to(dtype), 0)
            .repeat_interleave(H // K, 1)
            .transpose(0, 1)
            for pool_PKD in (keys_PKD, values_PKD)
        )
        scores_HQC = query_NHD[rows_Q].to(dtype).transpose(0, 1) @ keys_HCD.transpose(1, 2) * scale
        weights_HQC = torch.softmax(scores_HQC.masked_fill(~is_seen_QC, -inf), dim=-1)
        found_QHD = (weights_HQC @ values_HCD).transpose(0, 1)
        found_QHD = found_QHD.masked_fill((positions_Q < 0)[..., None], 0)
        found_QHD = found_QHD.masked_fill((positions_Q >= slots_C.shape[0])[..., None], nan)
        out_NHD.index_copy_(0, rows_Q, found_QHD.to(out_NHD.dtype))


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
