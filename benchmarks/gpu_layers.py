"""Checks the kernels of prompts' attention and of a layer's steps between its products, at a model's own sizes. Called
by gpu.py and gpu_sanitize.py; on a CPU the same calls run in plain torch.

Legend: S sequences, Q rows of each, N rows, H heads, K key/value heads, W head width, D model width, I inner width."""

from __future__ import annotations

import torch
from gpu_kernels import BLOCK_SIZE, Check, Shape, against_fp64
from uld_kernels import attention, layer

EPS = 1e-5
LENGTHS = (1, 17, 200)
ROWS = 37


def prefill_checks(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Check]:
    """Whole prompts, and the last rows of prompts; with a window too."""
    torch.manual_seed(0)
    return [_prefill(device, dtype, shape, last, window) for last in (None, 5) for window in (None, 64)]


def _prefill(
    device: torch.device, dtype: torch.dtype, shape: Shape, last: int | None, window: int | None
) -> Check:
    W = shape.hidden_size // shape.num_attention_heads
    num_rows = max(LENGTHS) if last is None else last
    positions_SQ = torch.full((len(LENGTHS), num_rows), -1, device=device)
    rows_SQ = torch.full_like(positions_SQ, -1)
    for sequence, length in enumerate(LENGTHS):
        count = min(length, num_rows)
        positions_SQ[sequence, :count] = torch.arange(length - count, length, device=device)
        rows_SQ[sequence, :count] = torch.arange(count, device=device) + sequence * num_rows
    blocks = -(-max(LENGTHS) // BLOCK_SIZE)
    blocks_SB = torch.randperm(len(LENGTHS) * blocks, device=device).view(len(LENGTHS), blocks)
    pool = (blocks_SB.numel() * BLOCK_SIZE, 2, shape.num_key_value_heads, W)
    pool_P2KW = torch.randn(pool, device=device, dtype=dtype)
    query_NHW = torch.randn(len(LENGTHS) * num_rows, shape.num_attention_heads, W, device=device, dtype=dtype)
    tables = {"rows_SQ": rows_SQ, "positions_SQ": positions_SQ, "blocks_SB": blocks_SB}
    ours_NHW = attention.prefill_attention(
        query_NHW, pool_P2KW[:, 0], pool_P2KW[:, 1], **tables, block_size=BLOCK_SIZE, window=window
    )
    exact_NHW = torch.zeros_like(query_NHW, dtype=torch.float64)
    attention.prefill_reference(
        query_NHW.double(), pool_P2KW[:, 0].double(), pool_P2KW[:, 1].double(), **tables,
        block_size=BLOCK_SIZE, scale=W**-0.5, window=window, out_NHD=exact_NHW,
    )  # fmt: skip
    which = "whole prompts" if last is None else f"the last {last} rows of prompts"
    return against_fp64(
        f"attention of {which}" + ("" if window is None else f", window {window}"), ours_NHW, exact_NHW
    )


def step_checks(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Check]:
    torch.manual_seed(0)
    D, H = shape.hidden_size, shape.num_attention_heads
    x_ND = torch.randn(ROWS, D, device=device, dtype=dtype)
    weight_D = torch.rand(D, device=device) + 0.5
    gate_up_NX = torch.randn(ROWS, 2 * shape.intermediate_size, device=device, dtype=dtype)
    heads_NHW = torch.randn(ROWS, H, D // H, device=device, dtype=dtype)
    angles_NW = torch.rand(ROWS, D // H, device=device)
    turned_NHW = heads_NHW.double()
    layer.rotate_reference(turned_NHW, angles_NW.double(), angles_NW.double(), weight_HW=None, eps=EPS)
    exact_ND = layer.rms_norm_reference(x_ND.double(), weight_D.double(), eps=EPS)
    layer.rotate(heads_NHW, angles_NW, angles_NW)  # in place, so last of all that read it
    return [
        against_fp64("rms_norm", layer.rms_norm(x_ND, weight_D, eps=EPS), exact_ND),
        against_fp64("silu_mul", layer.silu_mul(gate_up_NX), layer.silu_mul_reference(gate_up_NX.double())),
        against_fp64("rotate", heads_NHW, turned_NHW),
    ]
