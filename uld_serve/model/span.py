"""Runs of layers in which the same rows are active: who enters, where each row sits, what attention sees. Made by
the decoder from a RowBatch; knows no layer and no weights.

Shapes: T target rows, N rows active in the span (target rows first), S sequences, B blocks of the longest context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch

from uld_serve.model.geometry import QUERY_MULTIPLE, Geometry, SequenceGroup, Write
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.row_batch import NO_ADAPTER, OwnRows, RowBatch, SequenceRows


@dataclass(slots=True, eq=False)  # one a row and step: freezing costs as much as all else that makes it
class Rider:
    """Rows that enter together as copies of target rows [source, source + count). `scored`: which assistants of the
    batch they are, and at which of the rows. `lane` has the keys and values of their own, if they have any."""

    source: int
    count: int
    fork: int
    exit: int
    slot: int
    adapter_key: str
    scored: Sequence[tuple[int, int]]
    lane: OwnRows | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Layers [first, end) and the riders on them; `starts` is each rider's first row of N."""

    first: int
    end: int
    riders: tuple[Rider, ...]
    starts: tuple[int, ...]
    num_rows: int

    @property
    def sources(self) -> list[int]:
        """The target row that each row after the target's came from."""
        return [row for rider in self.riders for row in range(rider.source, rider.source + rider.count)]

    @property
    def slots(self) -> list[int]:
        return [slot for rider in self.riders for slot in (rider.slot,) * rider.count]

    def picks(self, before: Span | None) -> list[int]:
        """Rows of the span before that the rows after the target's are: themselves, or the copied target row."""
        seated = {} if before is None else dict(zip(map(id, before.riders), before.starts, strict=True))
        picked: list[int] = []
        for rider in self.riders:
            start = seated.get(id(rider), rider.source)
            picked += range(start, start + rider.count)
        return picked

    def leaving(self) -> tuple[list[int], list[int]]:
        """Assistants that leave after this span, and their rows in it."""
        pairs = [
            (assistant, start + offset)
            for rider, start in zip(self.riders, self.starts, strict=True)
            if rider.exit == self.end
            for assistant, offset in rider.scored
        ]
        return [assistant for assistant, _ in pairs], [row for _, row in pairs]


def spans(batch: RowBatch, num_layers: int) -> list[Span]:
    """The riders of each: those that borrow first, then those with keys and values of their own by fork, so that
    what one fork writes is one run of rows; in both, rows with one adapter side by side."""
    riders = _riders(batch)
    bounds = sorted({0, num_layers, *(r.fork for r in riders), *(r.exit for r in riders)})
    return [_span(batch.num_target_rows, first, end, riders) for first, end in pairwise(bounds)]


def _span(num_targets: int, first: int, end: int, riders: Sequence[Rider]) -> Span:
    active = tuple(rider for rider in riders if rider.fork <= first < rider.exit)
    starts = tuple(accumulate((rider.count for rider in active), initial=num_targets))
    return Span(first, end, active, starts[:-1], starts[-1])


def _riders(batch: RowBatch) -> list[Rider]:
    scored: dict[int, list[tuple[int, int]]] = {}
    borrowing = []
    for index, row in enumerate(batch.assistants):
        if row.lane is None:
            seat = ((index, 0),)
            borrowing.append(Rider(row.source, 1, row.fork, row.exit, row.slot, row.adapter_key, seat))
        else:
            at = row.source - batch.lanes[row.lane].start
            scored.setdefault(row.lane, []).append((index, at))
    borrowing.sort(key=lambda rider: rider.slot)
    own = [
        Rider(
            lane.start,
            lane.count,
            lane.fork,
            lane.exit,
            lane.slot,
            lane.adapter_key,
            scored.get(number, ()),
            lane,
        )
        for number, lane in enumerate(batch.lanes)
    ]
    own.sort(key=lambda rider: (rider.fork, rider.slot))
    return borrowing + own


@dataclass(frozen=True, slots=True)
class Contexts:
    """Which sequences' target lanes attend in one call, and their context's blocks; the same for every layer of a
    step. `joins_prompts`: all that prefill in one call, for a backend that can; else each in its own."""

    groups: tuple[tuple[tuple[int, ...], torch.Tensor, bool], ...]
    joins_prompts: bool = False

    @classmethod
    def of(
        cls, sequences: Sequence[SequenceRows | OwnRows], device: torch.device, *, joins_prompts: bool = False
    ) -> Contexts:
        decoding = tuple(i for i, sequence in enumerate(sequences) if sequence.count == 1)
        groups: list[tuple[tuple[int, ...], torch.Tensor, bool]] = []
        prompts = tuple(i for i, sequence in enumerate(sequences) if sequence.count > 1)
        if decoding:
            groups.append((decoding, _table([sequences[i].blocks for i in decoding], device), True))
        for members in [prompts] if joins_prompts and prompts else [(i,) for i in prompts]:
            groups.append((members, _table([sequences[i].blocks for i in members], device), False))
        return cls(tuple(groups), joins_prompts)


