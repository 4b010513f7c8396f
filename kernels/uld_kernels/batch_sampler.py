"""Draws for the many rows that ask for little, all at once: what sampler_reference gives one by one, in a few tensor
operations. Called by sampler_reference.

Takes rows without bans, penalties, bias, lists and measures, that have one relu_difference with a fused filter or are
the target's alone without top-k, top-p and min-p. Nothing here depends on which rows come together.

Legend: R rows of logits, V real vocabulary, N rows drawn here, G groups of token ids, C tokens of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, log
from typing import Literal

import torch

from uld_kernels import reference, rules
from uld_kernels.logit_groups import Found, LogitGroups, first_best, merged
from uld_kernels.lottery import draw_few, draw_whole
from uld_kernels.noise import Stream
from uld_kernels.nucleus import nucleus_indices, truncates
from uld_kernels.rows import LateRows, SampleRow

# How much further down (nats) the next look goes when the tokens looked at are all hushed; it doubles each time.
_FIRST_STEP = 4.0
_BOUND_SLACK = 1e-3
_LOWEST = torch.finfo(torch.float32).min

_Way = Literal["greedy", "drawn", "hushed"]


@dataclass(slots=True)
class Drawn:
    """Token and status of rows, by their number in the batch."""

    tokens: dict[int, int] = field(default_factory=dict)
    statuses: dict[int, int] = field(default_factory=dict)

    def fail(self, number: int, status: int) -> None:
        self.tokens[number], self.statuses[number] = -1, status

    def succeed(self, numbers: Sequence[int], token_N: torch.Tensor) -> None:
        self.tokens.update(zip(numbers, token_N.tolist(), strict=True))
        self.statuses.update(dict.fromkeys(numbers, rules.OK))


@dataclass(frozen=True, slots=True)
class _Lane:
    """Rows that take the same way, their numbers in the batch, and the target's scores of each."""

    numbers: list[int]
    rows: list[SampleRow]
    groups: LogitGroups
    best_N: torch.Tensor
    best_id_N: torch.Tensor

    def of_rows(self, values: Sequence[float]) -> torch.Tensor:
        """(N,) in the scores' dtype."""
        return torch.tensor(values, dtype=self.best_N.dtype, device=self.best_N.device)

    def temperatures(self) -> torch.Tensor:
        """(N, 1)."""
        return self.of_rows([row.temperature for row in self.rows])[:, None]

    def log_taus(self) -> torch.Tensor:
        return self.of_rows([log(row.terms[0].tau) for row in self.rows])

    def stream(self) -> Stream:
        seeds, positions = [row.seed for row in self.rows], [row.position for row in self.rows]
        return Stream.of(seeds, positions, self.best_N.device)


def sample_batch(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
    late: LateRows | None,
) -> Drawn:
    """Draw for those of `rows` that can be drawn together; the others are not in what comes back."""
    drawn = Drawn()
    if logits_RV.dtype == torch.float64:
        return drawn
    ways: dict[_Way, list[int]] = {}
    for number, row in enumerate(rows):
        way = _way(row, has_protected=protected_ids.shape[0] > 0)
        if way is not None:
            ways.setdefault(way, []).append(number)
    for way, numbers in ways.items():
        lane = _lane(logits_RV[:, :vocab_size], rows, numbers, drawn)
        if not lane.numbers:
            continue
        if way == "greedy":
            drawn.succeed(lane.numbers, lane.best_id_N)
        elif way == "drawn":
            best = lane.best_N, lane.best_id_N
            token_N = draw_whole(lane.groups, lane.stream(), temperature_N1=lane.temperatures(), best=best)
            drawn.succeed(lane.numbers, token_N)
        else:
            _draw_hushed(lane, logits_RV, late, drawn)
    return drawn


def _lane(logits_RV: torch.Tensor, rows: Sequence[SampleRow], numbers: list[int], drawn: Drawn) -> _Lane:
    """Rows whose target is NaN, or infinite or -inf everywhere, fail here and are not in the lane."""
    row_b = [rows[number].row_b for number in numbers]
    first, count = row_b[0], len(row_b)
    if row_b == list(range(first, first + count)):
        target_NV = logits_RV[first : first + count]
    else:
        target_NV = logits_RV.index_select(0, torch.tensor(row_b, device=logits_RV.device))
    groups = LogitGroups.of(target_NV.float())
    best_N, best_id_N = groups.best()
    best = best_N.tolist()
    if all(map(isfinite, best)):
        return _Lane(numbers, [rows[number] for number in numbers], groups, best_N, best_id_N)
    for number, value in zip(numbers, best, strict=True):
        if not isfinite(value):
            drawn.fail(number, rules.NOTHING_KEPT if value == -inf else rules.NUMERICAL)
    healthy = [number for number in numbers if number not in drawn.statuses]
    return _lane(logits_RV, rows, healthy, drawn) if healthy else _Lane([], [], groups, best_N, best_id_N)


