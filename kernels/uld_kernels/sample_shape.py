"""SampleShape: what a batch may hold at most, padded to few different ones. Made by engines and by ops.

Knows no tensor layout (pack.py) and no launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uld_kernels import rules
from uld_kernels.late import may_look_further
from uld_kernels.rows import SampleRow, Term

_LEAST_TOUCHED = 1024


@dataclass(frozen=True, slots=True)
class SampleShape:
    """What a batch may hold at most. Padded, so that a serving day needs few of them."""

    num_rows: int
    max_terms: int = 1
    max_logprobs: int = 0
    num_special: int = 0
    """Rows with bans, history penalties or bias."""
    needs_normalizers: bool = False
    """Some row has a term of `subtract` or `pair_linear` beside another one."""
    needs_ranks: bool = False
    """Some row has a term of `pair_rank`."""
    num_touched: int = 0
    """Token ids in bans, histories and biases of all rows together."""
    num_masks: int = 0
    """Rows with a grammar mask."""
    first_late: int | None = None
    """Streams from this row on are late (LateRows); None where all are rows of logits."""
    looks_further: bool = False
    """Some row's late streams are wanted on what a fused filter could leave, which is found in several looks."""

    @classmethod
    def of(cls, rows: Sequence[SampleRow], *, num_rows: int, first_late: int | None = None) -> SampleShape:
        """The smallest padded shape that covers `rows`. Raises ValueError if they are more than num_rows."""
        if len(rows) > num_rows:
            raise ValueError(f"{len(rows)} rows do not fit a shape of {num_rows}")
        needed = cls._needed(rows, first_late)
        return cls(
            num_rows=num_rows,
            max_terms=_padded(needed.max_terms, least=1),
            max_logprobs=_padded(needed.max_logprobs, least=1),
            num_special=min(num_rows, _padded(needed.num_special, least=1)),
            needs_normalizers=needed.needs_normalizers,
            needs_ranks=needed.needs_ranks,
            num_touched=_padded(needed.num_touched, least=_LEAST_TOUCHED),
            num_masks=min(num_rows, _padded(needed.num_masks, least=1)),
            first_late=first_late,
            looks_further=needed.looks_further,
        )

    def covers(self, rows: Sequence[SampleRow]) -> bool:
        """Whether a sampler of this shape can be filled with `rows`."""
        needed = self._needed(rows, self.first_late)
        return (
            needed.num_rows <= self.num_rows
            and needed.max_terms <= self.max_terms
            and needed.max_logprobs <= self.max_logprobs
            and needed.num_special <= self.num_special
            and needed.needs_normalizers <= self.needs_normalizers
            and needed.needs_ranks <= self.needs_ranks
            and needed.num_touched <= self.num_touched
            and needed.num_masks <= self.num_masks
            and needed.looks_further <= self.looks_further
        )

    def check(self, rows: Sequence[SampleRow]) -> None:
        """Raises ValueError if it does not cover `rows`."""
        if not self.covers(rows):
            raise ValueError(f"{self} does not cover these {len(rows)} rows; make one with SampleShape.of")

    @classmethod
    def _needed(cls, rows: Sequence[SampleRow], first_late: int | None) -> SampleShape:
        max_terms, max_logprobs, num_special, touched, num_masks = 1, 0, 0, 0, 0
        needs_normalizers = needs_ranks = looks_further = False
        for row in rows:
            max_logprobs = max(max_logprobs, row.num_logprobs)
            if row.terms:
                terms = row.distinct_terms
                max_terms = max(max_terms, len(terms))
                needs_normalizers |= any(needs_normalizer(term, len(terms)) for term in terms)
                needs_ranks |= any(term.kind == rules.PAIR_RANK for term in terms)
                looks_further |= first_late is not None and may_look_further(terms, first_late=first_late)
            if is_special(row):
                num_special += 1
                touched += num_touched(row)
            num_masks += row.allowed_mask is not None
        return cls(
            len(rows),
            max_terms,
            max_logprobs,
            num_special,
            needs_normalizers,
            needs_ranks,
            touched,
            num_masks,
            first_late,
            looks_further,
        )


def has_history(row: SampleRow) -> bool:
    """Whether what was said before changes this row's scores."""
    penalties = (row.repetition_penalty, row.presence_penalty, row.frequency_penalty)
    return penalties != (1.0, 0.0, 0.0)


def is_special(row: SampleRow) -> bool:
    """Whether single tokens of this row are banned, penalised or biased. A grammar mask is no such list."""
    return row.banned_ids is not None or row.logit_bias is not None or has_history(row)


def num_touched(row: SampleRow) -> int:
    """How many entries of bans, history and bias a row brings along."""
    parts = [row.banned_ids, None if row.logit_bias is None else row.logit_bias[0]]
    if has_history(row):
        parts += [row.prompt_ids, row.output_ids]
    return sum(part.shape[0] for part in parts if part is not None)


def needs_normalizer(term: Term, num_terms: int) -> bool:
    """A single rule may leave out the constants that normalisers add to all its scores."""
    return num_terms > 1 and term.kind in (rules.SUBTRACT, rules.PAIR_LINEAR)


def _padded(number: int, *, least: int) -> int:
    """0, or the next power of two from `least` on."""
    return 0 if number == 0 else max(least, 1 << (number - 1).bit_length())
