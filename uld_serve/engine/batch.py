"""From scheduled sequences to the rows of one step, and which scores each of them wants. Called by the engine.
Knows no profile: a plan's streams are numbers here."""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass, field, replace

import torch

from uld_serve.engine.sequence import Scheduled, Sequence
from uld_serve.engine.streams import Seat, StreamPlan
from uld_serve.engine.transfer import to_device
from uld_serve.model.row_batch import NO_ADAPTER, AssistantRow, OwnRows, RowBatch, SequenceRows


@dataclass(frozen=True, slots=True)
class Want:
    """Scores wanted for the token at `position` of `sequence`.

    `row` is the target's row of logits, `stream_rows` those of the plan's streams in order. With a
    `target_id` that token is scored; without, one is drawn.
    """

    sequence: Sequence
    position: int
    row: int
    stream_rows: tuple[int, ...]
    target_id: int | None


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens that were drawn and are on the device only; a failed draw gives -1. `row_of`: whose is where."""

    token_ids_B: torch.Tensor
    row_of: dict[Sequence, int]


@dataclass(frozen=True, slots=True)
class Fed:
    """Rows whose token the host does not know: row `rows[i]` is given the token that `sequences[i]` drew."""

    rows: list[int]
    sequences: list[Sequence]

    def write(self, token_ids_T: torch.Tensor, drawn: Drawn) -> None:
        """What a failed draw is followed by is never looked at: any token will do."""
        device = token_ids_T.device
        places = torch.tensor([self.rows, [drawn.row_of[sequence] for sequence in self.sequences]])
        rows, picks = to_device(places, device).unbind()
        token_ids_T.index_copy_(0, rows, drawn.token_ids_B.index_select(0, picks).clamp_min(0))


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows, on the host. `fed`: of the base's rows (None) and those of separate models by name, the ones
    whose tokens are on the device only."""

    rows: RowBatch
    wants: tuple[Want, ...]
    fed: dict[str | None, Fed]

    @classmethod
    def of(cls, scheduled: Series[Scheduled], *, block_size: int) -> Batch:
        builder = _Builder(block_size)
        # Rows with an adapter are seated in one run that reaches to the assistants: they come last.
        for item in sorted(scheduled, key=_target_slot):
            builder.add(item)
        return builder.batch()

    def on(self, device: torch.device, drawn: Drawn | None) -> RowBatch:
        """The rows on the device, with the tokens that only it knows."""
        rows = self._rows_on(device, self.rows, None, drawn)
        if not rows.separate:
            return rows
        separate = {
            model: self._rows_on(device, batch, model, drawn) for model, batch in rows.separate.items()
        }
        return replace(rows, separate=separate)

    def _rows_on(
        self, device: torch.device, rows: RowBatch, model: str | None, drawn: Drawn | None
    ) -> RowBatch:
        if device.type != "cpu":
            rows = replace(
                rows,
                token_ids_T=to_device(rows.token_ids_T, device),
                positions_T=to_device(rows.positions_T, device),
                slots_T=to_device(rows.slots_T, device),
                head_rows=to_device(rows.head_rows, device),
            )
        if model in self.fed:
            assert drawn is not None, "a token that nobody knows"
            self.fed[model].write(rows.token_ids_T, drawn)
        return rows


def _target_slot(item: Scheduled) -> int:
    seat = item.sequence.plan.target_seat
    return NO_ADAPTER if seat is None else seat.slot


