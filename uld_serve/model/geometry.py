"""Where the rows of one layer's batch write keys and values, and where they look. Built by row_batch, read by
attention. Knows no request, profile or model.

A lane is rows that write to one cache and read from one block table: a sequence's target rows with the assistants
that borrow from it, or the rows of one assistant with keys and values of its own.

Shapes: N rows active in the layer, T rows of a write, S sequences of a group, Q query rows of a sequence (padded),
C context slots (padded), B blocks of them, H query heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import torch

from uld_serve.model.kv_cache import KVCache

# The CPU's products sum rows in fours in one order and what is left over in another. Queries are filled up to a
# multiple, so that what a row gets depends neither on its neighbours nor on how its prompt was cut up.
QUERY_MULTIPLE = 4


@dataclass(frozen=True, slots=True)
class Seats:
    """Where a group's queries come from and go to, head by head. `take`: heads of the layer's rows (query, key and
    value side by side) that fill a query of `shape`: (S, K, X) where queries join over each key/value head, else
    (S, H, Q).
    `back`: of the result, in the same shape, the heads of the rows target_P."""

    shape: tuple[int, int, int]
    take: torch.Tensor
    back: torch.Tensor
    target_P: torch.Tensor


@dataclass(slots=True)
class SequenceGroup:
    """Lanes of one cache that attend in one call: all that decode together, and one that prefills, or all that do.

    `cache` holds the model's layer `first_layer` as its layer 0. rows_SQ: row of the layer's batch each query comes
    from; padding repeats a row, or is negative where all that prefill are one group. positions_SQ: each query's own.
    blocks_SB: cache blocks of each context, C = B * block_size positions. moves: flat (S*Q) index and row of every real
    query, to write results back; None where the queries are the S*Q rows from `first` on, in order, so that nothing has
    to be moved. num_targets: how many of each sequence's queries, its first, stand at consecutive positions; what
    follows stands anywhere before. tables: what a backend makes of these once for all layers, by its name.
    """

    cache: KVCache
    first_layer: int
    rows_SQ: torch.Tensor
    positions_SQ: torch.Tensor
    blocks_SB: torch.Tensor
    moves: tuple[torch.Tensor, torch.Tensor] | None
    first: int
    same_position: bool
    num_targets: tuple[int, ...] = ()
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _seats: dict[tuple[int, int], Seats] = field(default_factory=dict)
    tables: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    _context_rows: torch.Tensor | None = None

    @property
    def context_rows(self) -> torch.Tensor:
        """KVCache.rows_of the blocks, made once for all layers. A group is made anew for every step, recorded ones
        too: a table of blocks that is written again must be looked at again."""
        if self._context_rows is None:
            self._context_rows = self.cache.rows_of(self.blocks_SB)
        return self._context_rows

    @property
    def num_queries(self) -> int:
        """S * Q, padding included."""
        return self.rows_SQ.numel()

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

    def seats(self, num_heads: int, num_kv_heads: int) -> Seats:
        """Made once for all layers."""
        key = (num_heads, num_kv_heads)
        if key not in self._seats:
            self._seats[key] = self._joined(*key) if self.same_position else self._apart(*key)
        return self._seats[key]

    def _joined(self, num_heads: int, num_kv_heads: int) -> Seats:
        """Queries of one sequence and one key/value head side by side, filled up with copies of the first."""
        S, Q = self.rows_SQ.shape
        G = num_heads // num_kv_heads
        X = -(-Q * G // QUERY_MULTIPLE) * QUERY_MULTIPLE
        device = self.rows_SQ.device
        heads_KG = torch.arange(num_heads, device=device).view(num_kv_heads, G)
        first_SQ = self.rows_SQ * (num_heads + 2 * num_kv_heads)
        own_SKQG = first_SQ[:, None, :, None] + heads_KG[None, :, None, :]
        own_SKX = own_SKQG.flatten(2)
        take_SKX = torch.cat([own_SKX, own_SKX[..., :1].expand(-1, -1, X - Q * G)], dim=-1)
        source_P, target_P = self._moves()
        sequence_P, query_P = source_P // Q, source_P % Q
        head_H = torch.arange(num_heads, device=device)
        column_PH = query_P[:, None] * G + head_H % G
        back_PH = (sequence_P[:, None] * num_kv_heads + head_H // G) * X + column_PH
        return Seats((S, num_kv_heads, X), take_SKX.flatten(), back_PH.flatten(), target_P)

    def _apart(self, num_heads: int, num_kv_heads: int) -> Seats:
        S, Q = self.rows_SQ.shape
        head_H = torch.arange(num_heads, device=self.rows_SQ.device)
        first_SQ = self.rows_SQ * (num_heads + 2 * num_kv_heads)
        take_SHQ = first_SQ[:, None, :] + head_H[None, :, None]
        source_P, target_P = self._moves()
        sequence_P, query_P = source_P // Q, source_P % Q
        back_PH = (sequence_P[:, None] * num_heads + head_H) * Q + query_P[:, None]
        return Seats((S, num_heads, Q), take_SHQ.flatten(), back_PH.flatten(), target_P)

    def _moves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Index among the S*Q queries, and row of the layer's batch, of every real query, by row."""
        if self.moves is None:
            in_order = torch.arange(self.num_queries, device=self.rows_SQ.device)
            return in_order, in_order + self.first
        source_P, target_P = self.moves
        by_row = torch.argsort(target_P)
        return source_P[by_row], target_P[by_row]


@dataclass(frozen=True, slots=True)
class Heads:
    """A layer's attention. `scaling` None is 1 / sqrt(head_dim); a query sees `window` positions back, or all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float | None
    window: int | None

    @property
    def num_joint(self) -> int:
        """Heads of a row with its query, key and value side by side."""
        return self.num_heads + 2 * self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Write:
    """Rows [first, end) write their keys and values to slots_T of `cache`, which holds the model's layer
    `first_layer` as its layer 0. Rows in no write keep none: theirs are dropped."""

    cache: KVCache
    first_layer: int
    first: int
    end: int
    slots_T: torch.Tensor


Attend = Callable[[int, torch.Tensor, SequenceGroup, Heads, torch.Tensor], None]
"""(layer, qkv_NX, group, heads, out_NX): writes what a group gets into its rows of out_NX."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Writes come before reads. Every row is in exactly one group. The same for all layers between two forks or
    exits. `decode` serves groups at one position, `prefill` the others, where it is not torch's own attention."""

    writes: tuple[Write, ...]
    groups: tuple[SequenceGroup, ...]
    decode: Attend | None = None
    prefill: Attend | None = None

    def attention_of(self, group: SequenceGroup) -> Attend | None:
        return self.decode if group.same_position else self.prefill
