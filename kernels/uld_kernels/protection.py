"""Protected tokens in rows' lists of scores: reference.protect, without a row as long as the vocabulary. Called by the
torch samplers.

Legend: N rows, C tokens of all rows, P protected ids."""

from __future__ import annotations

import torch

from uld_kernels import reference
from uld_kernels.logit_groups import LOWEST, Found, LogitGroups, merged
from uld_kernels.normalizers import log_sum_exps
from uld_kernels.segments import true_indices


def protected(kept: Found, groups: LogitGroups, ids_P: torch.Tensor) -> tuple[Found, torch.Tensor]:
    """What rules left of each row (`kept`, of its target's scores `groups`), with the protected tokens at the target's
    probability; and the target's log-sum-exp, (N,) fp64. Banned tokens (-inf) stay away; a row may come without any."""
    num_rows = groups.row_N.shape[0]
    is_protected_V = torch.zeros(groups.size, dtype=torch.bool, device=ids_P.device)
    others = kept.where(~is_protected_V.index_fill_(0, ids_P, True).index_select(0, kept.id_C))
    segments = others.segments(num_rows)
    lse_b_N = log_sum_exps(groups, without=ids_P)
    shift_N = reference.protection_shift(lse_b_N, segments.log_sum_exps(others.value_C))
    moved = others.valued(others.value_C + segments.spread(shift_N.to(others.value_C.dtype)))
    ids_P = ids_P.sort().values
    own_NP = groups.at(ids_P[None])
    own = true_indices((own_NP >= LOWEST).flatten())
    row_C = own // ids_P.shape[0]
    id_C = ids_P.index_select(0, own - row_C * ids_P.shape[0])
    added = Found(row_C, id_C, own_NP.flatten().index_select(0, own))
    lse_own_N = added.segments(num_rows).log_sum_exps(added.value_C)
    return merged(moved, added), torch.logaddexp(lse_b_N, lse_own_N)
