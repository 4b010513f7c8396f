"""Attention of a widened batch over one block table. Hugging Face layers call `paged_attention` by name.

Some rows write their keys and values; every row then attends over the blocks of its own lane up to its own
position. Assistants that borrow attend over the target's blocks, and the keys and values that a layer computes for
them are dropped. Knows no request, profile or scheduler: `Geometry` says which row is where.

Shapes: N rows active in the layer, H query heads, K key/value heads, D head width, S sequences of a group, Q query
rows of a sequence (padded), C context slots (padded), B blocks of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from uld_serve.errors import ModelUnsupported
from uld_serve.model.geometry import QUERY_MULTIPLE, Geometry

ATTENTION_NAME = "uld_paged"


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
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    for write in geometry.writes:
        rows = slice(write.first, write.end)
        write.cache.write(
            layer - write.first_layer,
            write.slots_T,
            key[0, :, rows].transpose(0, 1),
            value[0, :, rows].transpose(0, 1),
        )
    query_NHD = query[0].transpose(0, 1)
    out_NHD = torch.empty_like(query_NHD, memory_format=torch.contiguous_format)
    for group in geometry.groups:
        keys_SKCD, values_SKCD = group.cache.gather(layer - group.first_layer, group.blocks_SB)
        mask = group.mask(sliding_window, num_slots=keys_SKCD.shape[2], dtype=query.dtype)
        attend = _attend_one_position if group.same_position else _attend
        out_XHD = attend(group.queries(query_NHD), keys_SKCD, values_SKCD, mask, scaling).flatten(0, 1)
        if group.moves is not None:
            source_P, target_P = group.moves
            out_NHD.index_copy_(0, target_P, out_XHD.index_select(0, source_P))
        elif group.num_queries == out_NHD.shape[0]:
            return out_XHD[None], None
        else:
            out_NHD[group.first : group.first + group.num_queries] = out_XHD
    return out_NHD[None], None


def _attend(
    query_SQHD: torch.Tensor,
    keys_SKCD: torch.Tensor,
    values_SKCD: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    out_SHQD = F.scaled_dot_product_attention(
        query_SQHD.transpose(1, 2), keys_SKCD, values_SKCD, attn_mask=mask, scale=scaling, enable_gqa=True
    )
    return out_SHQD.transpose(1, 2)


def _attend_one_position(
    query_SQHD: torch.Tensor,
    keys_SKCD: torch.Tensor,
    values_SKCD: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """All queries of a sequence share its position, so they join as more rows over each key/value head:
    keys and values are read once for the target and all its assistants."""
    num_kv_heads = keys_SKCD.shape[1]
    S, Q, H, D = query_SQHD.shape
    query_SKXD = query_SQHD.view(S, Q, num_kv_heads, H // num_kv_heads, D).transpose(1, 2).flatten(2, 3)
    num_rows = query_SKXD.shape[2]
    filled_SKXD = F.pad(query_SKXD, (0, 0, 0, -num_rows % QUERY_MULTIPLE))
    out_SKXD = F.scaled_dot_product_attention(
        filled_SKXD, keys_SKCD, values_SKCD, attn_mask=mask, scale=scaling
    )[:, :, :num_rows]
    return out_SKXD.reshape(S, num_kv_heads, Q, H // num_kv_heads, D).transpose(1, 2).reshape(S, Q, H, D)


def register() -> None:
    """Make `paged_attention` known to transformers under ATTENTION_NAME; harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
