"""What the frozen target says of an example, computed once and kept: its hidden state where the assistant enters,
the keys and values it lends, its logits. So a training step costs only the assistant's layers, and where it borrows
those only at answer positions. Called by run and trainer. Knows no adapter and no objective.

Shapes: B examples, Q answer positions, P positions that the stream runs at (the Q if it borrows, else all T), T
positions attended over, S layers whose keys and values are lent (none if it does not borrow), K key/value heads, W head
width, D hidden width, C columns (the label, then the target's top tokens), E width of the teacher's states (D or 0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from transformers import PreTrainedModel

from uld_serve.model.borrowed import decoder_parts, target_pass
from uld_serve.model.heap import give_back
from uld_serve.model.packing import Packing, num_alike
from uld_serve.training.examples import Example
from uld_serve.training.place import Place

IGNORED = -100
BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Observed:
    """One example as the frozen target sees it. `columns_QC` are token ids, `logits_QC` the target's.

    `teacher_QE` are the last hidden states of an adapter that teaches, where the lesson has one.
    """

    example: Example
    num_positions: int
    fork_PD: torch.Tensor
    final_QD: torch.Tensor
    keys_SKTW: torch.Tensor
    values_SKTW: torch.Tensor
    columns_QC: torch.Tensor
    logits_QC: torch.Tensor
    teacher_QE: torch.Tensor

    @property
    def num_bytes(self) -> int:
        held = (
            self.fork_PD,
            self.final_QD,
            self.keys_SKTW,
            self.values_SKTW,
            self.columns_QC,
            self.logits_QC,
        )
        return sum(one.nbytes for one in (*held, self.teacher_QE))


class Batch(TypedDict):
    """Padded examples. `labels_BP` is IGNORED where no answer token is predicted; nothing there reaches a loss.
    `is_answer_BQ` marks the same tokens, in the same order, among those that are kept at answer positions only.
    `num_shared` counts the tokens that all examples begin with, before any that is learnt."""

    fork_BPD: torch.Tensor
    final_BQD: torch.Tensor
    keys_SBKTW: torch.Tensor
    values_SBKTW: torch.Tensor
    positions_BP: torch.Tensor
    is_real_BT: torch.Tensor
    labels_BP: torch.Tensor
    is_answer_BQ: torch.Tensor
    goals_BQ: torch.Tensor
    kind_B: torch.Tensor
    columns_BQC: torch.Tensor
    logits_BQC: torch.Tensor
    teacher_BQE: torch.Tensor
    num_shared: torch.Tensor


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    place: Place,
    num_top: int,
    vocab_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Observed]:
    """Run the target over every example, the shortest together; in the order given."""
    order = sorted(range(len(examples)), key=lambda number: _length(examples[number]))
    found: dict[int, Observed] = {}
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        batch = [examples[number] for number in chosen]
        seen = _observe_batch(model, batch, place=place, num_top=num_top, vocab_size=vocab_size)
        found.update(zip(chosen, seen, strict=True))
        give_back()
        advance(len(chosen))
    return [found[number] for number in range(len(examples))]


def _observe_batch(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    place: Place,
    num_top: int,
    vocab_size: int,
) -> Iterator[Observed]:
    device = model.device
    lengths = [_length(example) for example in examples]
    ids_BT = torch.zeros(len(examples), max(lengths), dtype=torch.long, device=device)
    for row, example in enumerate(examples):
        ids_BT[row, : lengths[row]] = torch.tensor(example.prompt_ids + example.answer_ids[:-1])
    packing = Packing.of(lengths, num_shared=_num_shared(examples), device=device)
    states = target_pass(
        model,
        packing.rows(ids_BT),
        positions_BQ=packing.positions_1N,
        mask_B1QT=None,
        fork=place.fork,
        exit=place.exit,
        packing=packing,
    )
    head = decoder_parts(model).head
    for row, example in enumerate(examples):
        end = lengths[row]
        start = end - len(example.answer_ids)
        seats_T = packing.seats_BT[row, :end]
        final_QD = states.final_BQD[0, seats_T[start:]]
        logits_QV = head(final_QD)[:, :vocab_size].float()
        top_QC = logits_QV.topk(min(num_top, logits_QV.shape[-1])).indices
        columns_QC = torch.cat([torch.tensor(example.answer_ids, device=device)[:, None], top_QC], dim=-1)
        lent = [states.keys_values[layer] for layer in place.layers] if place.borrows else []
        # Copies, all of them: a view would keep the whole batch's tensors alive.
        yield Observed(
            example=example,
            num_positions=end,
            fork_PD=states.fork_BQD[0, seats_T[start if place.borrows else 0 :]],
            final_QD=final_QD,
            keys_SKTW=_stacked([keys[row, :, :end] for keys, _ in lent], like=final_QD),
            values_SKTW=_stacked([values[row, :, :end] for _, values in lent], like=final_QD),
            columns_QC=columns_QC,
            logits_QC=logits_QV.gather(-1, columns_QC),
            teacher_QE=final_QD.new_zeros(len(final_QD), 0),
        )


def _stacked(states_KTW: Sequence[torch.Tensor], *, like: torch.Tensor) -> torch.Tensor:
    return torch.stack(list(states_KTW)) if states_KTW else like.new_zeros(0, 0, 0, 0)


def _num_shared(examples: Sequence[Example]) -> int:
    """Tokens that all begin with and none predicts an answer from."""
    return num_alike([example.prompt_ids[:-1] for example in examples])


def _length(example: Example) -> int:
    """Positions whose next token is known: the last answer token is only ever a label."""
    return len(example.prompt_ids) + len(example.answer_ids) - 1


def collate(observed: Sequence[Observed]) -> Batch:
    """Pad examples to one batch: rows and contexts on the right."""
    rows = [one.fork_PD.shape[0] for one in observed]
    P, Q, T = (
        max(rows),
        max(len(one.final_QD) for one in observed),
        max(one.num_positions for one in observed),
    )
    positions = [
        torch.arange(one.num_positions - p, one.num_positions) for one, p in zip(observed, rows, strict=True)
    ]
    return Batch(
        fork_BPD=_pad([one.fork_PD for one in observed], P),
        final_BQD=_pad([one.final_QD for one in observed], Q),
        keys_SBKTW=torch.stack([_pad_context(one.keys_SKTW, T) for one in observed], dim=1),
        values_SBKTW=torch.stack([_pad_context(one.values_SKTW, T) for one in observed], dim=1),
        positions_BP=_pad(positions, P),
        is_real_BT=_pad([torch.ones(one.num_positions, dtype=torch.bool) for one in observed], T),
        labels_BP=_pad([_labels(one) for one in observed], P, fill=IGNORED),
        is_answer_BQ=_pad([torch.ones(len(one.final_QD), dtype=torch.bool) for one in observed], Q),
        goals_BQ=_pad([torch.tensor(one.example.goals) for one in observed], Q),
        kind_B=torch.tensor([int(one.example.kind) for one in observed]),
        columns_BQC=_pad([one.columns_QC for one in observed], Q),
        logits_BQC=_pad([one.logits_QC for one in observed], Q),
        teacher_BQE=_pad([one.teacher_QE for one in observed], Q),
        num_shared=torch.tensor(_num_shared([one.example for one in observed])),
    )


def _labels(one: Observed) -> torch.Tensor:
    """(P,): the next token where it is one of the answer's."""
    answer_ids = torch.tensor(one.example.answer_ids)
    before = one.fork_PD.shape[0] - len(answer_ids)
    return torch.cat([answer_ids.new_full((before,), IGNORED), answer_ids])


def _pad(rows: Sequence[torch.Tensor], size: int, *, fill: float = 0) -> torch.Tensor:
    first = rows[0]
    out = first.new_full((len(rows), size, *first.shape[1:]), fill)
    for number, row in enumerate(rows):
        out[number, : row.shape[0]] = row
    return out


def _pad_context(states_SKTW: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(states_SKTW, (0, 0, 0, size - states_SKTW.shape[2]))