@dataclass(slots=True)
class _Rows:
    """Rows of one model: tokens, positions, and where their keys and values go."""

    block_size: int
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    sequences: list[SequenceRows] = field(default_factory=list)
    head_rows: list[int] = field(default_factory=list)
    fed: Fed = field(default_factory=lambda: Fed([], []))

    def add(self, item: Scheduled, block_ids: list[int], seat: Seat | None) -> int:
        """The first row of the scheduled tokens."""
        sequence, first, count = item.sequence, item.first, item.count
        first_row = len(self.token_ids)
        token_ids = sequence.tokens(first, count)
        if len(token_ids) < count:  # the last one is still on the device
            self.fed.rows.append(first_row + count - 1)
            self.fed.sequences.append(sequence)
            token_ids = [*token_ids, 0]
        self.token_ids += token_ids
        self.positions += range(first, first + count)
        self.slots += _slots(block_ids, first, count, self.block_size)
        blocks = block_ids[: -(-(first + count) // self.block_size)]
        slot, key = (NO_ADAPTER, None) if seat is None else (seat.slot, seat.key)
        self.sequences.append(SequenceRows(first_row, count, blocks, slot, key))
        return first_row

    def batch(
        self,
        *,
        assistants: Series[AssistantRow] = (),
        lanes: Series[OwnRows] = (),
        separate: dict[str, RowBatch] | None = None,
    ) -> RowBatch:
        return RowBatch(
            token_ids_T=torch.tensor(self.token_ids),
            positions_T=torch.tensor(self.positions),
            slots_T=torch.tensor(self.slots),
            sequences=tuple(self.sequences),
            assistants=tuple(assistants),
            head_rows=torch.tensor(self.head_rows, dtype=torch.long),
            lanes=tuple(lanes),
            separate=separate or {},
        )


def _slots(block_ids: list[int], first: int, count: int, size: int) -> list[int]:
    if count == 1:
        return [block_ids[first // size] * size + first % size]
    return [block_ids[at // size] * size + at % size for at in range(first, first + count)]


@dataclass(slots=True)
class _Builder:
    block_size: int
    target: _Rows = field(init=False)
    assistants: list[AssistantRow] = field(default_factory=list)
    lanes: list[OwnRows] = field(default_factory=list)
    wanted: list[tuple[Sequence, int, int | None]] = field(default_factory=list)
    elsewhere: dict[str, list[tuple[Scheduled, StreamPlan]]] = field(default_factory=dict)
    fed: dict[str | None, Fed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.target = _Rows(self.block_size)

    def add(self, item: Scheduled) -> None:
        sequence, plan, first = item.sequence, item.sequence.plan, item.first
        first_row = self.target.add(item, sequence.block_ids, plan.target_seat)
        first_lane = len(self.lanes)
        if len(plan.lanes) > 1:
            self._add_lanes(item, first_row)
        for position in item.scored:
            target_id = sequence.prompt_ids[position + 1]
            self._want(sequence, position, first_row + position - first, first_lane, target_id)
        if item.draws:
            last = item.count - 1
            self._want(sequence, first + last, first_row + last, first_lane, None)

    def _add_lanes(self, item: Scheduled, first_row: int) -> None:
        """Rows at every position for the streams with keys and values of their own."""
        sequence, first = item.sequence, item.first
        for stream in sequence.plan.streams:
            if stream.borrows:
                continue
            if stream.model is not None:
                self.elsewhere.setdefault(stream.model, []).append((item, stream))
                continue
            assert stream.seat is not None
            block_ids = sequence.lanes[stream.lane].block_ids
            self.lanes.append(
                OwnRows(
                    start=first_row,
                    count=item.count,
                    blocks=block_ids[: -(-(first + item.count) // self.block_size)],
                    slots=_slots(block_ids, first, item.count, self.block_size),
                    fork=stream.fork,
                    exit=stream.exit,
                    slot=stream.seat.slot,
                    adapter_key=stream.seat.key,
                )
            )

    def _want(
        self, sequence: Sequence, position: int, row: int, first_lane: int, target_id: int | None
    ) -> None:
        self.wanted.append((sequence, position, target_id))
        self.target.head_rows.append(row)
        lane = first_lane
        for stream in sequence.plan.streams:
            if stream.model is not None:
                continue
            assert stream.seat is not None
            own = None if stream.borrows else lane
            lane += not stream.borrows
            self.assistants.append(
                AssistantRow(
                    row, stream.fork, stream.exit, stream.seat.slot, stream.seat.key, stream.is_late, own
                )
            )

    def batch(self) -> Batch:
        """Scores come in this order: the target's, assistants' of the base, separate models', late ones."""
        num_late = sum(row.is_late for row in self.assistants)
        num_ours = len(self.wanted) + len(self.assistants) - num_late
        separate, next_of, num_whole = self._separate(num_ours)
        next_whole, next_late = len(self.wanted), num_whole
        wants = []
        for row, (sequence, position, target_id) in enumerate(self.wanted):
            stream_rows = []
            for number, stream in enumerate(sequence.plan.streams):
                if stream.model is not None:
                    stream_rows.append(next_of[id(sequence), number])
                    next_of[id(sequence), number] += 1
                elif stream.is_late:
                    stream_rows.append(next_late)
                    next_late += 1
                else:
                    stream_rows.append(next_whole)
                    next_whole += 1
            wants.append(Want(sequence, position + 1, row, tuple(stream_rows), target_id))
        rows = self.target.batch(assistants=self.assistants, lanes=self.lanes, separate=separate)
        if self.target.fed.rows:
            self.fed[None] = self.target.fed
        return Batch(rows, tuple(wants), self.fed)

    def _separate(self, first: int) -> tuple[dict[str, RowBatch], dict[tuple[int, int], int], int]:
        """Each separate model's rows; the first row of scores, from `first` on, of each (sequence, stream) in them;
        and the row after the last."""
        batches: dict[str, RowBatch] = {}
        firsts: dict[tuple[int, int], int] = {}
        for model, members in self.elsewhere.items():
            rows = _Rows(self.block_size)
            for item, stream in sorted(members, key=lambda member: _slot(member[1].seat)):
                sequence = item.sequence
                start = rows.add(item, sequence.lanes[stream.lane].block_ids, stream.seat)
                firsts[id(sequence), sequence.plan.streams.index(stream)] = first + len(rows.head_rows)
                rows.head_rows += [start + position - item.first for position in item.scored]
                if item.draws:
                    rows.head_rows.append(start + item.count - 1)
            batches[model] = rows.batch()
            if rows.fed.rows:
                self.fed[model] = rows.fed
            first += len(rows.head_rows)
        return batches, firsts, first


def _slot(seat: Seat | None) -> int:
    return NO_ADAPTER if seat is None else seat.slot
