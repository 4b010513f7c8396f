"""Attention of a widened batch over one block table. Hugging Face layers call `paged_attention` by name.

Target rows write their keys and values; every row, target or assistant, then attends over the target's
blocks of its own sequence up to its own position (borrowed KV). Keys and values that a layer computes for
assistant rows are dropped. Knows no request, profile or scheduler: `Geometry` says which row is where.

Shapes: N rows active in the layer (target rows first), T target rows, H query heads, K key/value heads,
D head width, S sequences of a group, Q query rows of a sequence (padded), C context slots (padded), B blocks of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from uld_serve.errors import ModelUnsupported
from uld_serve.model.kv_cache import KVCache

ATTENTION_NAME = "uld_paged"
# The CPU's products sum rows in fours in one order and what is left over in another. Queries are filled up to a
# multiple, so that what a row gets depends neither on its neighbours nor on how its prompt was cut up.
QUERY_MULTIPLE = 4


@dataclass(slots=True)
class SequenceGroup:
    """Sequences that attend in one call: all that decode together, or one that prefills.

    rows_SQ: row of the layer's batch each query comes from (padding repeats a row).
    positions_SQ: the query's position. blocks_SB: cache blocks of each context, C = B * block_size positions.
    moves: flat (S*Q) index and row of every real query, to write results back; None where the queries are the
    layer's rows in order, so that nothing has to be moved.
    """

    rows_SQ: torch.Tensor
    positions_SQ: torch.Tensor
    blocks_SB: torch.Tensor
    moves: tuple[torch.Tensor, torch.Tensor] | None
    same_position: bool
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, *, num_slots: int, dtype: torch.dtype) -> torch.Tensor:
        """(S, 1, Q, C), added to scores: 0 where p - window < c <= p for a query at p, else -inf. Made once for
        all layers, in the queries' dtype: a bool mask would be turned into this in every layer."""
        if window not in self.masks:
            context_C = torch.arange(num_slots, device=self.blocks_SB.device)
            queries = self.positions_SQ[:, :1] if self.same_position else self.positions_SQ
            visible_SQC = context_C <= queries[..., None]
            if window is not None:
                visible_SQC &= context_C > queries[..., None] - window
            hidden_SQC = torch.zeros(visible_SQC.shape, dtype=dtype, device=context_C.device)
            self.masks[window] = hidden_SQC.masked_fill_(~visible_SQC, -inf)[:, None]
        return self.masks[window]

    def queries(self, query_NHD: torch.Tensor) -> torch.Tensor:
        """(S, Q, H, D)"""
        if self.moves is None:
            return query_NHD.view(*self.rows_SQ.shape, *query_NHD.shape[1:])
        return query_NHD.index_select(0, self.rows_SQ.flatten()).view(
            *self.rows_SQ.shape, *query_NHD.shape[1:]
        )


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
        keys_SKCD, values_SKCD = geometry.cache.gather(layer, group.blocks_SB)
        mask = group.mask(sliding_window, num_slots=keys_SKCD.shape[2], dtype=query.dtype)
        attend = _attend_one_position if group.same_position else _attend
        out_XHD = attend(group.queries(query_NHD), keys_SKCD, values_SKCD, mask, scaling).flatten(0, 1)
        if group.moves is None:
            return out_XHD[None], None
        source_P, target_P = group.moves
        out_NHD.index_copy_(0, target_P, out_XHD.index_select(0, source_P))
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
