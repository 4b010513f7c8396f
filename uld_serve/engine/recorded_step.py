"""A decode step that was recorded once: its buffers, what they hold, and the sampler that draws from its scores. Made,
filled and replayed by the decode graphs. Knows no request and no profile.

Shapes: T rows of a batch, P rows of a recorded step (padded), B blocks of a context (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from uld_kernels import SampleOutput, StaticSampler

from uld_serve.engine.batch import Drawn, Fed
from uld_serve.engine.seating import Seating
from uld_serve.engine.transfer import fill, to_device
from uld_serve.model.row_batch import RowBatch
from uld_serve.model.static_step import StaticStep


class Recording(Protocol):
    """A recorded run: `replay` runs it again on whatever its buffers hold, into the same result."""

    @property
    def result(self) -> torch.Tensor: ...

    def replay(self) -> None: ...


Record = Callable[[Callable[[], torch.Tensor]], Recording]
"""Records what a function does on the device. The function may be run more than once before."""


@dataclass(slots=True)
class Buffers:
    """A static step, and what its buffers hold: only what changes is copied there."""

    step: StaticStep
    scratch_block: int
    blocks: list[list[int]] = field(init=False)
    adapters: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks = [[] for _ in range(self.step.shape.num_rows)]

    def fill(self, seating: Seating, rows: RowBatch) -> None:
        """A batch's rows; padding rows hold token 0 at position 0 of the scratch block."""
        num_rows, count = self.step.shape.num_rows, len(seating.order)
        given_3T = torch.stack([rows.token_ids_T, rows.positions_T, rows.slots_T])
        if seating.order != list(range(count)):
            given_3T = given_3T.index_select(1, to_device(torch.tensor(seating.order), given_3T.device))
        padded_3P = given_3T.new_zeros(3, num_rows)
        padded_3P[2, count:] = self.scratch_block * self.step.cache.block_size
        padded_3P[:, :count] = given_3T
        fill(self.step.rows_3P, padded_3P)
        wanted = [list(rows.sequences[row].blocks) for row in seating.order]
        self._fill_blocks(wanted + [[self.scratch_block]] * (num_rows - count))
        if seating.adapters != self.adapters:
            fill(self.step.adapters_RP, torch.tensor(seating.adapters))
            self.adapters = seating.adapters

    def feed(self, seating: Seating, fed: Fed, drawn: Drawn) -> None:
        """Tokens that the device alone knows."""
        place = {row: at for at, row in enumerate(seating.order)}
        Fed([place[row] for row in fed.rows], fed.sequences).write(self.step.token_ids_P, drawn)

    def _fill_blocks(self, wanted: list[list[int]]) -> None:
        """Of 16 steps one adds a block to a row."""
        changed = [row for row, blocks in enumerate(wanted) if blocks != self.blocks[row]]
        if not changed:
            return
        width = self.step.shape.num_blocks
        # What lies past a context repeats a block of its own: NaN in another's would not be hidden by a mask.
        padded = [wanted[row] + wanted[row][:1] * (width - len(wanted[row])) for row in changed]
        device = self.step.blocks_PB.device
        places = to_device(torch.tensor(changed), device)
        self.step.blocks_PB.index_copy_(0, places, to_device(torch.tensor(padded), device))
        self.blocks = wanted


@dataclass(slots=True)
class RecordedStep:
    """The step of some buffers, and with a `sampler` its draws. A sampler that cannot be recorded runs after each
    replay. `checks_left`: of so many replays the decoder has still to say whether they are right."""

    buffers: Buffers
    sampler: StaticSampler | None
    recording: Recording
    checks_left: int

    @classmethod
    def of(
        cls, buffers: Buffers, sampler: StaticSampler | None, record: Record, *, num_checks: int
    ) -> RecordedStep:
        """Runs before the recording see what the buffers hold: what they write is what the replay writes."""

        def run() -> torch.Tensor:
            logits_RW = buffers.step.forward()
            if sampler is not None and sampler.is_recordable:
                sampler.run(logits_RW)
            return logits_RW

        return cls(buffers, sampler, record(run), num_checks)

    @property
    def logits_RW(self) -> torch.Tensor:
        """Of the last replay; overwritten by the next."""
        return self.recording.result

    def replay(self) -> None:
        self.recording.replay()
        if self.sampler is not None and not self.sampler.is_recordable:
            self.sampler.run(self.logits_RW)

    def scores_of(self, wanted: Sequence[int]) -> torch.Tensor:
        """The last replay's logits in the order `wanted`."""
        if list(wanted) == list(range(self.logits_RW.shape[0])):
            return self.logits_RW
        return self.logits_RW.index_select(0, to_device(torch.tensor(wanted), self.logits_RW.device))

    def drawn(self) -> SampleOutput:
        assert self.sampler is not None, "a step without draws"
        return self.sampler.output()
