"""Log-probabilities, most likely tokens, ranks, KL and argmax of rows' fused scores. Called by the torch samplers.
Knows no sampling parameter.

Legend: N rows, C tokens of all rows, T listed alternatives."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch

from uld_kernels.logit_groups import LOWEST, Found, LogitGroups
from uld_kernels.segments import descending


@dataclass(frozen=True, slots=True)
class Measures:
    """What a row's fused scores say beside its token; fp64 columns."""

    lse_N: torch.Tensor
    num_kept_N: torch.Tensor
    kl_N: torch.Tensor
    changed_N: torch.Tensor


@dataclass(frozen=True, slots=True)
class Listing:
    """The most likely tokens of each row, padded with -1 and -inf."""

    ids_NT: torch.Tensor
    scores_NT: torch.Tensor


def measures_of_lists(
    kept: Found, target_C: torch.Tensor, target_lse_N: torch.Tensor, target_best_id_N: torch.Tensor
) -> Measures:
    """Of what rules left of each row; `target_C` are the target's scores there. No row is empty."""
    segments = kept.segments(target_lse_N.shape[0])
    lse_N = segments.log_sum_exps(kept.value_C)
    logprob_C = kept.value_C.double() - segments.spread(lse_N)
    gain_C = logprob_C - (target_C.double() - segments.spread(target_lse_N))
    # Rounding can leave a distribution that equals the target at -1e-8.
    kl_N = segments.sums(logprob_C.exp() * gain_C).clamp_min_(0.0)
    best_id_N = kept.id_C.index_select(0, segments.first_best(kept.value_C)[1])
    return Measures(lse_N, segments.length_N, kl_N, best_id_N != target_best_id_N)


def measures_of_rows(groups: LogitGroups, lse_N: torch.Tensor) -> Measures:
    """Of targets that no rule changed."""
    num_kept_N = torch.tensor([_num_kept(groups.row(n)) for n in range(len(lse_N))], device=lse_N.device)
    return Measures(
        lse_N, num_kept_N, torch.zeros_like(lse_N), torch.zeros_like(num_kept_N, dtype=torch.bool)
    )


def _num_kept(score_V: torch.Tensor) -> int:
    # Nearly always all; to count takes ten times as long.
    if score_V.amin() >= LOWEST:
        return score_V.shape[0]
    return int((score_V >= LOWEST).sum().item())


def listing_of_rows(groups: LogitGroups, num_listed: int) -> Listing:
    cut, limit_N = groups.holding_largest(num_listed)
    return listing(cut.at_least(limit_N[:, None]), num_listed, num_rows=groups.row_N.shape[0])


def listing(found: Found, num_listed: int, *, num_rows: int) -> Listing:
    """Ties by lowest id. No row is empty."""
    segments = found.segments(num_rows)
    score_NK = segments.padded(found.value_C, fill=-inf)
    order_NT = descending(score_NK)[:, :num_listed]
    score_NT = score_NK.gather(1, order_NT)
    place_NT = (segments.start_N[:, None] + order_NT).clamp_max_(found.id_C.shape[0] - 1)
    id_NT = found.id_C.take(place_NT).masked_fill_(score_NT == -inf, -1)
    return Listing(id_NT, score_NT)


def scores_of(found: Found, token_N: torch.Tensor) -> torch.Tensor:
    """(N,): the score of one token a row; -inf where it is not among those found."""
    segments = found.segments(token_N.shape[0])
    return segments.maxima(found.value_C.where(found.id_C == segments.spread(token_N), -inf))


def ranks_of_lists(found: Found, score_N: torch.Tensor) -> torch.Tensor:
    """(N,): 1 + number of higher scores among those found."""
    is_higher_C = found.value_C > score_N.index_select(0, found.row_C)
    return 1 + torch.bincount(found.row_C[is_higher_C], minlength=score_N.shape[0])


def ranks_of_rows(groups: LogitGroups, score_N: torch.Tensor) -> torch.Tensor:
    """The same over whole rows."""
    return ranks_of_lists(groups.at_least(score_N.clamp_min(LOWEST)[:, None]), score_N)
