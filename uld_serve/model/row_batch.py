"""The rows of one step as tensors: target rows, assistant rows, and what each may see. Built by the engine's
batch, run by the decoder. Knows no request and no profile.

Shapes: T target rows, S sequences, B blocks of the longest context among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from uld_serve.model.geometry import QUERY_MULTIPLE, Geometry, SequenceGroup, Write
from uld_serve.model.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """One sequence's target rows [start, start + count) and the cache blocks of its whole context, those of the
    new rows included."""

    start: int
    count: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class AssistantRow:
    """A row that enters as a copy of target row `source` at layer `fork` and leaves after layer `exit` - 1,
    with the adapter `adapter_key`, in bank slot `slot`, on the layers between. `is_late`: its logits are wanted on
    some tokens only, so they are computed when these are known."""

    source: int
    fork: int
    exit: int
    slot: int
    adapter_key: str
    is_late: bool = False


@dataclass(frozen=True, slots=True)
class RowBatch:
    """One step's rows. `head_rows` are the target rows whose scores are wanted, in the order wanted."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    sequences: tuple[SequenceRows, ...]
    assistants: tuple[AssistantRow, ...]
    head_rows: torch.Tensor

    @property
    def num_target_rows(self) -> int:
        return int(self.token_ids_T.shape[0])

    def spans(self, num_layers: int) -> list[tuple[int, int, tuple[int, ...]]]:
        """Runs of layers with the same assistants: (first layer, end layer, indices of active assistants, those
        with one adapter side by side)."""
        forks = {row.fork for row in self.assistants}
        exits = {row.exit for row in self.assistants}
        bounds = sorted({0, num_layers} | forks | exits)
        by_slot = sorted(range(len(self.assistants)), key=lambda index: self.assistants[index].slot)
        return [
            (low, high, tuple(i for i in by_slot if self.assistants[i].fork <= low < self.assistants[i].exit))
            for low, high in pairwise(bounds)
        ]

    def geometry(self, active: Sequence[int], cache: KVCache, contexts: Contexts) -> Geometry:
        """Attention geometry of a layer in which the assistants `active` follow the target rows."""
        riders: dict[int, list[int]] = {}
        for row, index in enumerate(active, start=self.num_target_rows):
            riders.setdefault(self.assistants[index].source, []).append(row)
        groups = []
        for members, blocks_SB, is_decode in contexts.groups:
            rows = [self._rows_of(self.sequences[member], riders) for member in members]
            groups.append(self._group(rows, active, cache, blocks_SB, is_decode))
        write = Write(cache, 0, 0, self.num_target_rows, self.slots_T)
        return Geometry((write,), tuple(groups))

    def _rows_of(self, sequence: SequenceRows, riders: dict[int, list[int]]) -> list[int]:
        targets = range(sequence.start, sequence.start + sequence.count)
        return [*targets, *(row for target in targets for row in riders.get(target, ()))]

    def _group(
        self,
        rows: list[list[int]],
        active: Sequence[int],
        cache: KVCache,
        blocks_SB: torch.Tensor,
        is_decode: bool,
    ) -> SequenceGroup:
        device = blocks_SB.device
        width = max(len(own) for own in rows)
        if not is_decode:
            width = -(-width // QUERY_MULTIPLE) * QUERY_MULTIPLE
        padded = [own + own[:1] * (width - len(own)) for own in rows]
        rows_SQ = torch.tensor(padded, device=device)
        target_P = [row for own in rows for row in own]
        moves = None
        if [row for own in padded for row in own] != list(range(self.num_target_rows + len(active))):
            source_P = [s * width + q for s, own in enumerate(rows) for q in range(len(own))]
            moves = torch.tensor(source_P, device=device), torch.tensor(target_P, device=device)
        return SequenceGroup(
            cache=cache,
            first_layer=0,
            rows_SQ=rows_SQ,
            positions_SQ=self.positions_of(active)[rows_SQ],
            blocks_SB=blocks_SB,
            moves=moves,
            first=0,
            same_position=is_decode,
        )

    def positions_of(self, active: Sequence[int]) -> torch.Tensor:
        """Positions of the target rows and then of the active assistants."""
        if not active:
            return self.positions_T
        sources = torch.tensor([self.assistants[i].source for i in active], device=self.positions_T.device)
        return torch.cat([self.positions_T, self.positions_T[sources]])


@dataclass(frozen=True, slots=True)
class Contexts:
    """Which sequences attend in one call, and their context's blocks; the same for every layer of a step."""

    groups: tuple[tuple[tuple[int, ...], torch.Tensor, bool], ...]

    @classmethod
    def of(cls, sequences: Sequence[SequenceRows], device: torch.device) -> Contexts:
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
