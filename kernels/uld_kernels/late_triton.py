"""Logits of listed tokens alone: each row's own list of ids, gathered rows of the head, one sum a token. What
sampler_triton scores late assistants with. On a GPU the head is read anyway for the target, so that a further row costs
the bytes of its logits, and listed rows of a wide head may be more: benchmarks/gpu_head.py times both.

Tested against LateRows.scores_each in fp64. Knows no rule and no filter.

Legend: A late rows, D model width, W width of the head, B lists, M assistants of each, C places in a list."""

# Kernel arguments are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from uld_kernels.rows import LateRows

# Tokens of a program's tile, and columns of the head that it reads at once: 8 KB of bf16 weights on their way.
BLOCK_C = 16
BLOCK_D = 256
NUM_WARPS = 4
NUM_STAGES = 3
# Programs that share a list: some hundred tokens are a tile or two for each.
NUM_SPLITS = 16


# What differs between batches must not compile the kernel anew while somebody waits.
@triton.jit(do_not_specialize=["index_stride_list", "index_stride_role", "first_late"])
def _late_kernel(
    hidden_ptr, hidden_stride_row, weight_ptr, weight_stride_row, bias_ptr, ids_ptr, ids_stride_row, starts_ptr,
    counts_ptr, index_ptr, index_stride_list, index_stride_role, first_late, scores_ptr, scores_stride_row, width,
    HAS_STARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (split, list, role): every NUM_SPLITS-th tile of a list, against one late row.

    A token's sum is taken over the same columns in the same order wherever it stands in whichever list, so its bits
    hang on nothing but its hidden row and its row of the head.
    """
    one_list, role = tl.program_id(1), tl.program_id(2)
    index = tl.load(index_ptr + one_list * index_stride_list + role * index_stride_role) - first_late
    count = tl.where(index >= 0, tl.load(counts_ptr + one_list), 0)
    begin = tl.program_id(0) * BLOCK_C
    if HAS_STARTS:
        begin += tl.load(starts_ptr + one_list)
    hidden_row = hidden_ptr + index.to(tl.int64) * hidden_stride_row
    ids_row = ids_ptr + one_list.to(tl.int64) * ids_stride_row
    scores_row = scores_ptr + (one_list.to(tl.int64) * tl.num_programs(2) + role) * scores_stride_row
    lane, column = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    for start in range(begin, count, tl.num_programs(0) * BLOCK_C):
        inside = start + lane < count
        ids = tl.load(ids_row + start + lane, mask=inside, other=0).to(tl.int64)
        sums = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        for first in range(0, width, BLOCK_D):
            in_width = first + column < width
            h = tl.load(hidden_row + first + column, mask=in_width, other=0.0).to(tl.float32)
            w = tl.load(
                weight_ptr + ids[:, None] * weight_stride_row + first + column[None, :],
                mask=inside[:, None] & in_width[None, :],
                other=0.0,
            ).to(tl.float32)
            sums += w * h[None, :]
        score = tl.sum(sums, axis=1)
        if HAS_BIAS:
            score += tl.load(bias_ptr + ids, mask=inside, other=0.0)
        tl.store(scores_row + start + lane, score, mask=inside)


def score_listed(
    late: LateRows,
    ids_BC: torch.Tensor,
    counts_B: torch.Tensor,
    index_BM: torch.Tensor,
    *,
    out_BMC: torch.Tensor,
    starts_B: torch.Tensor | None = None,
    first_late: int = 0,
) -> None:
    """Writes the fp32 logit of late row index_BM[b, m] - first_late on token ids_BC[b, c] to out_BMC[b, m, c], for
    starts_B[b] (or 0) <= c < counts_B[b].

    ids and counts are int32 and stay on the device: nothing waits for them. An index below first_late is left alone,
    and so is what lies past a list. Raises ValueError for tensors that do not go together.
    """
    (num_lists, num_roles), width = index_BM.shape, late.hidden_AD.shape[1]
    _check(late, ids_BC, counts_B, index_BM, out_BMC, starts_B)
    if num_lists == 0 or num_roles == 0:
        return
    bias_W = late.bias_W
    _late_kernel[(NUM_SPLITS, num_lists, num_roles)](
        late.hidden_AD, late.hidden_AD.stride(0), late.weight_WD, late.weight_WD.stride(0),
        late.weight_WD if bias_W is None else bias_W, ids_BC, ids_BC.stride(0),
        counts_B if starts_B is None else starts_B, counts_B, index_BM, index_BM.stride(0), index_BM.stride(1),
        first_late, out_BMC, out_BMC.stride(1), width,
        HAS_STARTS=starts_B is not None, HAS_BIAS=bias_W is not None, BLOCK_C=BLOCK_C, BLOCK_D=BLOCK_D,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip


def _check(
    late: LateRows,
    ids_BC: torch.Tensor,
    counts_B: torch.Tensor,
    index_BM: torch.Tensor,
    out_BMC: torch.Tensor,
    starts_B: torch.Tensor | None,
) -> None:
    (num_lists, num_roles), room = index_BM.shape, ids_BC.shape[1]
    starts_B = counts_B if starts_B is None else starts_B
    if (
        ids_BC.shape[0] != num_lists
        or not counts_B.shape == starts_B.shape == (num_lists,)
        or out_BMC.shape != (num_lists, num_roles, room)
    ):
        raise ValueError(
            f"lists {tuple(ids_BC.shape)}, counts {tuple(counts_B.shape)}, rows {tuple(index_BM.shape)} and output "
            f"{tuple(out_BMC.shape)} do not go together"
        )
    if (
        any(tensor.dtype != torch.int32 for tensor in (ids_BC, counts_B, starts_B, index_BM))
        or out_BMC.dtype != torch.float32
    ):
        raise ValueError("ids, counts and rows must be int32, the output fp32")
    tensors = (late.hidden_AD, late.weight_WD, ids_BC, counts_B, starts_B, out_BMC)
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("the last dimension of every tensor but the rows must be contiguous")
    if out_BMC.stride(0) != num_roles * out_BMC.stride(1):
        raise ValueError("the output must be one block of rows")
    if late.hidden_AD.shape[1] != late.weight_WD.shape[1]:
        raise ValueError(
            f"hidden rows of {late.hidden_AD.shape[1]}, a head of {late.weight_WD.shape[1]} columns"
        )
