"""Attention of prompts on torch's own flash attention, over the block table (torch 2.13 and later). One of the choices
of attention_backends. Knows no request.

A run is rows of one sequence at consecutive positions: a prompt's target rows, or one row of an assistant. To torch
each is a sequence of its own whose context ends at its last row, so it is causal as torch has it.

Shapes: S sequences of a group, Q query rows of a sequence (padded), R runs, N rows of the layer, P rows of the runs.
"""

from __future__ import annotations

import inspect
from itertools import accumulate

import torch

from uld_serve.model.geometry import Heads, SequenceGroup

PAGE_MULTIPLE = 256


def why_not_here(device: torch.device, dtype: torch.dtype, *, block_size: int, head_dim: int) -> str | None:
    """What keeps it from running, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device}"
    if not _takes_block_tables():
        return f"torch {torch.__version__} has no variable-length attention that takes block tables; 2.13 has"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if block_size % PAGE_MULTIPLE:
        return f"blocks must hold a multiple of {PAGE_MULTIPLE} tokens, not {block_size}"
    if head_dim > 256 or head_dim % 8:
        return f"heads must be a multiple of 8 and at most 256 wide, not {head_dim}"
    return None


def _takes_block_tables() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"block_table", "seqused_k", "num_splits"} <= set(inspect.signature(varlen_attn).parameters)


def varlen_prefill(
    layer: int, qkv_NX: torch.Tensor, group: SequenceGroup, heads: Heads, out_NX: torch.Tensor
) -> None:
    """Keys and values are handed over as they lie: a page's rows and heads have strides of their own."""
    from torch.nn.attention import varlen

    rows_P, starts_R1, lengths_R, ends_R1, blocks_RB = _runs(group)
    joint_NHD = qkv_NX.view(-1, heads.num_joint, heads.head_dim)
    keys_SHD, values_SHD = group.cache.views(layer - group.first_layer)
    page_shape = (-1, group.cache.block_size, *keys_SHD.shape[1:])
    found_PHD = varlen.varlen_attn(
        joint_NHD[:, : heads.num_heads].index_select(0, rows_P),
        keys_SHD.view(page_shape),
        values_SHD.view(page_shape),
        starts_R1,
        ends_R1,
        max(group.num_targets),
        blocks_RB.shape[1] * group.cache.block_size,
        scale=heads.scaling,
        # torch counts the tokens before a row's own.
        window_size=(-1 if heads.window is None else heads.window - 1, 0),
        enable_gqa=True,
        seqused_k=lengths_R,
        block_table=blocks_RB,
        # Two or more leave rows unwritten: pytorch issue 194167.
        num_splits=1,
    )
    assert isinstance(found_PHD, torch.Tensor)
    out_NX.index_copy_(0, rows_P, found_PHD.flatten(1))


def _runs(group: SequenceGroup) -> tuple[torch.Tensor, ...]:
    """Rows of all runs, where each run begins among them, its context's length, where that would end were contexts side
    by side, and its blocks; the tables in 32 bits, as torch wants them. Made once for all layers."""
    if "varlen" not in group.tables:
        device, Q = group.rows_SQ.device, group.rows_SQ.shape[1]
        is_real = group.rows_SQ.flatten() >= 0
        num_rows = is_real.view(-1, Q).sum(1).tolist()
        counts, sequences, last = [], [], []
        for s, (targets, rows) in enumerate(zip(group.num_targets, num_rows, strict=True)):
            counts += [targets] + [1] * (rows - targets)
            sequences += [s] * (1 + rows - targets)
            last += [s * Q + q for q in range(targets - 1, rows)]
        starts_R1 = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        lengths_R = (group.positions_SQ.flatten()[torch.tensor(last, device=device)] + 1).int()
        ends_R1 = torch.cat([lengths_R.new_zeros(1), lengths_R.cumsum(0, dtype=torch.int32)])
        blocks_RB = group.blocks_SB[torch.tensor(sequences, device=device)].int()
        rows_P = group.rows_SQ.flatten()[is_real]
        group.tables["varlen"] = rows_P, starts_R1, lengths_R, ends_R1, blocks_RB
    return group.tables["varlen"]
