"""From the last hidden rows of target and assistants to the fused logits that vLLM draws from: the served rule. Called
by the model's compute_logits. Knows no vLLM.

Shapes: B tokens to draw, S streams, D model width, W width of the LM head, V real vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from uld_kernels import FusedOutput, SampleRow, fused_scores, rules

from uld_serve.engine.sampler import terms_of
from uld_serve.engine.streams import Plan
from uld_serve.errors import NumericalError
from uld_serve.model.head import Head


@dataclass(slots=True)
class ServedRule:
    """One plan for all tokens; a row of its own for each."""

    plan: Plan
    head: Head
    vocab_size: int
    protected_ids: torch.Tensor
    _digests: tuple[int, ...] = field(init=False)
    _is_apart: bool = False

    def __post_init__(self) -> None:
        self._digests = tuple(sorted(term.tag for term in self.plan.terms))

    @property
    def num_blocks(self) -> int:
        return 1 + len(self.plan.streams)

    def logits(self, hidden_BX: torch.Tensor, *, is_rehearsal: bool = False) -> torch.Tensor:
        """(B, W) fp32 of (B, (1 + S) * D): a row's target and then its streams, side by side. Filtered tokens, and the
        padding of the head, are -inf.

        Raises NumericalError where a stream's scores are not finite: there is no row to draw from then. In a rehearsal,
        whose tokens nobody gets, such rows are -inf everywhere.
        """
        width = self.head.weight_WD.shape[0]
        num_rows = hidden_BX.shape[0]
        if num_rows == 0:
            return hidden_BX.new_empty(0, width, dtype=torch.float32)
        hidden_SBD = hidden_BX.view(num_rows, self.num_blocks, -1).transpose(0, 1)
        if not (is_rehearsal or self._is_apart):
            self._check_apart(hidden_SBD)
        is_late = bool(self.plan.streams) and all(stream.is_late for stream in self.plan.streams)
        whole_RD = (hidden_SBD[:1] if is_late else hidden_SBD).flatten(0, 1)
        late = self.head.late(hidden_SBD[1:].flatten(0, 1)) if is_late else None
        out = fused_scores(
            self.head.logits(whole_RD),
            [self._row(number, num_rows) for number in range(num_rows)],
            vocab_size=self.vocab_size,
            protected_ids=self.protected_ids,
            late=late,
        )
        self._check(out, is_rehearsal=is_rehearsal)
        return F.pad(out.scores_BV, (0, width - self.vocab_size), value=-torch.inf)

    def _check_apart(self, hidden_SBD: torch.Tensor) -> None:
        """Once, with the first tokens that count: an assistant whose rows are the target's own has lost its adapter on
        the way through vLLM, and subtracting it would leave the base's answers."""
        for number, stream_BD in enumerate(hidden_SBD[1:]):
            if torch.equal(stream_BD, hidden_SBD[0]):
                raise AssertionError(f"stream {number} says what the target says: its adapter is not applied")
        self._is_apart = True

    def _row(self, number: int, num_rows: int) -> SampleRow:
        streams = tuple(number + block * num_rows for block in range(1, self.num_blocks))
        return SampleRow(
            row_b=number,
            terms=terms_of(self.plan, streams),
            compose=rules.COMPOSE_CODES[self.plan.compose],
            is_measured=False,
        )

    def _check(self, out: FusedOutput, *, is_rehearsal: bool) -> None:
        if any(tuple(sorted(digests)) != self._digests for digests in out.digests):
            raise AssertionError("the scores were combined with other profiles than this server's")
        wrong = out.status_B != rules.OK
        if wrong.any() and not is_rehearsal:
            raise NumericalError(
                f"{int(wrong.sum())} of {len(out.digests)} rows have no scores to draw from (status "
                f"{int(out.status_B.max())}); vLLM stops here, and nothing was drawn"
            )
