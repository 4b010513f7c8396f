"""From scheduled sequences to the rows of one step, and which scores each of them wants. Called by the engine.
Knows no profile: a plan's streams are numbers here."""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass, field

import torch

from uld_serve.engine.scheduler import Scheduled
from uld_serve.engine.sequence import Sequence
from uld_serve.model.row_batch import AssistantRow, RowBatch, SequenceRows


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
class Batch:
    rows: RowBatch
    wants: tuple[Want, ...]

    @classmethod
    def of(cls, scheduled: Series[Scheduled], *, block_size: int, device: torch.device) -> Batch:
        builder = _Builder(block_size, device)
        for item in scheduled:
            builder.add(item)
        return builder.batch()


@dataclass(slots=True)
class _Builder:
    block_size: int
    device: torch.device
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    sequences: list[SequenceRows] = field(default_factory=list)
    assistants: list[AssistantRow] = field(default_factory=list)
    head_rows: list[int] = field(default_factory=list)
    wanted: list[tuple[Sequence, int, int | None]] = field(default_factory=list)

    def add(self, item: Scheduled) -> None:
        sequence, count = item.sequence, item.count
        first_row, first = len(self.token_ids), sequence.num_computed
        self.token_ids += sequence.tokens(first, count)
        self.positions += range(first, first + count)
        blocks, size = sequence.block_ids, self.block_size
        self.slots += [blocks[at // size] * size + at % size for at in range(first, first + count)]
        num_blocks = -(-(first + count) // size)
        self.sequences.append(SequenceRows(first_row, count, blocks[:num_blocks]))
        for position in sequence.scored_positions(count):
            self._want(sequence, position, first_row + position - first, sequence.prompt_ids[position + 1])
        if sequence.draws_after(count):
            self._want(sequence, first + count - 1, first_row + count - 1, None)

    def batch(self) -> Batch:
        rows = RowBatch(
            token_ids_T=torch.tensor(self.token_ids, device=self.device),
            positions_T=torch.tensor(self.positions, device=self.device),
            slots_T=torch.tensor(self.slots, device=self.device),
            sequences=tuple(self.sequences),
            assistants=tuple(self.assistants),
            head_rows=torch.tensor(self.head_rows, dtype=torch.long, device=self.device),
        )
        wants = []
        next_whole = len(self.head_rows)
        next_late = next_whole + sum(not row.is_late for row in self.assistants)
        for row, (sequence, position, target_id) in enumerate(self.wanted):
            stream_rows = []
            for stream in sequence.plan.streams:
                stream_rows.append(next_late if stream.is_late else next_whole)
                next_late, next_whole = next_late + stream.is_late, next_whole + (not stream.is_late)
            wants.append(Want(sequence, position + 1, row, tuple(stream_rows), target_id))
        return Batch(rows, tuple(wants))

    def _want(self, sequence: Sequence, position: int, row: int, target_id: int | None) -> None:
        self.wanted.append((sequence, position, target_id))
        self.head_rows.append(row)
        for stream in sequence.plan.streams:
            self.assistants.append(
                AssistantRow(row, stream.fork, stream.exit, stream.slot, stream.adapter_key, stream.is_late)
            )
