"""Which late assistants can be scored on a list of tokens, and the others made whole. Called by pack and by the Triton
sampler. Knows no launch.

Legend: R rows of logits, W their width, A late rows, V real vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import floor
from typing import Final

import torch

from uld_kernels import rules
from uld_kernels.rows import LateRows, SampleRow, Term

# What a row's late assistants are scored on: what its filter on the target leaves, or what a fused filter could.
NOT_LATE: Final = 0
LATE_BY_TARGET: Final = 1
LATE_BY_SCORE: Final = 2


def filter_keep(term: Term, vocab_size: int) -> int:
    """min_keep of the filter on the target; 0 where there is none."""
    if term.filter_mode == rules.PLAUSIBILITY:
        return min(term.min_keep, vocab_size)
    # floor gives 0 where the published code keeps everything.
    return floor(term.tau * vocab_size) if term.filter_mode == rules.OFFICIAL else 0


def late_list_of(terms: tuple[Term, ...], *, first_late: int | None, vocab_size: int) -> int | None:
    """NOT_LATE, LATE_BY_TARGET or LATE_BY_SCORE of a row with these distinct terms, of whose streams those from row
    `first_late` on are late; None for one that asks for a late stream on the whole vocabulary."""
    if first_late is None or all(last_stream(term) < first_late for term in terms):
        return NOT_LATE
    if not all(_is_pointwise(term, len(terms)) for term in terms if last_stream(term) >= first_late):
        return None
    if any(filter_keep(term, vocab_size) > 0 for term in terms):
        return LATE_BY_TARGET
    # No such rule raises a score, so that a token far enough below the best fused score cannot stay.
    never_raises = all(term.kind == rules.RELU_DIFFERENCE for term in terms)
    is_fused = any(term.filter_mode == rules.FUSED for term in terms)
    return LATE_BY_SCORE if never_raises and is_fused else None


def may_look_further(terms: tuple[Term, ...], *, first_late: int) -> bool:
    """Whether a row could be LATE_BY_SCORE with some vocabulary."""
    if all(last_stream(term) < first_late for term in terms):
        return False
    return all(term.filter_mode != rules.PLAUSIBILITY for term in terms)


def last_stream(term: Term) -> int:
    """The largest row that a term reads beside the target's."""
    return max(term.row_a, term.row_q, term.row_p)


def whole_where_needed(
    logits_RW: torch.Tensor, rows: Sequence[SampleRow], late: LateRows, *, vocab_size: int
) -> tuple[torch.Tensor, list[SampleRow]]:
    """Logits and rows in which late streams that no list serves have become rows of logits, behind the others.

    Late rows then count from the new number of rows on. Which way a row takes hangs on that row alone.
    """
    first_late = logits_RW.shape[0]
    kinds = [late_list_of(row.distinct_terms, first_late=first_late, vocab_size=vocab_size) for row in rows]
    wanted = sorted(
        {
            index
            for row, kind in zip(rows, kinds, strict=True)
            if kind is None
            for term in row.terms
            for index in (term.row_a, term.row_q, term.row_p)
            if index >= first_late
        }
    )
    if not wanted:
        return logits_RW, list(rows)
    places = torch.tensor([index - first_late for index in wanted], device=late.hidden_AD.device)
    whole = replace(late, hidden_AD=late.hidden_AD.index_select(0, places)).all_scores()
    now_whole = {index: first_late + place for place, index in enumerate(wanted)}
    shifted = {
        index: index + len(wanted) for index in range(first_late, first_late + late.hidden_AD.shape[0])
    }
    renumbered = [
        _renumbered(row, now_whole if kind is None else shifted)
        for row, kind in zip(rows, kinds, strict=True)
    ]
    return torch.cat([logits_RW.float(), whole]), renumbered


def _is_pointwise(term: Term, num_terms: int) -> bool:
    """Whether a term asks of its assistant nothing but the logits of the tokens that are scored."""
    return term.kind == rules.RELU_DIFFERENCE or (term.kind == rules.SUBTRACT and num_terms == 1)


def _renumbered(row: SampleRow, number: dict[int, int]) -> SampleRow:
    def moved(index: int) -> int:
        return number.get(index, index)

    terms = tuple(
        replace(term, row_a=moved(term.row_a), row_q=moved(term.row_q), row_p=moved(term.row_p))
        for term in row.terms
    )
    return replace(row, terms=terms)
