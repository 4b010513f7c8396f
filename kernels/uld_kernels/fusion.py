"""From the streams of one row to its fused scores, in plain torch. Called by sampler_reference.

After a filter it works on the survivors alone, ids ascending, so that every argmax resolves ties to the
lowest id. Writes no formula: those are in reference.py. Knows no sampling parameter.

Legend: R rows of logits, W their width (>= V), V real vocabulary, K survivors of one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, log, nan

import torch

from uld_kernels import reference, rules
from uld_kernels.logit_groups import Found, LogitGroups, containing_largest
from uld_kernels.measure import measures_of_lists
from uld_kernels.normalizers import log_sum_exp
from uld_kernels.protection import protected
from uld_kernels.rows import SampleRow, Term
from uld_kernels.segments import true_indices
from uld_kernels.streams import RowFailure, Streams, extremes, gather

# So many of the target's best tokens tell how far down the others could matter.
_NUM_TOP = 32
_BOUND_SLACK = 1e-3
_ONE_ASSISTANT = (rules.SUBTRACT, rules.RELU_DIFFERENCE)


@dataclass(frozen=True, slots=True)
class Fused:
    """The scores of one row after bans, filters, rules and protection; log-probabilities are of these."""

    ids_K: torch.Tensor
    """int64, ascending."""
    scores_K: torch.Tensor
    """Finite."""
    lse: float = nan
    target_lse: float = nan
    kl: float = nan
    argmax_changed: bool = False

    @property
    def found(self) -> Found:
        return Found(torch.zeros_like(self.ids_K), self.ids_K, self.scores_K)

    @property
    def num_kept(self) -> int:
        return self.ids_K.shape[0]

    def score_of(self, token: int) -> float:
        """The score of one token; -inf if it was filtered."""
        at = int(torch.searchsorted(self.ids_K, token).item())
        is_kept = at < self.num_kept and self.ids_K[at].item() == token
        return float(self.scores_K[at].item()) if is_kept else -inf


def fuse(streams: Streams, row: SampleRow, *, protected_ids: torch.Tensor, is_measured: bool = True) -> Fused:
    """Bans, pre-filter, combine, fused filter, protection. Raises RowFailure."""
    b_V = streams.read(row.row_b)
    lowest, highest = extremes(b_V)
    if not highest < inf:
        raise RowFailure(rules.NUMERICAL)
    if row.banned_ids is not None or row.allowed_mask is not None:
        b_V = _ban(b_V, row)
        lowest = -inf
    terms = row.distinct_terms
    ids_K = _prefilter(b_V, terms, has_holes=lowest == -inf)
    if not terms:
        b_K = gather(b_V, ids_K)
        if not is_measured:
            return Fused(ids_K, b_K)
        lse = log_sum_exp(b_V)
        return Fused(ids_K, b_K, lse=lse, target_lse=lse, kl=0.0, argmax_changed=False)
    fused_tau = max((term.tau for term in terms if term.filter_mode == rules.FUSED), default=0.0)
    if fused_tau > 0.0 and all(term.kind == rules.RELU_DIFFERENCE for term in terms):
        ids_K = _reachable(streams, b_V, ids_K, terms, row.compose, tau=fused_tau)
    scores_K = combine(streams, b_V, ids_K, terms, row.compose)
    ids_K, scores_K = _compress(ids_K, scores_K, scores_K > -inf)
    if fused_tau > 0.0 and ids_K.shape[0] > 0:
        ids_K, scores_K = _compress(ids_K, scores_K, reference.fused_keep(scores_K, tau=fused_tau))
    target_lse = None
    if protected_ids.shape[0] > 0 and any(term.protect for term in terms):
        ids_K, scores_K, target_lse = _protect(b_V, ids_K, scores_K, protected_ids)
    if ids_K.shape[0] == 0:
        raise RowFailure(rules.NOTHING_KEPT)
    if not is_measured:
        return Fused(ids_K, scores_K)
    return _measured(b_V, ids_K, scores_K, log_sum_exp(b_V) if target_lse is None else target_lse)


def _ban(b_V: torch.Tensor, row: SampleRow) -> torch.Tensor:
    if row.allowed_mask is not None:
        b_V = b_V.masked_fill(~row.allowed_mask, -inf)
    if row.banned_ids is not None:
        b_V = b_V.index_fill(0, row.banned_ids, -inf)
    return b_V


def _prefilter(b_V: torch.Tensor, terms: tuple[Term, ...], *, has_holes: bool) -> torch.Tensor:
    """Ids that bans and the filters on the target leave; of these nested filters the strictest decides."""
    threshold = -inf
    for term in terms:
        if term.filter_mode == rules.PLAUSIBILITY:
            largest_K = containing_largest(b_V, term.min_keep)
            kept_from = reference.plausibility_threshold(largest_K, tau=term.tau, min_keep=term.min_keep)
            threshold = max(threshold, kept_from.item())
        elif term.filter_mode == rules.OFFICIAL:
            threshold = max(threshold, reference.official_threshold(b_V, tau=term.tau).item())
    if threshold == -inf and not has_holes:
        return torch.arange(b_V.shape[0], device=b_V.device)
    keep_V = b_V >= threshold if threshold > -inf else b_V > -inf
    ids_K = true_indices(keep_V)
    if ids_K.shape[0] == 0:
        raise RowFailure(rules.NOTHING_KEPT)
    return ids_K


def _reachable(
    streams: Streams,
    b_V: torch.Tensor,
    ids_K: torch.Tensor,
    terms: tuple[Term, ...],
    mode: int,
    *,
    tau: float,
) -> torch.Tensor:
    """Of `ids_K` those that a fused filter could leave under relu_difference, which never raises a score: nothing
    whose b is below the best fused score plus log tau. That score is at least the best one of the target's top."""
    b_K = gather(b_V, ids_K)
    kth = containing_largest(b_K, _NUM_TOP).topk(min(_NUM_TOP, ids_K.shape[0])).values.amin()
    best_K = ids_K[true_indices(b_K >= kth)]
    best = combine(streams, b_V, best_K, terms, mode).max().item()
    # A little below: the filter compares rounded numbers.
    lowest = best + log(tau) - _BOUND_SLACK
    if ids_K.shape[0] == b_V.shape[0]:
        return true_indices(b_V >= lowest)
    return ids_K[b_V[ids_K] >= lowest]


