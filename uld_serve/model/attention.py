"""Attention of a widened batch over one block table. Hugging Face layers call `paged_attention` by name.

Target rows write their keys and values; every row, target or assistant, then attends over the target's
blocks of its own sequence up to its own position (borrowed KV). Keys and values that a layer computes for
assistant rows are dropped. Knows no request, profile or scheduler: `Geometry` says which row is where.

Shapes: N rows active in the layer (target rows first), T target rows, H query heads, K key/value heads,
D head width, S sequences of a group, Q query rows of a sequence (padded), C context slots (padded).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from uld_serve.errors import ModelUnsupported
from uld_serve.model.kv_cache import KVCache

ATTENTION_NAME = "uld_paged"


@dataclass(slots=True)
class SequenceGroup:
    """Sequences that attend in one call: all that decode together, or one that prefills.

    rows_SQ: row of the layer's batch each query comes from (padding repeats a row).
    positions_SQ: the query's position. slots_SC: cache slot of each context position.
    source_P / target_P: flat (S*Q) index and row for every real query, to write results back.
    """

    rows_SQ: torch.Tensor
    positions_SQ: torch.Tensor
    slots_SC: torch.Tensor
    source_P: torch.Tensor
    target_P: torch.Tensor
    same_position: bool
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """(S, 1, Q, C) bool: context position c is visible to a query at p when p - window < c <= p."""
        if window not in self.masks:
            context_C = torch.arange(self.slots_SC.shape[1], device=self.slots_SC.device)
            queries = self.positions_SQ[:, :1] if self.same_position else self.positions_SQ
            visible_SQC = context_C <= queries[..., None]
            if window is not None:
                visible_SQC &= context_C > queries[..., None] - window
            self.masks[window] = visible_SQC[:, None]
        return self.masks[window]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the rows of one layer's batch write and look. The same for all layers between two forks or exits."""

    num_target_rows: int
    slots_T: torch.Tensor
    groups: tuple[SequenceGroup, ...]
    cache: KVCache


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
    num_targets = geometry.num_target_rows
    geometry.cache.write(
        layer,
        geometry.slots_T,
        key[0, :, :num_targets].transpose(0, 1),
        value[0, :, :num_targets].transpose(0, 1),
    )
    query_NHD = query[0].transpose(0, 1)
    out_NHD = torch.empty_like(query_NHD, memory_format=torch.contiguous_format)
    for group in geometry.groups:
        keys_SKCD, values_SKCD = geometry.cache.gather(layer, group.slots_SC)
        attend = _attend_one_position if group.same_position else _attend
        out_SQHD = attend(query_NHD, group, keys_SKCD, values_SKCD, group.mask(sliding_window), scaling)
        out_NHD[group.target_P] = out_SQHD.flatten(0, 1)[group.source_P]
    return out_NHD[None], None


def _attend(
    query_NHD: torch.Tensor,
    group: SequenceGroup,
    keys_SKCD: torch.Tensor,
    values_SKCD: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    query_SHQD = query_NHD[group.rows_SQ].transpose(1, 2)
    out_SHQD = F.scaled_dot_product_attention(
        query_SHQD, keys_SKCD, values_SKCD, attn_mask=mask, scale=scaling, enable_gqa=True
    )
    return out_SHQD.transpose(1, 2)


def _attend_one_position(
    query_NHD: torch.Tensor,
    group: SequenceGroup,
    keys_SKCD: torch.Tensor,
    values_SKCD: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """All queries of a sequence share its position, so they join as more rows over each key/value head:
    keys and values are read once for the target and all its assistants."""
    num_kv_heads = keys_SKCD.shape[1]
    query_SQHD = query_NHD[group.rows_SQ]
    S, Q, H, D = query_SQHD.shape
    query_SKXD = query_SQHD.view(S, Q, num_kv_heads, H // num_kv_heads, D).transpose(1, 2).flatten(2, 3)
    out_SKXD = F.scaled_dot_product_attention(
        query_SKXD, keys_SKCD, values_SKCD, attn_mask=mask, scale=scaling
    )
    return out_SKXD.view(S, num_kv_heads, Q, H // num_kv_heads, D).transpose(1, 2).reshape(S, Q, H, D)


def register() -> None:
    """Make `paged_attention` known to transformers under ATTENTION_NAME; harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
