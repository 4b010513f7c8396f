"""The rows of one step: the target's, those of assistants that borrow from it, those of assistants with keys and
values of their own. Built by the engine's batch, run by the decoder. Knows no request and no profile.

Shapes: T target rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

NO_ADAPTER = -1


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """One sequence's target rows [start, start + count) and the cache blocks of its whole context, those of the
    new rows included. `adapter_key` names the adapter, in bank slot `slot`, that these rows carry on all layers."""

    start: int
    count: int
    blocks: Sequence[int]
    slot: int = NO_ADAPTER
    adapter_key: str | None = None


@dataclass(frozen=True, slots=True)
class OwnRows:
    """Rows of an assistant with its own keys and values: one for each target row [start, start + count) of a
    sequence, entering as its copy at layer `fork` and leaving after layer `exit` - 1, with an adapter between.

    `blocks` are those of its whole context in the own cache, `slots` where the new rows' keys and values go.
    """

    start: int
    count: int
    blocks: Sequence[int]
    slots: Sequence[int]
    fork: int
    exit: int
    slot: int
    adapter_key: str


@dataclass(frozen=True, slots=True)
class AssistantRow:
    """Scores wanted of an assistant where target row `source` stands.

    A row that borrows enters as a copy of it at layer `fork` and leaves after layer `exit` - 1, with the adapter
    `adapter_key`, in bank slot `slot`, on the layers between. With `lane` it is one of RowBatch.lanes[lane]'s rows
    instead. `is_late`: its logits are wanted on some tokens only, so they are computed when these are known.
    """

    source: int
    fork: int
    exit: int
    slot: int
    adapter_key: str
    is_late: bool = False
    lane: int | None = None


@dataclass(frozen=True, slots=True)
class RowBatch:
    """One step's rows. `head_rows` are the target rows whose scores are wanted, in the order wanted.

    Sequences whose target rows carry an adapter come last. `separate`: rows of the same step for other models, by
    the model's name; to such a model they are target rows.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    sequences: tuple[SequenceRows, ...]
    assistants: tuple[AssistantRow, ...]
    head_rows: torch.Tensor
    lanes: tuple[OwnRows, ...] = ()
    separate: Mapping[str, RowBatch] = field(default_factory=dict)

    @property
    def num_target_rows(self) -> int:
        return int(self.token_ids_T.shape[0])