def _table(contexts: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Blocks of each, as one table (S, B)."""
    width = max(map(len, contexts))
    # Padding lies beyond every query's position, so it is masked. It repeats a block of the sequence's own: a weight of
    # 0 would not hide NaN in another's.
    padded = [[*blocks, *blocks[:1] * (width - len(blocks))] for blocks in map(list, contexts)]
    return torch.tensor(padded, device=device)


@dataclass(frozen=True, slots=True)
class Caches:
    """The target's keys and values, and those of assistants that keep their own: there the layer at which an
    assistant forks is layer 0."""

    target: KVCache
    own: KVCache | None = None


def geometry(
    batch: RowBatch, span: Span, *, positions_N: torch.Tensor, caches: Caches, contexts: Contexts
) -> Geometry:
    """Attention's view of the rows of `span`."""
    writes = [Write(caches.target, 0, 0, batch.num_target_rows, batch.slots_T)]
    groups = _target_groups(batch, span, positions_N, caches.target, contexts)
    seated = zip(span.riders, span.starts, strict=True)
    own = [(rider.lane, start) for rider, start in seated if rider.lane is not None]
    for fork, members in groupby(own, key=lambda pair: pair[0].fork):
        assert caches.own is not None, "rows with keys and values of their own, and no cache for them"
        lanes, starts = zip(*members, strict=True)
        slots = torch.tensor([slot for lane in lanes for slot in lane.slots], device=positions_N.device)
        writes.append(Write(caches.own, fork, starts[0], starts[0] + slots.shape[0], slots))
        seen = Contexts.of(lanes, positions_N.device, joins_prompts=contexts.joins_prompts)
        groups += _own_groups(lanes, starts, positions_N, caches.own, seen)
    return Geometry(tuple(writes), tuple(groups))


def _target_groups(
    batch: RowBatch, span: Span, positions_N: torch.Tensor, cache: KVCache, contexts: Contexts
) -> list[SequenceGroup]:
    """Every sequence's target rows, with those that borrow from it."""
    borrowing: dict[int, list[int]] = {}
    for rider, start in zip(span.riders, span.starts, strict=True):
        if rider.lane is None:
            borrowing.setdefault(rider.source, []).append(start)

    def rows_of(sequence: SequenceRows) -> list[int]:
        targets = range(sequence.start, sequence.start + sequence.count)
        if not borrowing:
            return list(targets)
        return [*targets, *(row for target in targets for row in borrowing.get(target, ()))]

    return [
        _grouped(
            [rows_of(batch.sequences[i]) for i in members],
            [batch.sequences[i].count for i in members],
            blocks_SB,
            positions_N,
            _Kind(cache, 0, is_decode, contexts.joins_prompts),
        )
        for members, blocks_SB, is_decode in contexts.groups
    ]


def _own_groups(
    lanes: Sequence[OwnRows],
    starts: Sequence[int],
    positions_N: torch.Tensor,
    cache: KVCache,
    contexts: Contexts,
) -> list[SequenceGroup]:
    return [
        _grouped(
            [list(range(starts[i], starts[i] + lanes[i].count)) for i in members],
            [lanes[i].count for i in members],
            blocks_SB,
            positions_N,
            _Kind(cache, lanes[0].fork, is_decode, contexts.joins_prompts),
        )
        for members, blocks_SB, is_decode in contexts.groups
    ]


@dataclass(frozen=True, slots=True)
class _Kind:
    cache: KVCache
    first_layer: int
    is_decode: bool
    joins_prompts: bool


def _grouped(
    rows: list[list[int]],
    counts: Sequence[int],
    blocks_SB: torch.Tensor,
    positions_N: torch.Tensor,
    kind: _Kind,
) -> SequenceGroup:
    """Rows of each sequence, filled up: with copies of its first, or, where a backend takes all prompts at once, with
    rows that are not there, so that nothing is computed for them."""
    width, joined = max(map(len, rows)), kind.joins_prompts and not kind.is_decode
    if not kind.is_decode and not joined:
        width = -(-width // QUERY_MULTIPLE) * QUERY_MULTIPLE
    padded = [own + ([-1] if joined else own[:1]) * (width - len(own)) for own in rows]
    rows_SQ = torch.tensor(padded, device=blocks_SB.device)
    return SequenceGroup(
        cache=kind.cache,
        first_layer=kind.first_layer,
        rows_SQ=rows_SQ,
        positions_SQ=positions_N[rows_SQ],
        blocks_SB=blocks_SB,
        moves=None if joined else _moves(rows, padded, blocks_SB.device),
        first=padded[0][0],
        same_position=kind.is_decode,
        num_targets=tuple(counts),
    )


def _moves(
    rows: list[list[int]], padded: list[list[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Where every real query is among the padded ones, and its row; None where that is in order."""
    width, flat = len(padded[0]), [row for own in padded for row in own]
    if flat == list(range(flat[0], flat[0] + len(flat))):
        return None
    source_P = [s * width + q for s, own in enumerate(rows) for q in range(len(own))]
    target_P = [row for own in rows for row in own]
    return torch.tensor(source_P, device=device), torch.tensor(target_P, device=device)


@dataclass(frozen=True, slots=True)
class AdapterSeats:
    """Rows from `start` on carry the adapters in `slots`, row by row; NO_ADAPTER where a row carries none."""

    start: int
    slots: list[int]

    @classmethod
    def of(cls, batch: RowBatch, span: Span) -> AdapterSeats:
        adapted = [rows for rows in batch.sequences if rows.slot != NO_ADAPTER]
        if not adapted:
            return cls(batch.num_target_rows, span.slots)
        start = adapted[0].start
        slots = [
            slot for rows in batch.sequences if rows.start >= start for slot in (rows.slot,) * rows.count
        ]
        return cls(start, slots + span.slots)
