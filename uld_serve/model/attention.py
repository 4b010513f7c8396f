"""Attention of a widened batch over block tables. Fused layers call `attend`; Hugging Face layers call
`paged_attention` by name.

Rows that keep keys and values write them; every row, target or assistant, then attends over the blocks of its lane up
to its own position. An assistant that borrows attends over the target's: keys and values that a layer computes for
it are dropped. Knows no request, profile or scheduler: `Geometry` says which row is where.

Shapes: N rows active in the layer, H query heads, K key/value heads, D head width, S sequences of a group, Q query rows
of a sequence (padded), X query rows over one key/value head (padded), C context slots (padded).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from uld_serve.errors import ModelUnsupported
from uld_serve.model.geometry import Geometry, Heads, SequenceGroup

ATTENTION_NAME = "uld_paged"


def attend(layer: int, qkv_NX: torch.Tensor, geometry: Geometry, heads: Heads) -> torch.Tensor:
    """Rows (N, (H + 2K) * D) of rotated queries, rotated keys and values -> (N, H * D)."""
    width = heads.num_heads * heads.head_dim
    for write in geometry.writes:
        joint_TX = qkv_NX[write.first : write.end, width:]
        write.cache.write(layer - write.first_layer, write.slots_T, joint_TX)
    if len(geometry.groups) == 1 and geometry.attention_of(geometry.groups[0]) is None:
        out_NX, _ = _attend_group(layer, qkv_NX, geometry.groups[0], heads)
        return out_NX
    out_NX = qkv_NX.new_empty(qkv_NX.shape[0], width)
    for group in geometry.groups:
        backend = geometry.attention_of(group)
        if backend is not None:
            backend(layer, qkv_NX, group, heads, out_NX)
            continue
        found_PX, target_P = _attend_group(layer, qkv_NX, group, heads)
        out_NX.index_copy_(0, target_P, found_PX)
    return out_NX


def _attend_group(
    layer: int, qkv_NX: torch.Tensor, group: SequenceGroup, heads: Heads
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the group's rows get (P, H * D), and which rows these are, in their order in the layer's batch."""
    keys_SKCD, values_SKCD = group.cache.gather(
        layer - group.first_layer, group.context_rows, num_contexts=group.blocks_SB.shape[0]
    )
    mask = group.mask(heads.window, num_slots=keys_SKCD.shape[2], dtype=qkv_NX.dtype)
    seats = group.seats(heads.num_heads, heads.num_kv_heads)
    query_XD = qkv_NX.view(-1, heads.head_dim).index_select(0, seats.take)
    # Queries at one position join as more rows over each key/value head, so that keys and values are read once for a
    # target and all its assistants.
    out = F.scaled_dot_product_attention(
        query_XD.view(*seats.shape, heads.head_dim),
        keys_SKCD,
        values_SKCD,
        attn_mask=mask,
        scale=heads.scaling,
        enable_gqa=not group.same_position,
    )
    out_XD = out.reshape(-1, heads.head_dim)
    out_PX = out_XD.index_select(0, seats.back).view(-1, heads.num_heads * heads.head_dim)
    return out_PX, seats.target_P


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - geometry says what a row may see
    *,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - 0 outside training
    sliding_window: int | None = None,
    softcap: float | None = None,
    geometry: Geometry | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """The attention function of transformers' AttentionInterface: query (1, H, N, D) -> (1, N, H, D).

    Raises ModelUnsupported for models that need what it does not compute (soft-capping, attention sinks).
    """
    if geometry is None:
        raise ModelUnsupported(f"{type(module).__name__} does not hand keyword arguments to its attention")
    if softcap is not None or getattr(module, "sinks", None) is not None:
        raise ModelUnsupported(f"{type(module).__name__} soft-caps or sinks its attention; not served")
    heads = Heads(query.shape[1], key.shape[1], query.shape[3], scaling, sliding_window)
    qkv_NX = torch.cat([query, key, value], dim=1)[0].transpose(0, 1).flatten(1)
    out_NX = attend(int(module.layer_idx), qkv_NX, geometry, heads)  # type: ignore[arg-type]
    return out_NX.view(1, -1, heads.num_heads, heads.head_dim), None


def register() -> None:
    """Make `paged_attention` known to transformers under ATTENTION_NAME; harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