def _draw_hushed(lane: _Lane, logits_RV: torch.Tensor, late: LateRows | None, drawn: Drawn) -> None:
    fused, best_N, at_N = _within_reach(lane, logits_RV, late)
    if any(row.temperature for row in lane.rows):
        # NaN compares false and keeps its row from being empty.
        kept = fused.where(~(fused.value_C < (best_N + lane.log_taus())[fused.row_C]))
        if any(map(truncates, lane.rows)):
            kept = _nuclei(kept, lane.rows, best_N.isfinite().tolist())
        token_N = draw_few(kept, lane.stream(), temperature_N1=lane.temperatures())
    else:
        token_N = fused.id_C[at_N]
    drawn.succeed(lane.numbers, token_N)
    for number, best in zip(lane.numbers, best_N.tolist(), strict=True):
        if not isfinite(best):
            drawn.fail(number, rules.NOTHING_KEPT if best == -inf else rules.NUMERICAL)


def _nuclei(kept: Found, rows: Sequence[SampleRow], are_finite: Sequence[bool]) -> Found:
    """What top-k, top-p and min-p leave of each row, one row after the other: few tokens are left of each. A row that
    is going to fail keeps all: none may be left empty."""
    sizes = torch.bincount(kept.row_C, minlength=len(rows)).tolist()
    start, left = 0, []
    for row, size, is_finite in zip(rows, sizes, are_finite, strict=True):
        chosen = (
            nucleus_indices(kept.value_C[start : start + size] / row.temperature, row)
            if is_finite and truncates(row)
            else None
        )
        left.append(torch.arange(size, device=kept.row_C.device) if chosen is None else chosen)
        left[-1] += start
        start += size
    left_C = torch.cat(left)
    return Found(kept.row_C[left_C], kept.id_C[left_C], kept.value_C[left_C])


def _within_reach(
    lane: _Lane, logits_RV: torch.Tensor, late: LateRows | None
) -> tuple[Found, torch.Tensor, torch.Tensor]:
    """Fused scores of all tokens that the fused filter could leave, and of each row the best and where it is.

    relu_difference raises no score, so that nothing further below the target's best token than the best fused score
    plus log tau can stay. That score is at least the best one of the tokens looked at so far: looks go down until
    they have reached what it rules out. NaN is the best of a row whose assistant is not finite.
    """
    look = _Look(lane, logits_RV, late)
    distance_N = lane.log_taus() - _BOUND_SLACK
    limit_N = lane.best_N + distance_N
    fused = look.fused(lane.groups.at_least(limit_N[:, None]))
    step = _FIRST_STEP
    while True:
        best_N, at_N = first_best(fused.value_C, fused.row_C, num_rows=len(lane.rows))
        lowest_N = (best_N + distance_N).clamp_min(_LOWEST)
        goes_on_N = lowest_N < limit_N
        if not goes_on_N.any():
            return fused, best_N, at_N
        next_N = torch.where(goes_on_N, torch.maximum(lowest_N, limit_N - step), inf)
        further = lane.groups.at_least(next_N[:, None])
        fused = merged(fused, look.fused(further.where(further.value_C < limit_N[further.row_C])))
        limit_N, step = torch.minimum(next_N, limit_N), 2 * step


@dataclass(frozen=True, slots=True)
class _Look:
    """Fuses tokens of the lane's rows with their assistants'."""

    lane: _Lane
    logits_RV: torch.Tensor
    late: LateRows | None

    def fused(self, found: Found) -> Found:
        """NaN where the assistant is not finite."""
        a_C = self._assistant(found)
        a_C = a_C + (a_C - a_C)  # inf - inf is NaN
        strength_N = self.lane.of_rows([row.terms[0].strength for row in self.lane.rows])
        s_C = reference.relu_difference(found.value_C, a_C, strength=strength_N[found.row_C])
        return Found(found.row_C, found.id_C, s_C)

    def _assistant(self, found: Found) -> torch.Tensor:
        row_a = [row.terms[0].row_a for row in self.lane.rows]
        row_C = torch.tensor(row_a, device=found.id_C.device)[found.row_C]
        num_rows = self.logits_RV.shape[0]
        if self.late is None:
            return self.logits_RV[row_C, found.id_C].float()
        a_C = self.late.scores_each((row_C - num_rows).clamp_min(0), found.id_C)
        if min(row_a) >= num_rows:
            return a_C
        whole_C = self.logits_RV[row_C.clamp_max(num_rows - 1), found.id_C].float()
        return torch.where(row_C < num_rows, whole_C, a_C)


def _asks_little(row: SampleRow) -> bool:
    """Whether a row wants its token only, of all that its rule leaves."""
    if row.is_measured or row.num_logprobs or row.repetition_penalty != 1.0:
        return False
    if row.presence_penalty or row.frequency_penalty or row.logit_bias is not None:
        return False
    return row.banned_ids is None and row.allowed_mask is None


def _way(row: SampleRow, *, has_protected: bool) -> _Way | None:
    if not _asks_little(row):
        return None
    if not row.terms:
        if truncates(row):
            return None
        return "greedy" if row.temperature == 0.0 else "drawn"
    term = row.terms[0]
    is_hushed = term.kind == rules.RELU_DIFFERENCE and term.filter_mode == rules.FUSED
    return "hushed" if len(row.terms) == 1 and is_hushed and not (term.protect and has_protected) else None
