"""Dot products of listed pairs of rows, each summed by itself. Called by rows.LateRows; knows only matrices.

A matrix product sums in an order that hangs on what else it is asked for. Here a pair gives the same bits in whichever
list it stands, so that a request gets the same tokens alone and beside others.

Legend: A and W rows, D their width, C pairs, P pairs of a piece."""

from __future__ import annotations

import warnings

import torch

from uld_kernels.segments import true_indices

# On a CPU so many rows are turned into fp32 at once: 4.7 MB where they are 576 wide. Measured at 2,182 pairs of bf16 on
# two busy cores of an AMD EPYC: 0.43 ms, 0.94 ms with products and sums of their own, 0.11 ms if all rows were in fp32.
_PAIRS_AT_ONCE = 2048
# On a device, values copied at once.
_VALUES_AT_ONCE = 1 << 24


def listed_products(
    left_AD: torch.Tensor, index_C: torch.Tensor, right_WD: torch.Tensor, ids_C: torch.Tensor
) -> torch.Tensor:
    """(C,) fp32: left_AD[index_C[i]] . right_WD[ids_C[i]], factors turned into fp32 and summed in fp32."""
    if ids_C.shape[0] == 0:
        return left_AD.new_empty(0, dtype=torch.float32)
    if left_AD.is_cuda:
        return _by_copies(left_AD.float(), index_C, right_WD, ids_C)
    end_N = _ends_of_runs(index_C, ids_C)
    left_ND = left_AD.float().index_select(0, index_C.index_select(0, end_N - 1))
    if right_WD.dtype == torch.float32:
        return _sampled(left_ND, end_N, right_WD, ids_C)
    pieces = []
    for start in range(0, ids_C.shape[0], _PAIRS_AT_ONCE):
        right_PD = right_WD.index_select(0, ids_C[start : start + _PAIRS_AT_ONCE]).float()
        count = right_PD.shape[0]
        end_of_piece_N = (end_N - start).clamp_(0, count)
        pieces.append(_sampled(left_ND, end_of_piece_N, right_PD, torch.arange(count)))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _ends_of_runs(index_C: torch.Tensor, ids_C: torch.Tensor) -> torch.Tensor:
    """Where runs of pairs end whose left row is one and whose ids ascend: no row of a pattern names a column twice."""
    goes_on = (index_C[1:] == index_C[:-1]) & (ids_C[1:] > ids_C[:-1])
    return torch.cat([true_indices(~goes_on) + 1, torch.tensor([ids_C.shape[0]])])


def _sampled(
    left_ND: torch.Tensor, end_N: torch.Tensor, right_WD: torch.Tensor, ids_C: torch.Tensor
) -> torch.Tensor:
    """Row n of `left` against the ids up to end_N[n], from where row n - 1 ended."""
    start_and_end = torch.cat([end_N.new_zeros(1), end_N])
    pattern = torch.sparse_csr_tensor(
        start_and_end,
        ids_C,
        right_WD.new_zeros(ids_C.shape[0]),
        size=(left_ND.shape[0], right_WD.shape[0]),
        check_invariants=False,
    )
    sums_C: torch.Tensor = torch.sparse.sampled_addmm(pattern, left_ND, right_WD.T, beta=0.0).values()
    return sums_C


def _by_copies(
    left_AD: torch.Tensor, index_C: torch.Tensor, right_WD: torch.Tensor, ids_C: torch.Tensor
) -> torch.Tensor:
    at_once = max(1, _VALUES_AT_ONCE // left_AD.shape[1])
    sums = []
    for start in range(0, ids_C.shape[0], at_once):
        piece = slice(start, start + at_once)
        right_PD = right_WD.index_select(0, ids_C[piece]).float()
        sums.append(_sums(right_PD.mul_(left_AD.index_select(0, index_C[piece]))))
    return torch.cat(sums)


def _sums(values_PD: torch.Tensor) -> torch.Tensor:
    """(P,), in place: the second half of the columns is added to the first until one is left. torch's own sum of rows
    on a device takes threads, and with them the order, by how many rows there are."""
    count = values_PD.shape[1]
    while count > 1:
        half = -(-count // 2)
        values_PD[:, : count - half].add_(values_PD[:, half:count])
        count = half
    return values_PD[:, 0]


def _say_it_is_beta() -> None:
    """torch warns once a process that compressed sparse tensors are in beta. What is used of them here is tested, and
    a server's log is no place for that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(
            torch.tensor([0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1)
        )


_say_it_is_beta()
