"""From the streams of one row to its fused scores, in plain torch. Called by sampler_reference.

After a filter it works on the survivors alone, ids ascending, so that every argmax resolves ties to the
lowest id. Writes no formula: those are in reference.py. Knows no sampling parameter.

Legend: R rows of logits, W their width (>= V), V real vocabulary, K survivors of one row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf, isfinite, log, nan

import torch

from uld_kernels import reference, rules
from uld_kernels.logit_groups import Found, LogitGroups, containing_largest
from uld_kernels.measure import measures_of_lists
from uld_kernels.normalizers import log_sum_exp, log_sum_exps
from uld_kernels.protection import protected
from uld_kernels.rows import LateRows, SampleRow, Term
from uld_kernels.segments import true_indices

# So many of the target's best tokens tell how far down the others could matter.
_NUM_TOP = 32
_BOUND_SLACK = 1e-3


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


class RowFailure(Exception):
    """A row that has no token to give; `status` says why. Ends that row only."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def fuse(streams: Streams, row: SampleRow, *, protected_ids: torch.Tensor, is_measured: bool = True) -> Fused:
    """Bans, pre-filter, combine, fused filter, protection. Raises RowFailure."""
    b_V = streams.read(row.row_b)
    lowest, highest = _extremes(b_V)
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


def _extremes(values: torch.Tensor) -> tuple[float, float]:
    # torch's aminmax takes fifteen times as long as the two apart.
    return values.amin().item(), values.amax().item()


def gather(values_V: torch.Tensor, ids_K: torch.Tensor) -> torch.Tensor:
    """values_V[ids_K], without the copy where nothing was filtered."""
    return values_V if ids_K.shape[0] == values_V.shape[0] else values_V[ids_K]


class Streams:
    """Reads rows of the logits as fp32 (fp64 stays fp64) without the padded head columns; late rows where asked."""

    def __init__(self, logits_RV: torch.Tensor, vocab_size: int, late: LateRows | None = None) -> None:
        self._logits_RV = logits_RV
        self._vocab_size = vocab_size
        self._late = late
        self._normalizers: dict[int, float] = {}
        self._dtype = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32

    def read(self, row: int) -> torch.Tensor:
        num_rows = self._logits_RV.shape[0]
        if row >= num_rows and self._late is not None:
            every_id_V = torch.arange(self._vocab_size, device=self._logits_RV.device)
            return self._late.scores(row - num_rows, every_id_V).to(self._dtype)
        return self._logits_RV[row, : self._vocab_size].to(self._dtype)

    def kept(self, row: int, ids_K: torch.Tensor) -> torch.Tensor:
        """The logits of one assistant on the kept tokens, which must all be finite."""
        num_rows = self._logits_RV.shape[0]
        if row >= num_rows and self._late is not None:
            stream_K = self._late.scores(row - num_rows, ids_K).to(self._dtype)
        else:
            stream_K = gather(self.read(row), ids_K)
        if stream_K.shape[0] > 0 and not all(map(isfinite, _extremes(stream_K))):
            raise RowFailure(rules.NUMERICAL)
        return stream_K

    def normalize(self, rows: Collection[int]) -> None:
        """Computes what kept_log wants to know of some rows, at once. They are not late."""
        groups = LogitGroups.of(self.rows(sorted(rows)))
        is_finite = groups.max_NG.amax(-1).isfinite().tolist()
        finite = [place for place, finite in enumerate(is_finite) if finite]
        values = log_sum_exps(groups.select(finite)).tolist()
        self._normalizers.update(zip((sorted(rows)[place] for place in finite), values, strict=True))

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """(len(rows), V)."""
        first, last = rows[0], rows[-1]
        if list(rows) == list(range(first, last + 1)):
            chosen_NW = self._logits_RV[first : last + 1]
        else:
            chosen_NW = self._logits_RV[torch.tensor(rows, device=self._logits_RV.device)]
        return chosen_NW[:, : self._vocab_size].to(self._dtype)

    def kept_log(self, row: int, ids_K: torch.Tensor) -> torch.Tensor:
        """The same as log-softmax over the whole vocabulary."""
        stream_K = self.kept(row, ids_K)
        normalizer = self._normalizers[row] if row in self._normalizers else log_sum_exp(self.read(row))
        if not isfinite(normalizer):
            raise RowFailure(rules.NUMERICAL)
        return stream_K - normalizer


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


def normalized_rows(rows: Sequence[SampleRow]) -> set[int]:
    """Rows of logits whose normalisers the rules ask for."""
    found = set()
    for row in rows:
        terms = row.distinct_terms
        found.update(t.row_a for t in terms if t.kind == rules.SUBTRACT and len(terms) > 1)
        for term in terms:
            found.update((term.row_q, term.row_p) if term.kind == rules.PAIR_LINEAR else ())
    return found


def combine_whole(streams: Streams, b_V: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """combine() of all tokens of a target whose banned tokens are -inf, and stay so. Raises RowFailure."""
    ids_K = _prefilter(b_V, (), has_holes=b_V.amin().item() == -inf)
    scores_K = combine(streams, b_V, ids_K, row.distinct_terms, row.compose)
    if ids_K.shape[0] == b_V.shape[0]:
        return scores_K
    return torch.full_like(b_V, -inf).index_copy_(0, ids_K, scores_K)


def _apply_one(streams: Streams, b_K: torch.Tensor, ids_K: torch.Tensor, term: Term) -> torch.Tensor:
    if term.kind == rules.SUBTRACT:
        return reference.subtract(b_K, streams.kept(term.row_a, ids_K), strength=term.strength)
    if term.kind == rules.RELU_DIFFERENCE:
        return reference.relu_difference(b_K, streams.kept(term.row_a, ids_K), strength=term.strength)
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
        return reference.relu_difference_penalty(b_K, streams.kept(term.row_a, ids_K), strength=term.strength)
    if term.kind == rules.PAIR_LINEAR:
        log_q_K, log_p_K = streams.kept_log(term.row_q, ids_K), streams.kept_log(term.row_p, ids_K)
        return reference.pair_linear_penalty(log_q_K, log_p_K, strength=term.strength)
    return torch.where(_rank_removed(streams, ids_K, term), inf, torch.zeros_like(b_K))


def _rank_removed(streams: Streams, ids_K: torch.Tensor, term: Term) -> torch.Tensor:
    streams.kept(term.row_q, ids_K)
    streams.kept(term.row_p, ids_K)
    q_V, p_V = streams.read(term.row_q), streams.read(term.row_p)
    # NaN compares false: the k-th largest would remove nothing, so a NaN anywhere ends the row.
    if (p_V - q_V).isnan().any().item():
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
