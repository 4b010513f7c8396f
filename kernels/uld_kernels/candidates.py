"""The tokens that the filters of a lane's rows leave, and their fused scores. Called by batch_sampler. Knows no
sampling parameter.

Legend: N rows of the lane, G groups of token ids, C tokens of all rows."""

from __future__ import annotations

from collections.abc import Callable
from math import floor, inf, log

import torch

from uld_kernels import reference, rules
from uld_kernels.lane import Lane
from uld_kernels.logit_groups import LOWEST, Found, LogitGroups, kth_largest, merged
from uld_kernels.rows import SampleRow, Term

# How much further down (nats) the next look goes when the tokens looked at are all hushed; it doubles each time.
_FIRST_STEP = 4.0
_BOUND_SLACK = 1e-3

Fuse = Callable[[Found], Found]
"""From target scores of tokens to their fused scores, NaN where an assistant is not finite."""


def fused_tau(row: SampleRow) -> float:
    """The strictest of a row's fused filters; 0 where it has none."""
    return max((term.tau for term in row.terms if term.filter_mode == rules.FUSED), default=0.0)


def kept_by_fused_filter(lane: Lane, fuse: Fuse) -> Found:
    """Of rules that raise no score. Raises RowsFailed."""
    log_tau_N = _log_taus(lane)
    fused, best_N, _ = _within_reach(lane, fuse, log_tau_N)
    _check_best(lane, best_N)
    return _near_best(fused, best_N, log_tau_N)


def best_by_fused_filter(lane: Lane, fuse: Fuse) -> torch.Tensor:
    """(N,): the best token of each row's kept_by_fused_filter, ties by lowest id. Raises RowsFailed."""
    fused, best_N, at_N = _within_reach(lane, fuse, _log_taus(lane))
    _check_best(lane, best_N)
    return fused.id_C.index_select(0, at_N)


def kept_by_target_filter(lane: Lane, fuse: Fuse) -> Found:
    """Of rules behind a filter on the target, and behind it perhaps a fused one. Raises RowsFailed."""
    return kept_of(lane, fuse(_above_thresholds(lane)))


def kept_of(lane: Lane, fused: Found) -> Found:
    """What the fused filter leaves of fused scores, none of which is left out that it could leave. Raises
    RowsFailed."""
    best_N = fused.segments(len(lane.rows)).maxima(fused.value_C)
    _check_best(lane, best_N)
    return _near_best(fused, best_N, _log_taus(lane))


def _check_best(lane: Lane, best_N: torch.Tensor) -> None:
    """Raises RowsFailed where it is not finite. Protected tokens could be left where a rule removes all."""
    if best_N.isfinite().all():
        return
    protects_N = torch.tensor([any(t.protect for t in row.terms) for row in lane.rows], device=best_N.device)
    lane.fail_where((best_N == -inf) & protects_N, None)
    lane.fail_where(best_N == -inf, rules.NOTHING_KEPT)
    lane.fail_where(~best_N.isfinite(), rules.NUMERICAL)


def _near_best(fused: Found, best_N: torch.Tensor, log_tau_N: torch.Tensor) -> Found:
    threshold_N = reference.relative_threshold(best_N, log_tau_N).clamp_min_(LOWEST)
    return fused.where(fused.value_C >= threshold_N.index_select(0, fused.row_C))


def _log_taus(lane: Lane) -> torch.Tensor:
    """(N,); -inf where a row has no fused filter."""
    taus = [fused_tau(row) for row in lane.rows]
    return lane.column([log(tau) if tau > 0.0 else -inf for tau in taus])


