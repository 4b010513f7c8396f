"""Which rows of a batch can be worked on together, and their targets' scores. Called by batch_sampler.

Legend: R rows of logits, W their width, V real vocabulary, N rows of a lane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor, inf
from typing import Literal

import torch

from uld_kernels import rules
from uld_kernels.assistants import rare
from uld_kernels.candidates import fused_tau
from uld_kernels.history import penalizes, repeats
from uld_kernels.lane import Lane
from uld_kernels.logit_groups import LogitGroups
from uld_kernels.rows import SampleRow, Term

# So many rows at once keep what is found of them small, and save nothing more.
_ROWS_AT_ONCE = 32

Kind = Literal["plain", "target_filter", "fused_filter", "whole"]
"""How a row's tokens are found: no term; a filter on the target; a fused filter over rules that raise no score; or a
fused filter over scores of the whole row."""


@dataclass(frozen=True, slots=True)
class Way:
    """Rows with equal ways make lanes."""

    kind: Kind
    rule_codes: tuple[int, ...] = ()
    compose: int = rules.COMPOSE_MAX
    bans: bool = False
    protects: bool = False
    penalizes: bool = False
    is_measured: bool = False


def is_measured(row: SampleRow) -> bool:
    """Whether somebody reads more of a row than its token."""
    return row.is_measured or row.num_logprobs > 0


def way_of(
    row: SampleRow, *, num_rows: int, vocab_size: int, has_protected: bool, is_scored: bool = False
) -> Way | None:
    """None for what is rare: it goes one row after the other. `is_scored` rows are given their token."""
    bans = row.banned_ids is not None or row.allowed_mask is not None
    terms = row.distinct_terms
    if not terms:
        return Way("plain", bans=bans, penalizes=penalizes(row) and not is_scored)
    kind = _kind(row, terms, num_rows=num_rows, vocab_size=vocab_size)
    if kind is None:
        return None
    return Way(
        kind,
        tuple(term.kind for term in terms),
        row.compose if len(terms) > 1 else rules.COMPOSE_MAX,
        bans=bans,
        protects=has_protected and any(term.protect for term in terms),
        is_measured=is_scored or is_measured(row) or repeats(row),
    )


def _kind(row: SampleRow, terms: tuple[Term, ...], *, num_rows: int, vocab_size: int) -> Kind | None:
    modes = [term.filter_mode for term in terms]
    if any(t.filter_mode == rules.OFFICIAL and floor(t.tau * vocab_size) == 0 for t in terms):
        return None
    is_rare = rare(terms, num_rows=num_rows)
    if rules.PLAUSIBILITY in modes or rules.OFFICIAL in modes:
        return None if is_rare else "target_filter"
    if fused_tau(row) == 0.0:
        return None
    if all(term.kind == rules.RELU_DIFFERENCE for term in terms):
        return "fused_filter"
    streams = (index for term in terms for index in (term.row_a, term.row_q, term.row_p))
    return "whole" if max(streams) < num_rows else None


class Targets:
    """The targets' scores of a batch, fp32, read where they lie if they can be."""

    def __init__(self, logits_RW: torch.Tensor, rows: Sequence[SampleRow], *, vocab_size: int) -> None:
        used = sorted({row.row_b for row in rows})
        first, last = used[0], used[-1]
        if last - first < 2 * len(used):
            self._place = {row: row - first for row in used}
            chosen = logits_RW[first : last + 1, :vocab_size]
        else:
            self._place = {row: place for place, row in enumerate(used)}
            chosen = logits_RW.index_select(0, torch.tensor(used, device=logits_RW.device))[:, :vocab_size]
        self._groups = LogitGroups.of(chosen.float())

    def lane(self, numbers: list[int], rows: list[SampleRow], *, bans: bool) -> Lane:
        """Raises RowsFailed."""
        groups = self._groups.select([self._place[row.row_b] for row in rows])
        lane = Lane.of(numbers, rows, groups)
        return Lane.of(numbers, rows, _banned(groups, rows)) if bans else lane


def _banned(groups: LogitGroups, rows: Sequence[SampleRow]) -> LogitGroups:
    values_NW = groups.copy()
    for values_V, row in zip(values_NW[:, : groups.size], rows, strict=True):
        if row.allowed_mask is not None:
            values_V.masked_fill_(~row.allowed_mask, -inf)
        if row.banned_ids is not None:
            values_V.index_fill_(0, row.banned_ids, -inf)
    return LogitGroups.of(values_NW, size=groups.size)


def lanes(ways: Sequence[Way | None]) -> Iterator[tuple[Way, list[int]]]:
    """The ways and the numbers of rows that take them, some at a time."""
    numbers: dict[Way, list[int]] = {}
    for number, way in enumerate(ways):
        if way is not None:
            numbers.setdefault(way, []).append(number)
    for way, members in numbers.items():
        for start in range(0, len(members), _ROWS_AT_ONCE):
            yield way, members[start : start + _ROWS_AT_ONCE]