def combine(
    streams: Streams, b_V: torch.Tensor, ids_K: torch.Tensor, terms: tuple[Term, ...], mode: int
) -> torch.Tensor:
    """Fused scores of some tokens before the fused filter. Raises RowFailure."""
    b_K = gather(b_V, ids_K)
    if len(terms) == 1:
        return _apply_one(streams, b_K, ids_K, terms[0])
    penalties = [_penalty(streams, b_K, ids_K, term, vocab_size=b_V.shape[0]) for term in terms]
    return reference.compose(b_K, penalties, mode=mode)


def whole_rows(rows: Sequence[SampleRow]) -> tuple[set[int], set[int]]:
    """Rows of logits that combine_whole reads for some rows, and those whose normalisers it asks for."""
    read: set[int] = set()
    normalized: set[int] = set()
    for row in rows:
        terms = row.distinct_terms
        for term in terms:
            streams = {term.row_a} if term.kind in _ONE_ASSISTANT else {term.row_q, term.row_p}
            read |= streams
            if term.kind == rules.PAIR_LINEAR or (term.kind == rules.SUBTRACT and len(terms) > 1):
                normalized |= streams
    return read, normalized


def combine_whole(streams: Streams, b_V: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """combine() of all tokens of a target whose banned tokens are -inf, and stay so. Raises RowFailure."""
    if b_V.amin().item() > -inf:
        return combine(streams, b_V, streams.every_id(), row.distinct_terms, row.compose)
    ids_K = _prefilter(b_V, (), has_holes=True)
    scores_K = combine(streams, b_V, ids_K, row.distinct_terms, row.compose)
    return torch.full_like(b_V, -inf).index_copy_(0, ids_K, scores_K)


def _apply_one(streams: Streams, b_K: torch.Tensor, ids_K: torch.Tensor, term: Term) -> torch.Tensor:
    if term.kind == rules.SUBTRACT:
        return reference.subtract(b_K, streams.kept(term.row_a, ids_K), strength=term.strength)
    if term.kind == rules.RELU_DIFFERENCE:
        a_K = streams.kept(term.row_a, ids_K)
        return reference.relu_difference(b_K, a_K, strength=term.strength, dead_zone=term.dead_zone)
    if term.kind == rules.PAIR_LINEAR:
        log_q_K, log_p_K = streams.kept_log(term.row_q, ids_K), streams.kept_log(term.row_p, ids_K)
        return reference.pair_linear(b_K, log_q_K, log_p_K, strength=term.strength)
    return b_K.masked_fill(_rank_removed(streams, ids_K, term), -inf)


def _penalty(
    streams: Streams, b_K: torch.Tensor, ids_K: torch.Tensor, term: Term, *, vocab_size: int
) -> torch.Tensor:
    if term.kind == rules.SUBTRACT:
        log_a_K = streams.kept_log(term.row_a, ids_K)
        return reference.subtract_penalty(log_a_K, strength=term.strength, vocab_size=vocab_size)
    if term.kind == rules.RELU_DIFFERENCE:
        a_K = streams.kept(term.row_a, ids_K)
        return reference.relu_difference_penalty(b_K, a_K, strength=term.strength, dead_zone=term.dead_zone)
    if term.kind == rules.PAIR_LINEAR:
        log_q_K, log_p_K = streams.kept_log(term.row_q, ids_K), streams.kept_log(term.row_p, ids_K)
        return reference.pair_linear_penalty(log_q_K, log_p_K, strength=term.strength)
    return torch.where(_rank_removed(streams, ids_K, term), inf, torch.zeros_like(b_K))


def _rank_removed(streams: Streams, ids_K: torch.Tensor, term: Term) -> torch.Tensor:
    streams.kept(term.row_q, ids_K)
    streams.kept(term.row_p, ids_K)
    q_V, p_V = streams.read(term.row_q), streams.read(term.row_p)
    # NaN compares false: the k-th largest would remove nothing, so a NaN anywhere ends the row.
    if not (streams.is_finite(term.row_q) and streams.is_finite(term.row_p)) and (p_V - q_V).isnan().any():
        raise RowFailure(rules.NUMERICAL)
    return reference.pair_rank_removed(q_V, p_V, rank_k=term.rank_k)[ids_K]


def _compress(
    ids_K: torch.Tensor, scores_K: torch.Tensor, keep_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if keep_K.all():
        return ids_K, scores_K
    return ids_K[keep_K], scores_K[keep_K]


def _protect(
    b_V: torch.Tensor, ids_K: torch.Tensor, scores_K: torch.Tensor, protected_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    kept = Found(torch.zeros_like(ids_K), ids_K, scores_K)
    whole, target_lse_N = protected(kept, LogitGroups.of(b_V[None]), protected_ids)
    return whole.id_C, whole.value_C, float(target_lse_N.item())


def _measured(b_V: torch.Tensor, ids_K: torch.Tensor, scores_K: torch.Tensor, target_lse: float) -> Fused:
    kept = Found(torch.zeros_like(ids_K), ids_K, scores_K)
    of_target = torch.tensor([target_lse], dtype=torch.float64, device=ids_K.device)
    measures = measures_of_lists(kept, gather(b_V, ids_K), of_target, b_V.argmax()[None])
    lse = measures.lse_N.item()
    if not isfinite(lse):
        raise RowFailure(rules.NUMERICAL)
    return Fused(
        ids_K,
        scores_K,
        lse=lse,
        target_lse=target_lse,
        kl=measures.kl_N.item(),
        argmax_changed=bool(measures.changed_N.item()),
    )
