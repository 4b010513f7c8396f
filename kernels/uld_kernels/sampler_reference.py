"""The sampler in plain torch: the oracle of the Triton kernel and the backend of CPU serving. Called by ops.

Most rows are worked on together (batch_sampler); here are the rare ones, and all of fp64, one after the other. Knows no
requests.

Legend: R rows of logits, V real vocabulary, K survivors of one row, B rows to draw."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite

import torch

from uld_kernels import rules
from uld_kernels.batch_sampler import Batch, fuse_batch, sample_batch, score_batch
from uld_kernels.columns import Columns
from uld_kernels.fusion import Fused, fuse
from uld_kernels.history import penalized, repeats
from uld_kernels.lottery import Lot, draw
from uld_kernels.measure import Measures, listing
from uld_kernels.nucleus import nucleus_indices
from uld_kernels.rows import FusedOutput, LateRows, SampleOutput, SampleRow, ScoreOutput
from uld_kernels.streams import RowFailure, Streams
from uld_kernels.ways import is_measured


def sample(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
    late: LateRows | None = None,
) -> SampleOutput:
    """ops.fused_sample."""
    columns = Columns(rows)
    sample_batch(Batch(logits_RV, rows, vocab_size, protected_ids, late), columns)
    streams = Streams(logits_RV, vocab_size, late)
    for number, row in enumerate(rows):
        if number in columns.tokens:
            continue
        try:
            fused = fuse(
                streams, row, protected_ids=protected_ids, is_measured=is_measured(row) or repeats(row)
            )
            (token,) = draw([truncate(fused, row, vocab_size=vocab_size)])
        except RowFailure as failure:
            columns.fail(number, failure.status)
        else:
            columns.draw([number], torch.tensor([token]))
            if is_measured(row):
                _measure(columns, number, row, fused, fused.score_of(token))
    return columns.sampled(logits_RV.device)


def score(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    target_ids_B: torch.Tensor,
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
    late: LateRows | None = None,
) -> ScoreOutput:
    """ops.fused_score."""
    columns = Columns(rows)
    score_batch(Batch(logits_RV, rows, vocab_size, protected_ids, late), target_ids_B, columns)
    streams = Streams(logits_RV, vocab_size, late)
    for number, (row, token) in enumerate(zip(rows, target_ids_B.tolist(), strict=True)):
        if number in columns.tokens:
            continue
        try:
            fused = fuse(streams, row, protected_ids=protected_ids)
        except RowFailure as failure:
            columns.fail(number, failure.status)
        else:
            token_score = fused.score_of(token)
            columns.rank([number], 1 + (fused.scores_K > token_score).sum()[None])
            _measure(columns, number, row, fused, token_score)
    return columns.scored(logits_RV.device)


def fused(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
    late: LateRows | None = None,
) -> FusedOutput:
    """ops.fused_scores."""
    columns = Columns(rows)
    dtype = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32
    scores_BV = torch.full((len(rows), vocab_size), -inf, dtype=dtype, device=logits_RV.device)
    fuse_batch(Batch(logits_RV, rows, vocab_size, protected_ids, late), columns, scores_BV)
    streams = Streams(logits_RV, vocab_size, late)
    for number, row in enumerate(rows):
        if number in columns.tokens:
            continue
        try:
            one = fuse(streams, row, protected_ids=protected_ids, is_measured=False)
        except RowFailure as failure:
            columns.fail(number, failure.status)
        else:
            if one.scores_K.isfinite().all():
                scores_BV[number].index_copy_(0, one.ids_K, one.scores_K)
            else:
                columns.fail(number, rules.NUMERICAL)
    return columns.fused(scores_BV)


def _measure(columns: Columns, number: int, row: SampleRow, fused: Fused, token_score: float) -> None:
    lse, kl, score_N = torch.tensor([[fused.lse], [fused.kl], [token_score]], dtype=torch.float64)
    measures = Measures(lse, torch.tensor([fused.num_kept]), kl, torch.tensor([fused.argmax_changed]))
    top = listing(fused.found, row.num_logprobs, num_rows=1) if row.num_logprobs else None
    columns.measure([number], measures, score_N=score_N, listing=top)


def truncate(fused: Fused, row: SampleRow, *, vocab_size: int) -> Lot:
    """Penalties and bias, then greedy, or temperature, top-k, top-p and min-p: what is left to draw from. Raises
    RowFailure."""
    anchor = torch.tensor([fused.target_lse - fused.lse], dtype=torch.float64, device=fused.ids_K.device)
    scores_K = penalized(fused.found, [row], anchor, vocab_size=vocab_size)
    if not (isfinite(scores_K.amin().item()) and isfinite(scores_K.amax().item())):
        raise RowFailure(rules.NUMERICAL)
    if row.temperature == 0.0:
        best = scores_K.argmax()[None]
        return Lot(fused.ids_K[best], scores_K[best], row.seed, row.position)
    z_K = scores_K / row.temperature
    nucleus = nucleus_indices(z_K, row)
    if nucleus is None:
        return Lot(fused.ids_K, z_K, row.seed, row.position)
    return Lot(fused.ids_K[nucleus], z_K[nucleus], row.seed, row.position)
