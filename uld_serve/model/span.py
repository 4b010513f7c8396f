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
    step."""

    groups: tuple[tuple[tuple[int, ...], torch.Tensor, bool], ...]

    @classmethod
    def of(cls, sequences: Sequence[SequenceRows | OwnRows], device: torch.device) -> Contexts:
        decoding = tuple(i for i, sequence in enumerate(sequences) if sequence.count == 1)
        groups: list[tuple[tuple[int, ...], torch.Tensor, bool]] = []
        if decoding:
            width = max(len(sequences[i].blocks) for i in decoding)
            # Padding lies beyond every query's position, so it is masked. It repeats a block of the sequence's own:
            # a weight of 0 would not hide NaN in another's.
            own = [list(sequences[i].blocks) for i in decoding]
            padded = [blocks + blocks[:1] * (width - len(blocks)) for blocks in own]
            groups.append((decoding, torch.tensor(padded, device=device), True))
        for i, sequence in enumerate(sequences):
            if sequence.count > 1:
                groups.append(((i,), torch.tensor([list(sequence.blocks)], device=device), False))
        return cls(tuple(groups))


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
        groups += _own_groups(lanes, starts, positions_N, caches.own)
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
        _group([rows_of(batch.sequences[i]) for i in members], blocks_SB, is_decode, positions_N, cache, 0)
        for members, blocks_SB, is_decode in contexts.groups
    ]


def _own_groups(
    lanes: Sequence[OwnRows], starts: Sequence[int], positions_N: torch.Tensor, cache: KVCache
) -> list[SequenceGroup]:
    groups = []
    for members, blocks_SB, is_decode in Contexts.of(lanes, positions_N.device).groups:
        rows = [list(range(starts[i], starts[i] + lanes[i].count)) for i in members]
        groups.append(_group(rows, blocks_SB, is_decode, positions_N, cache, lanes[0].fork))
    return groups


def _group(
    rows: list[list[int]],
    blocks_SB: torch.Tensor,
    is_decode: bool,
    positions_N: torch.Tensor,
    cache: KVCache,
    first_layer: int,
) -> SequenceGroup:
    device = blocks_SB.device
    width = max(len(own) for own in rows)
    if not is_decode:
        width = -(-width // QUERY_MULTIPLE) * QUERY_MULTIPLE
    padded = [own + own[:1] * (width - len(own)) for own in rows]
    rows_SQ = torch.tensor(padded, device=device)
    flat = [row for own in padded for row in own]
    moves = None
    if flat != list(range(flat[0], flat[0] + len(flat))):
        source_P = [s * width + q for s, own in enumerate(rows) for q in range(len(own))]
        target_P = [row for own in rows for row in own]
        moves = torch.tensor(source_P, device=device), torch.tensor(target_P, device=device)
    return SequenceGroup(
        cache=cache,
        first_layer=first_layer,
        rows_SQ=rows_SQ,
        positions_SQ=positions_N[rows_SQ],
        blocks_SB=blocks_SB,
        moves=moves,
        first=flat[0],
        same_position=is_decode,
    )


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
