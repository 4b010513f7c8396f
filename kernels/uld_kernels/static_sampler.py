"""fused_sample with everything fixed but data, so that a CUDA graph can hold it: SampleShape and StaticSampler.

Called by engines, once a padded batch size. Knows no request and no schedule.

Legend: R rows of logits, V real vocabulary, B rows to draw, N listed alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from uld_kernels import rules, sampler_reference
from uld_kernels.rows import SampleOutput, SampleRow

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
    """Some row composes `subtract` or `pair_linear` with another term."""
    needs_ranks: bool = False
    """Some row has a term of `pair_rank`."""
    num_touched: int = 0
    """Token ids in bans, histories and biases of all rows together."""
    num_masks: int = 0
    """Rows with a grammar mask."""

    @classmethod
    def of(cls, rows: Sequence[SampleRow], *, num_rows: int) -> SampleShape:
        """The smallest padded shape that covers `rows`. Raises ValueError if they are more than num_rows."""
        if len(rows) > num_rows:
            raise ValueError(f"{len(rows)} rows do not fit a shape of {num_rows}")
        return cls(
            num_rows=num_rows,
            max_terms=_padded(max((len(row.distinct_terms) for row in rows), default=1), least=1),
            max_logprobs=_padded(max((row.num_logprobs for row in rows), default=0), least=1),
            num_special=min(num_rows, _padded(sum(map(_is_special, rows)), least=1)),
            needs_normalizers=any(map(_needs_normalizers, rows)),
            needs_ranks=any(map(_needs_ranks, rows)),
            num_touched=_padded(sum(map(num_touched, rows)), least=_LEAST_TOUCHED),
            num_masks=min(num_rows, _padded(sum(row.allowed_mask is not None for row in rows), least=1)),
        )

    def covers(self, rows: Sequence[SampleRow]) -> bool:
        """Whether a sampler of this shape can be filled with `rows`."""
        return (
            len(rows) <= self.num_rows
            and all(len(row.distinct_terms) <= self.max_terms for row in rows)
            and all(row.num_logprobs <= self.max_logprobs for row in rows)
            and sum(map(_is_special, rows)) <= self.num_special
            and (self.needs_normalizers or not any(map(_needs_normalizers, rows)))
            and (self.needs_ranks or not any(map(_needs_ranks, rows)))
            and sum(map(num_touched, rows)) <= self.num_touched
            and sum(row.allowed_mask is not None for row in rows) <= self.num_masks
        )


class StaticSampler:
    """One batch of one shape: fill it with rows, run it on logits, read its output; over and over."""

    def __init__(
        self, shape: SampleShape, *, vocab_size: int, protected_ids: torch.Tensor, device: torch.device
    ) -> None:
        """`protected_ids` as in fused_sample, on `device`."""
        self.shape = shape
        self.vocab_size = vocab_size
        self.device = device
        self._protected_ids = protected_ids
        self._rows: list[SampleRow] = []
        self._output: SampleOutput | None = None

    @property
    def is_recordable(self) -> bool:
        """Whether `run` may be recorded in a CUDA graph: only the Triton kernels are."""
        return False

    def fill(self, rows: Sequence[SampleRow]) -> None:
        """What the next run draws. Never waits for the device; an earlier run may still be going on.

        Raises ValueError if the shape does not cover `rows`.
        """
        if not self.shape.covers(rows):
            raise ValueError(
                f"{self.shape} does not cover these {len(rows)} rows; make one with SampleShape.of"
            )
        self._rows = list(rows)

    def run(self, logits_RV: torch.Tensor) -> None:
        """Draws one token for each row of the last fill from (R, W) logits."""
        self._output = sampler_reference.sample(
            logits_RV, self._rows, vocab_size=self.vocab_size, protected_ids=self._protected_ids
        )

    def output(self) -> SampleOutput:
        """What the last run drew, for the rows of the last fill; its tensors are overwritten by the next run."""
        if self._output is None:
            raise ValueError("nothing has been run yet")
        return self._output


def num_touched(row: SampleRow) -> int:
    """How many entries of bans, history and bias a row brings along."""
    parts = [row.banned_ids, None if row.logit_bias is None else row.logit_bias[0]]
    if _has_history(row):
        parts += [row.prompt_ids, row.output_ids]
    return sum(part.shape[0] for part in parts if part is not None)


def _has_history(row: SampleRow) -> bool:
    return (row.repetition_penalty, row.presence_penalty, row.frequency_penalty) != (1.0, 0.0, 0.0)


def _is_special(row: SampleRow) -> bool:
    has_bans = row.banned_ids is not None or row.allowed_mask is not None
    return has_bans or row.logit_bias is not None or _has_history(row)


def _needs_normalizers(row: SampleRow) -> bool:
    terms = row.distinct_terms
    return len(terms) > 1 and any(term.kind in (rules.SUBTRACT, rules.PAIR_LINEAR) for term in terms)


def _needs_ranks(row: SampleRow) -> bool:
    return any(term.kind == rules.PAIR_RANK for term in row.terms)


def _padded(number: int, *, least: int) -> int:
    """0, or the next power of two from `least` on."""
    return 0 if number == 0 else max(least, 1 << (number - 1).bit_length())