def _above_thresholds(lane: Lane) -> Found:
    """What the filters on the target leave; of these nested filters the strictest decides."""
    filters = [_target_filters(row, lane.groups.size) for row in lane.rows]
    sizes = sorted({min_keep for row in filters for _, min_keep in row})
    low_N = lane.column([min(log(tau) for tau, _ in row) for row in filters]) + lane.best_N
    cut, reach_N = lane.groups.holding_largest(sizes[-1])
    found = cut.at_least(torch.minimum(low_N, reach_N).clamp_min_(LOWEST)[:, None])
    kth = {size: _kth_values(found, size, num_rows=len(lane.rows)) for size in sizes}
    threshold_N = torch.full_like(lane.best_N, LOWEST)
    for place in range(max(map(len, filters))):
        # A row with fewer filters takes its last one again.
        chosen = [row[min(place, len(row) - 1)] for row in filters]
        kth_N = kth[sizes[0]]
        for size in sizes[1:]:
            has_size_N = torch.tensor([min_keep == size for _, min_keep in chosen], device=kth_N.device)
            kth_N = torch.where(has_size_N, kth[size], kth_N)
        near_N = reference.relative_threshold(lane.best_N, lane.column([log(tau) for tau, _ in chosen]))
        threshold_N = torch.maximum(threshold_N, torch.minimum(near_N, kth_N))
    return found.where(found.value_C >= threshold_N.index_select(0, found.row_C))


def _target_filters(row: SampleRow, vocab_size: int) -> list[tuple[float, int]]:
    """tau and min_keep of each."""
    return [
        (term.tau, least_kept(term, vocab_size))
        for term in row.distinct_terms
        if term.filter_mode in (rules.PLAUSIBILITY, rules.OFFICIAL)
    ]


def least_kept(term: Term, vocab_size: int) -> int:
    """How many of the target's best tokens a filter on it leaves in any case."""
    if term.filter_mode == rules.OFFICIAL:
        return floor(term.tau * vocab_size)
    return min(term.min_keep, vocab_size)


def _kth_values(found: Found, k: int, *, num_rows: int) -> torch.Tensor:
    """(N,): the k-th largest of what was found of each row; the lowest number where there are fewer."""
    padded_NK = found.segments(num_rows).padded(found.value_C, fill=LOWEST)
    if padded_NK.shape[1] < k:
        return padded_NK.new_full((num_rows,), LOWEST)
    return kth_largest(padded_NK, k)


def _within_reach(
    lane: Lane, fuse: Fuse, log_tau_N: torch.Tensor
) -> tuple[Found, torch.Tensor, torch.Tensor]:
    """Fused scores of all tokens that the fused filter could leave, the best of each row, and where its first is.

    No score is raised, so that nothing further below the target's best token than the best fused score plus log tau
    can stay. That score is at least the best one of the tokens looked at so far: looks go down until they have
    reached what it rules out. NaN is the best of a row whose assistant is not finite.
    """
    distance_N = log_tau_N - _BOUND_SLACK
    limit_N = lane.best_N + distance_N
    fused = fuse(lane.groups.at_least(limit_N[:, None]))
    step = _FIRST_STEP
    while True:
        best_N, at_N = fused.first_best(fused.value_C, num_rows=len(lane.rows))
        lowest_N = (best_N + distance_N).clamp_min(LOWEST)
        goes_on_N = lowest_N < limit_N
        if not goes_on_N.any():
            return fused, best_N, at_N
        next_N = torch.where(goes_on_N, torch.maximum(lowest_N, limit_N - step), inf)
        further = lane.groups.at_least(next_N[:, None])
        further = further.where(further.value_C < limit_N.index_select(0, further.row_C))
        fused = merged(fused, fuse(further))
        limit_N, step = torch.minimum(next_N, limit_N), 2 * step


def listed(scores_NV: torch.Tensor, lane: Lane) -> Found:
    """Of fused scores of whole rows, -inf where a rule removed a token or where they are padded, what the fused filter
    leaves. Raises RowsFailed."""
    groups = LogitGroups.of(scores_NV)
    best_N = groups.max_NG.amax(-1)
    _check_best(lane, best_N)
    limit_N = reference.relative_threshold(best_N, _log_taus(lane)).clamp_min_(LOWEST)
    return groups.at_least(limit_N[:, None])
