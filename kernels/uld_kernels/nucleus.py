"""Which tokens top-k, top-p and min-p leave of each row. Called by the torch samplers. Knows no rule and no noise.

Legend: N rows, C tokens of all rows, K tokens of the longest row."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log

import torch

from uld_kernels import reference
from uld_kernels.logit_groups import LOWEST, Found, LogitGroups
from uld_kernels.normalizers import log_sum_exps
from uld_kernels.rows import SampleRow
from uld_kernels.segments import Segments, descending, true_indices

# With a longer row, rows are ordered one by one: padding the others to its length would cost more.
_SHORT = 4096
# What fp32 exponentials and the rounding of large log-weights could be off, as a share of a row's mass.
_UNSURE = 2e-5
_UNSURE_A_NAT = 2.0**-22
# How far down (nats) top-p looks first, and how much further each next time.
_FIRST_DEPTH = 6.0
_BOUND_SLACK = 1e-3


def truncates(row: SampleRow) -> bool:
    """Whether a row draws, and from less than all that its rule leaves."""
    return row.temperature > 0.0 and (row.top_k > 0 or row.top_p < 1.0 or row.min_p > 0.0)


def nucleus_indices(z_K: torch.Tensor, row: SampleRow) -> torch.Tensor | None:
    """Indices, ascending, that top-k, then top-p on what is left, then min-p leave of one row's log-weights; None where
    all are off."""
    if not truncates(row):
        return None
    if 0 < row.top_k < z_K.shape[0]:
        chosen = reference.largest(z_K, row.top_k).sort().values
        kept = _prefixes(z_K[chosen][None], [row], None)
        return chosen[true_indices(kept[0][0])]
    return true_indices(_prefixes(z_K[None], [row], None)[0][0])


def nuclei(
    segments: Segments, z_C: torch.Tensor, rows: Sequence[SampleRow], masses: Sequence[float] | None = None
) -> tuple[torch.Tensor, list[int]]:
    """Which of the rows' log-weights (C,) top-k, top-p and min-p leave, and the rows that fp32 cannot decide.

    `masses` are log-sum-exps of whole rows, in fp32, of which the log-weights listed are the top; without, what is
    listed is all there is."""
    lengths = segments.length_N.tolist()
    if max(lengths) <= _SHORT:
        kept_NK, unsure = _prefixes(segments.padded(z_C, fill=-inf), rows, masses)
        return kept_NK.view(-1).index_select(0, segments.places(kept_NK.shape[1])), unsure
    kept, unsure = [], []
    for n, (row, z_K) in enumerate(zip(rows, torch.split(z_C, lengths), strict=True)):
        if not truncates(row):
            kept.append(torch.ones_like(z_K, dtype=torch.bool))
            continue
        kept_NK, doubtful = _prefixes(z_K[None], [row], None if masses is None else [masses[n]])
        kept.append(kept_NK[0])
        unsure += [n] * len(doubtful)
    return torch.cat(kept), unsure


def top_of(
    groups: LogitGroups, rows: Sequence[SampleRow], best_N: torch.Tensor
) -> tuple[Found, list[float] | None]:
    """Of whole rows the scores that a nucleus could hold, and what nuclei() wants to know of the rest."""
    if all(row.top_k for row in rows):
        return _largest(groups, max(row.top_k for row in rows)), None
    lse = log_sum_exps(groups, scales=[1.0 / row.temperature for row in rows])
    temperature_N = best_N.new_tensor([row.temperature for row in rows])
    wanted = [row.top_p if row.top_k == 0 and row.top_p < 1.0 else 0.0 for row in rows]
    wanted_N = torch.tensor(wanted, dtype=torch.float64, device=lse.device)
    wanted_N *= 1.0 + 2.0 * _tolerance((best_N / temperature_N).double()).clamp_max(1e-3)
    depths = [_FIRST_DEPTH] * len(rows)
    while True:
        limit_N = _limits(groups, rows, best_N, depths)
        found = groups.at_least(limit_N[:, None])
        segments = found.segments(len(rows))
        z_C = found.value_C.double() / segments.spread(temperature_N)
        reached_N = segments.sums((z_C - segments.spread(lse)).exp_())
        is_short = ((reached_N <= wanted_N) & (limit_N > LOWEST)).tolist()
        if not any(is_short):
            return found, lse.tolist()
        depths = [1.6 * depth if short else depth for depth, short in zip(depths, is_short, strict=True)]


def _tolerance(best: torch.Tensor) -> torch.Tensor:
    """How much of its mass a row is unsure of, by its largest log-weight."""
    return _UNSURE + _UNSURE_A_NAT * best.abs()


def _limits(
    groups: LogitGroups, rows: Sequence[SampleRow], best_N: torch.Tensor, depths: Sequence[float]
) -> torch.Tensor:
    """(N,): min-p's limit where nothing else cuts, top-k's, and for top-p a limit so many nats down."""
    below = [
        _depth(row, depth) * row.temperature * (1 + _BOUND_SLACK) + _BOUND_SLACK
        for row, depth in zip(rows, depths, strict=True)
    ]
    limit_N = (best_N - best_N.new_tensor(below)).clamp_min(LOWEST)
    largest = max(row.top_k for row in rows)
    if largest:
        has_k_N = best_N.new_tensor([row.top_k > 0 for row in rows]) > 0
        limit_N = torch.where(has_k_N, groups.holding_largest(largest)[1], limit_N)
    return limit_N


def _depth(row: SampleRow, depth: float) -> float:
    if row.top_p == 1.0 and row.min_p > 0.0:
        return -log(row.min_p)
    return depth


def _largest(groups: LogitGroups, k: int) -> Found:
    cut, limit_N = groups.holding_largest(k)
    return cut.at_least(limit_N[:, None])


def _prefixes(
    z_NK: torch.Tensor, rows: Sequence[SampleRow], masses: Sequence[float] | None
) -> tuple[torch.Tensor, list[int]]:
    """nuclei() of rows padded with -inf."""
    order_NK = descending(z_NK)
    z_NK = z_NK.gather(1, order_NK)
    rank_K = torch.arange(z_NK.shape[1], device=z_NK.device)
    most_N1 = torch.tensor([[row.top_k or z_NK.shape[1]] for row in rows], device=z_NK.device)
    keep_NK = (rank_K < most_N1) & (z_NK > -inf)
    unsure: list[int] = []
    if any(row.top_p < 1.0 for row in rows):
        in_nucleus_NK, unsure = _in_nuclei(z_NK, keep_NK, rows, masses)
        keep_NK &= in_nucleus_NK
    if any(row.min_p > 0.0 for row in rows):
        lowest = [[log(row.min_p) if row.min_p > 0.0 else -inf] for row in rows]
        keep_NK &= z_NK >= reference.relative_threshold(z_NK[:, :1], z_NK.new_tensor(lowest))
    return torch.zeros_like(keep_NK).scatter_(1, order_NK, keep_NK), unsure


def _in_nuclei(
    z_NK: torch.Tensor, keep_NK: torch.Tensor, rows: Sequence[SampleRow], masses: Sequence[float] | None
) -> tuple[torch.Tensor, list[int]]:
    """Top-p on what top-k left, of rows in falling order."""
    best_N1 = z_NK[:, :1].double()
    weights_NK = (z_NK.double() - best_N1).exp_().masked_fill_(~keep_NK, 0.0)
    # Not sum(-1), whose order hangs on the padding.
    total_N1 = listed_N1 = weights_NK.cumsum(-1)[:, -1:]
    if masses is not None:
        whole_N1 = (torch.tensor(masses, dtype=torch.float64, device=z_NK.device)[:, None] - best_N1).exp_()
        has_k_N1 = torch.tensor([[row.top_k > 0] for row in rows], device=z_NK.device)
        total_N1 = torch.where(has_k_N1, total_N1, whole_N1)
    p_N1 = torch.tensor([[row.top_p] for row in rows], dtype=torch.float64, device=z_NK.device)
    size_N1 = reference.nucleus_size(weights_NK, p_N1 * total_N1)
    size_N1 = torch.where(p_N1 < 1.0, size_N1, z_NK.shape[1])
    unsure: list[int] = []
    if masses is not None:
        mass_N1, off_N1 = p_N1 * total_N1, _tolerance(best_N1)
        low_N1 = reference.nucleus_size(weights_NK, mass_N1 * (1.0 - off_N1))
        high_N1 = reference.nucleus_size(weights_NK, mass_N1 * (1.0 + off_N1))
        is_open_N1 = (low_N1 != high_N1) | (listed_N1 < mass_N1 * (1.0 + off_N1))
        is_unsure_N = (is_open_N1 & ~has_k_N1 & (p_N1 < 1.0))[:, 0]
        unsure = true_indices(is_unsure_N).tolist()
    return torch.arange(z_NK.shape[1], device=z_NK.device) < size_N1, unsure
