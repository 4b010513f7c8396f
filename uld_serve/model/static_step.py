"""One decode step with every shape and every index fixed beforehand, so that a device can record and replay it. Made
and filled by the engine's decode graphs; run like the decoder's own forward, whose layers it runs. Knows no request.

Every sequence has the same riders; one that needs fewer has rows that nobody reads. What differs from step to step is
data in buffers, which adapter a row carries too.

Shapes: P rows (one a sequence, padded), B blocks of a context (padded), N rows active in a span, R rows scored, W width
of the LM head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from uld_serve.model.beside import Beside
from uld_serve.model.decoder import Decoder
from uld_serve.model.geometry import Geometry, SequenceGroup
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.row_batch import NO_ADAPTER, AssistantRow, RowBatch, SequenceRows
from uld_serve.model.span import Caches, Contexts, Span, geometry, spans


@dataclass(frozen=True, slots=True)
class StaticShape:
    """What is fixed: two steps of one shape differ in data only. `riders`: fork and exit of every sequence's."""

    num_rows: int
    num_blocks: int
    riders: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Stage:
    """A span, with everything about it that comes from the host already on the device."""

    span: Span
    sources: torch.Tensor
    picks: torch.Tensor | None
    leaving: torch.Tensor | None
    seen: Geometry
    adapted: torch.Tensor
    adapted_seats: torch.Tensor


class StaticStep:
    """`forward` reads the buffers token_ids_P, positions_P, slots_P (the rows of rows_3P), blocks_PB and adapters_RP
    (bank slots by rider and row, NO_ADAPTER where nobody reads the row) and nothing else that changes.

    Its rows are the targets' and then, by rider, the assistants': `row_of` says where.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, shape: StaticShape) -> None:
        self.decoder, self.cache, self.shape = decoder, cache, shape
        device = decoder.base.device
        self.rows_3P = torch.zeros(3, shape.num_rows, dtype=torch.long, device=device)
        self.token_ids_P, self.positions_P, self.slots_P = self.rows_3P.unbind()
        self.blocks_PB = torch.zeros(shape.num_rows, shape.num_blocks, dtype=torch.long, device=device)
        self.adapters_RP = torch.full(
            (len(shape.riders), shape.num_rows), NO_ADAPTER, dtype=torch.long, device=device
        )
        self._beside = Beside(device) if device.type == "cuda" else None
        batch = self._template()
        contexts = Contexts(((tuple(range(shape.num_rows)), self.blocks_PB, True),))
        before: Span | None = None
        self._stages: list[_Stage] = []
        leaving: list[int] = []
        for span in spans(batch, len(decoder.layers)):
            self._stages.append(self._stage(batch, before, span, contexts))
            leaving += span.leaving()[0]
            before = span
        self._place = {assistant: shape.num_rows + at for at, assistant in enumerate(leaving)}

    def row_of(self, row: int, rider: int | None = None) -> int:
        """Row of `forward`'s result: a sequence's target, or one of its riders."""
        return row if rider is None else self._place[rider * self.shape.num_rows + row]

    @torch.inference_mode()
    def forward(self) -> torch.Tensor:
        """fp32 logits (R, W)"""
        decoder = self.decoder
        hidden_ND = decoder.embed(self.token_ids_P)
        tables = decoder._rotary_tables(hidden_ND, self.positions_P)
        left = []
        for stage in self._stages:
            if stage.picks is not None:
                hidden_ND = hidden_ND.index_select(0, stage.picks)
            hidden_ND = self._run_layers(hidden_ND, stage, tables)
            if stage.leaving is not None:
                left.append(hidden_ND.index_select(0, stage.leaving))
        scored_RD = torch.cat([hidden_ND[: self.shape.num_rows], *left])
        return decoder.head.logits(decoder.norm(scored_RD))

    def _run_layers(
        self,
        hidden_ND: torch.Tensor,
        stage: _Stage,
        tables: dict[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        decoder = self.decoder
        positions_N = self.positions_P.index_select(0, stage.sources)
        seated = {
            kind: (cos.index_select(1, stage.sources), sin.index_select(1, stage.sources))
            for kind, (cos, sin) in tables.items()
        }
        groups = tuple(_at(group, positions_N) for group in stage.seen.groups)
        seen = Geometry(stage.seen.writes, groups, decoder.attention.decode)
        slots_A = self.adapters_RP.view(-1).index_select(0, stage.adapted_seats)
        decoder.bank.rows.seat_on_device(stage.adapted, slots_A, beside=self._beside)
        try:
            for index in range(stage.span.first, stage.span.end):
                out = decoder.layers[index](
                    hidden_ND[None],
                    attention_mask=None,
                    position_ids=positions_N[None],
                    position_embeddings=seated[decoder.layer_types[index]],
                    geometry=seen,
                )
                hidden_ND = (out[0] if isinstance(out, tuple) else out)[0]
        finally:
            decoder.bank.rows.clear()
        return hidden_ND

    def _template(self) -> RowBatch:
        """A batch of this shape, whose tensors are the buffers."""
        num_rows = self.shape.num_rows
        assistants = [
            AssistantRow(row, fork, exit, NO_ADAPTER, "")
            for fork, exit in self.shape.riders
            for row in range(num_rows)
        ]
        # Contexts are given as a tensor, so no block is named here.
        sequences = tuple(SequenceRows(row, 1, ()) for row in range(num_rows))
        everyone = torch.arange(num_rows, device=self.token_ids_P.device)
        return RowBatch(
            self.token_ids_P, self.positions_P, self.slots_P, sequences, tuple(assistants), everyone
        )

    def _stage(self, batch: RowBatch, before: Span | None, span: Span, contexts: Contexts) -> _Stage:
        num_rows, device = self.shape.num_rows, self.token_ids_P.device
        sources = _indices([*range(num_rows), *span.sources], device)
        seated = zip(span.riders, span.starts, strict=True)
        seats = [(start, assistant) for rider, start in seated for assistant, _ in rider.scored]
        picks = None
        if span.riders != (() if before is None else before.riders):
            picks = _indices([*range(num_rows), *span.picks(before)], device)
        _, rows = span.leaving()
        return _Stage(
            span=span,
            sources=sources,
            picks=picks,
            leaving=_indices(rows, device) if rows else None,
            seen=geometry(batch, span, positions_N=sources, caches=Caches(self.cache), contexts=contexts),
            adapted=_indices([start for start, _ in seats], device),
            adapted_seats=_indices([assistant for _, assistant in seats], device),
        )


def _at(group: SequenceGroup, positions_N: torch.Tensor) -> SequenceGroup:
    """The same rows at these positions."""
    return SequenceGroup(
        cache=group.cache,
        first_layer=group.first_layer,
        rows_SQ=group.rows_SQ,
        positions_SQ=positions_N[group.rows_SQ],
        blocks_SB=group.blocks_SB,
        moves=group.moves,
        first=group.first,
        same_position=group.same_position,
    )


def _indices(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.long, device=device)
