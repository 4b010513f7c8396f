"""Target scores and assistants of a lane's tokens to fused scores. Called by batch_sampler. Writes no formula: those
are in reference.py.

Legend: R rows of logits, W their width, N rows of the lane, C tokens of all rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from uld_kernels import reference, rules
from uld_kernels.lane import Lane
from uld_kernels.logit_groups import Found, LogitGroups
from uld_kernels.normalizers import log_sum_exps
from uld_kernels.rows import LateRows, Term

_PAIRS = (rules.PAIR_LINEAR, rules.PAIR_RANK)


@dataclass(frozen=True, slots=True)
class Assistants:
    """Reads the other streams of a lane's rows, which have terms of the same kinds."""

    lane: Lane
    logits_RW: torch.Tensor
    late: LateRows | None
    _normalizers: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)

    def fused(self, found: Found) -> Found:
        """Fused scores of target scores; NaN where an assistant is not finite."""
        terms = self.lane.terms()
        if len(terms) == 1:
            return found.valued(self._one(found, terms[0]))
        penalties = [self._penalty(found, number, term) for number, term in enumerate(terms)]
        scores_C = reference.compose(found.value_C, penalties, mode=self.lane.rows[0].compose)
        return found.valued(scores_C)

    def _one(self, found: Found, terms: tuple[Term, ...]) -> torch.Tensor:
        a_C = self.scores(found, [term.row_a for term in terms])
        strength_C = self._strengths(terms).index_select(0, found.row_C)
        if terms[0].kind == rules.SUBTRACT:
            return reference.subtract(found.value_C, a_C, strength=strength_C)
        zone_C = self._zones(terms).index_select(0, found.row_C)
        return reference.relu_difference(found.value_C, a_C, strength=strength_C, dead_zone=zone_C)

    def _penalty(self, found: Found, number: int, terms: tuple[Term, ...]) -> torch.Tensor:
        strength_C = self._strengths(terms).index_select(0, found.row_C)
        a_C = self.scores(found, [term.row_a for term in terms])
        if terms[0].kind == rules.RELU_DIFFERENCE:
            zone_C = self._zones(terms).index_select(0, found.row_C)
            return reference.relu_difference_penalty(
                found.value_C, a_C, strength=strength_C, dead_zone=zone_C
            )
        key = number, "row_a"
        if key not in self._normalizers:
            self._normalizers[key] = self._log_sums([term.row_a for term in terms])
        log_a_C = a_C - self._normalizers[key].index_select(0, found.row_C)
        vocab_size = self.lane.groups.size
        return reference.subtract_penalty(log_a_C, strength=strength_C, vocab_size=vocab_size)

    def _strengths(self, terms: tuple[Term, ...]) -> torch.Tensor:
        return self.lane.column([term.strength for term in terms])

    def _zones(self, terms: tuple[Term, ...]) -> torch.Tensor:
        return self.lane.column([term.dead_zone for term in terms])

    def scores(self, found: Found, rows: list[int]) -> torch.Tensor:
        """(C,) fp32 of one stream a lane's row; NaN where it is not finite."""
        row_N = torch.tensor(rows, device=found.id_C.device)
        row_C, num_rows = row_N.index_select(0, found.row_C), self.logits_RW.shape[0]
        if self.late is None or max(rows) < num_rows:
            a_C = self._whole(row_C, found.id_C)
        else:
            a_C = self.late.scores_each((row_C - num_rows).clamp_min_(0), found.id_C)
            if min(rows) < num_rows:
                whole_C = self._whole(row_C.clamp_max(num_rows - 1), found.id_C)
                a_C = torch.where(row_C < num_rows, whole_C, a_C)
        return a_C + (a_C - a_C)  # inf - inf is NaN

    def _whole(self, row_C: torch.Tensor, id_C: torch.Tensor) -> torch.Tensor:
        if not self.logits_RW.is_contiguous():
            return self.logits_RW[row_C, id_C].float()
        place_C = row_C * self.logits_RW.shape[1] + id_C
        return self.logits_RW.view(-1).index_select(0, place_C).float()

    def _log_sums(self, rows: list[int]) -> torch.Tensor:
        """(N,) fp32 normalisers of one whole stream a row. Raises RowsFailed where one is not finite."""
        row_N = torch.tensor(rows, device=self.logits_RW.device)
        whole_NW = self.logits_RW.index_select(0, row_N)
        groups = LogitGroups.of(whole_NW[:, : self.lane.groups.size].float())
        self.lane.fail_where(~groups.max_NG.amax(-1).isfinite(), rules.NUMERICAL)
        return log_sum_exps(groups).float()


def rare(terms: tuple[Term, ...], *, num_rows: int) -> bool:
    """Whether a row has pairs, or normalises an assistant that is late: these are not read here."""
    if any(term.kind in _PAIRS for term in terms):
        return True
    return len(terms) > 1 and any(t.kind == rules.SUBTRACT and t.row_a >= num_rows for t in terms)
