"""The fused sampler on Triton: packs rows, launches scan, select and finish. Called by ops on CUDA tensors.

Never waits for the device. Tested against sampler_reference; passes and bytes are drawn in kernels/README.md.

Legend: R rows of logits, V real vocabulary, B rows to draw, M terms, T tiles, G groups of 64 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log

import torch
import triton

from uld_kernels import columns_triton as columns
from uld_kernels.finish_triton import _finish_kernel
from uld_kernels.pack import Packed, pack
from uld_kernels.rows import SampleOutput, SampleRow, ScoreOutput
from uld_kernels.scan_triton import _normalizer_kernel, _normalizer_tile_kernel, _rank_kernel, _scan_kernel
from uld_kernels.select_triton import _select_kernel

SCAN_BLOCK = 2048
LIST_BLOCK = 1024
# Contracting a - s * x into one rounding would differ from the torch sampler in the last bit.
_OPTIONS = {"enable_fp_fusion": False}


def sample(
    logits_RV: torch.Tensor, rows: Sequence[SampleRow], *, vocab_size: int, protected_ids: torch.Tensor
) -> SampleOutput:
    """ops.fused_sample for fp32, bf16 and fp16 logits."""
    packed = pack(rows, vocab_size=vocab_size, device=logits_RV.device)
    columns_B = _run(logits_RV, packed, vocab_size=vocab_size, protected_ids=protected_ids)
    del columns_B["rank_B"]
    return SampleOutput(**columns_B, digests=packed.digests)


def score(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    target_ids_B: torch.Tensor,
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
) -> ScoreOutput:
    """ops.fused_score. Reads target_ids_B on the host: pass it from there."""
    packed = pack(rows, vocab_size=vocab_size, device=logits_RV.device, target_ids=target_ids_B.tolist())
    columns_B = _run(logits_RV, packed, vocab_size=vocab_size, protected_ids=protected_ids)
    del columns_B["token_ids_B"]
    return ScoreOutput(**columns_B, digests=packed.digests)


@dataclass(frozen=True, slots=True)
class _Workspace:
    """What the kernels hand to each other for one launch."""

    normalizers: torch.Tensor
    rank_thresholds: torch.Tensor
    partials: torch.Tensor
    int_partials: torch.Tensor
    group_max: torch.Tensor
    group_list: torch.Tensor
    listed_ids: torch.Tensor
    listed_scores: torch.Tensor
    listed_z: torch.Tensor
    summaries: torch.Tensor
    int_summaries: torch.Tensor


def _run(
    logits_RV: torch.Tensor, packed: Packed, *, vocab_size: int, protected_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    num_rows, device = packed.ints.shape[0], logits_RV.device
    output = _empty_output(num_rows, packed.max_logprobs, device)
    if num_rows == 0:
        return output
    protected_V = torch.zeros(vocab_size, dtype=torch.int8, device=device).index_fill_(0, protected_ids, 1)
    space = _workspace(packed, num_rows, vocab_size, device)
    num_tiles, num_groups = triton.cdiv(vocab_size, SCAN_BLOCK), space.group_max.shape[1]
    logits = (logits_RV, logits_RV.stride(0), vocab_size)
    tables = (packed.ints, packed.floats, packed.term_ints, packed.term_floats)
    _normalize(logits_RV, packed, space, vocab_size=vocab_size)
    _scan_kernel[(num_rows, num_tiles)](
        *logits, *tables, packed.allowed_HV, protected_V, space.normalizers, space.rank_thresholds,
        space.partials, space.int_partials, space.group_max, num_groups,
        MAX_TERMS=packed.max_terms, BLOCK=SCAN_BLOCK, num_warps=8, **_OPTIONS,
    )  # fmt: skip
    _select_kernel[(num_rows,)](
        *logits, *tables, packed.allowed_HV, protected_V, protected_ids, protected_ids.shape[0],
        space.normalizers, space.rank_thresholds, space.partials, space.int_partials, num_tiles,
        space.group_max, space.group_list, num_groups, space.listed_ids, space.listed_scores,
        space.summaries, space.int_summaries,
        MAX_TERMS=packed.max_terms, TILES=triton.next_power_of_2(num_tiles),
        GROUPS=triton.next_power_of_2(num_groups), BLOCK=SCAN_BLOCK, num_warps=8, **_OPTIONS,
    )  # fmt: skip
    _finish_kernel[(num_rows,)](
        *logits, *tables, protected_V, packed.history_HV, packed.bias_HV, space.summaries, space.int_summaries,
        space.listed_ids, space.listed_scores, space.listed_z,
        output["token_ids_B"], output["logprob_B"], output["rank_B"], output["status_B"], output["num_kept_B"],
        output["kl_B"], output["argmax_changed_B"], output["top_ids_BN"], output["top_logprobs_BN"],
        packed.max_logprobs,
        MAX_TERMS=packed.max_terms, BLOCK=LIST_BLOCK, num_warps=8, **_OPTIONS,
    )  # fmt: skip
    return output


def _normalize(logits_RV: torch.Tensor, packed: Packed, space: _Workspace, *, vocab_size: int) -> None:
    """Fills normalizers and rank thresholds; launches nothing for batches that need neither."""
    num_terms = packed.ints.shape[0] * packed.max_terms
    logits = (logits_RV, logits_RV.stride(0), vocab_size)
    if packed.needs_normalizers:
        num_tiles = triton.cdiv(vocab_size, SCAN_BLOCK)
        maxima, sums = torch.empty((2, num_terms * 2, num_tiles), device=logits_RV.device)
        _normalizer_tile_kernel[(num_terms * 2, num_tiles)](
            *logits, packed.term_ints, maxima, sums, BLOCK=SCAN_BLOCK, num_warps=8, **_OPTIONS
        )
        _normalizer_kernel[(num_terms * 2,)](
            packed.term_ints, maxima, sums, space.normalizers, num_tiles, log(vocab_size),
            TILES=triton.next_power_of_2(num_tiles), num_warps=1, **_OPTIONS,
        )  # fmt: skip
    if packed.needs_ranks:
        differences = torch.empty((num_terms, vocab_size), device=logits_RV.device)
        _rank_kernel[(num_terms,)](
            *logits, packed.term_ints, differences, space.rank_thresholds,
            BLOCK=SCAN_BLOCK, num_warps=8, **_OPTIONS,
        )  # fmt: skip


def _workspace(packed: Packed, num_rows: int, vocab_size: int, device: torch.device) -> _Workspace:
    num_tiles, num_groups = triton.cdiv(vocab_size, SCAN_BLOCK), triton.cdiv(vocab_size, columns.GROUP.value)

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return _Workspace(
        normalizers=torch.zeros((num_rows, packed.max_terms, 2), device=device),
        rank_thresholds=torch.full((num_rows, packed.max_terms), inf, device=device),
        partials=floats(num_rows, num_tiles, columns.NUM_PARTIALS.value),
        int_partials=ints(num_rows, num_tiles, columns.NUM_INT_PARTIALS.value),
        group_max=floats(num_rows, num_groups),
        group_list=ints(num_rows, num_groups),
        # Room for the whole vocabulary: a list can overflow nothing. Rows touch only what they list.
        listed_ids=ints(num_rows, vocab_size),
        listed_scores=floats(num_rows, vocab_size),
        listed_z=floats(num_rows, vocab_size),
        summaries=floats(num_rows, columns.NUM_SUMMARIES.value),
        int_summaries=ints(num_rows, columns.NUM_INT_SUMMARIES.value),
    )


def _empty_output(num_rows: int, width: int, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "token_ids_B": torch.empty(num_rows, dtype=torch.int64, device=device),
        "logprob_B": torch.empty(num_rows, dtype=torch.float32, device=device),
        "rank_B": torch.empty(num_rows, dtype=torch.int64, device=device),
        "status_B": torch.empty(num_rows, dtype=torch.int32, device=device),
        "num_kept_B": torch.empty(num_rows, dtype=torch.int64, device=device),
        "kl_B": torch.empty(num_rows, dtype=torch.float32, device=device),
        "argmax_changed_B": torch.empty(num_rows, dtype=torch.bool, device=device),
        "top_ids_BN": torch.full((num_rows, width), -1, dtype=torch.int64, device=device),
        "top_logprobs_BN": torch.full((num_rows, width), -inf, dtype=torch.float32, device=device),
    }
