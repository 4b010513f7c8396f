"""The sampler in plain torch: the oracle of the Triton kernel and the backend of CPU serving. Called by ops.

Walks one row at a time and touches only what that row needs: no history, no operation. Knows no requests.

Legend: R rows of logits, V real vocabulary, K survivors of one row, B rows to draw, N listed alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite

import torch

from uld_kernels import reference, rules
from uld_kernels.batch_sampler import sample_batch
from uld_kernels.fusion import Fused, RowFailure, Streams, fuse
from uld_kernels.lottery import Lot, draw
from uld_kernels.nucleus import nucleus_indices
from uld_kernels.rows import LateRows, SampleOutput, SampleRow, ScoreOutput


def sample(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
    late: LateRows | None = None,
) -> SampleOutput:
    """ops.fused_sample: all at once the rows that ask for little, the others one after the other."""
    table, streams = _Table(rows), Streams(logits_RV, vocab_size, late)
    quick = sample_batch(logits_RV, rows, vocab_size=vocab_size, protected_ids=protected_ids, late=late)
    for index, status in quick.statuses.items():
        table.fail(index, status)
    found: dict[int, tuple[Fused, Lot]] = {}
    for index, row in enumerate(rows):
        if index in quick.tokens:
            continue
        try:
            is_measured = row.is_measured or row.num_logprobs > 0 or row.repetition_penalty != 1.0
            fused = fuse(streams, row, protected_ids=protected_ids, is_measured=is_measured)
            found[index] = fused, truncate(fused, row, vocab_size=vocab_size)
        except RowFailure as failure:
            table.fail(index, failure.status)
    tokens = [quick.tokens.get(index, -1) for index in range(len(rows))]
    drawn = draw([lot for _, lot in found.values()]) if found else []
    for (index, (fused, _)), token in zip(found.items(), drawn, strict=True):
        tokens[index] = token
        if rows[index].is_measured or rows[index].num_logprobs:
            table.fill(index, fused, fused.score_of(token))
    token_ids_B = torch.tensor(tokens, dtype=torch.int64, device=logits_RV.device)
    return SampleOutput(token_ids_B=token_ids_B, **table.columns(logits_RV.device), digests=table.digests)


def score(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    target_ids_B: torch.Tensor,
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
    late: LateRows | None = None,
) -> ScoreOutput:
    """ops.fused_score, one row after the other."""
    table, streams = _Table(rows), Streams(logits_RV, vocab_size, late)
    ranks = [0] * len(rows)
    for index, (row, token) in enumerate(zip(rows, target_ids_B.tolist(), strict=True)):
        try:
            fused = fuse(streams, row, protected_ids=protected_ids)
        except RowFailure as failure:
            table.fail(index, failure.status)
        else:
            token_score = fused.score_of(token)
            ranks[index] = 1 + int((fused.scores_K > token_score).sum().item())
            table.fill(index, fused, token_score)
    rank_B = torch.tensor(ranks, dtype=torch.int64, device=logits_RV.device)
    return ScoreOutput(rank_B=rank_B, **table.columns(logits_RV.device), digests=table.digests)


class _Table:
    """Collects the columns that both outputs share, row by row."""

    def __init__(self, rows: Sequence[SampleRow]) -> None:
        self.digests = [tuple(term.digest for term in row.distinct_terms) for row in rows]
        self._num_logprobs = [row.num_logprobs for row in rows]
        width = max(self._num_logprobs, default=0)
        self._top_ids_BN = torch.full((len(rows), width), -1, dtype=torch.int64)
        self._top_logprobs_BN = torch.full((len(rows), width), -inf)
        self._logprob = [-inf] * len(rows)
        self._status = [rules.OK] * len(rows)
        self._num_kept = [0] * len(rows)
        self._kl = [0.0] * len(rows)
        self._changed = [False] * len(rows)

    def fail(self, index: int, status: int) -> None:
        self._status[index] = status

    def fill(self, index: int, fused: Fused, token_score: float) -> None:
        self._logprob[index] = token_score - fused.lse
        self._num_kept[index] = fused.num_kept
        self._kl[index] = fused.kl
        self._changed[index] = fused.argmax_changed
        if self._num_logprobs[index] > 0:
            ids_N, logprobs_N = top_logprobs(fused, self._num_logprobs[index])
            self._top_ids_BN[index, : ids_N.shape[0]] = ids_N
            self._top_logprobs_BN[index, : ids_N.shape[0]] = logprobs_N

    def columns(self, device: torch.device) -> dict[str, torch.Tensor]:
        return {
            "logprob_B": torch.tensor(self._logprob, dtype=torch.float32, device=device),
            "top_ids_BN": self._top_ids_BN.to(device),
            "top_logprobs_BN": self._top_logprobs_BN.to(device),
            "status_B": torch.tensor(self._status, dtype=torch.int32, device=device),
            "num_kept_B": torch.tensor(self._num_kept, dtype=torch.int64, device=device),
            "kl_B": torch.tensor(self._kl, dtype=torch.float32, device=device),
            "argmax_changed_B": torch.tensor(self._changed, dtype=torch.bool, device=device),
        }


def truncate(fused: Fused, row: SampleRow, *, vocab_size: int) -> Lot:
    """Penalties and bias, then greedy, or temperature, top-k, top-p and min-p: what is left to draw from."""
    scores_K = penalize(fused, row, vocab_size=vocab_size)
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


def top_logprobs(fused: Fused, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities of the n most likely tokens, ties by lowest id; fewer if fewer are kept."""
    best = reference.largest(fused.scores_K, n)
    return fused.ids_K[best], fused.scores_K[best] - fused.lse


def penalize(fused: Fused, row: SampleRow, *, vocab_size: int) -> torch.Tensor:
    """History penalties and logit_bias on the kept scores; a filtered token is not among them."""
    scores_K = fused.scores_K
    if row.repetition_penalty != 1.0:
        # It divides positive scores and multiplies negative ones, so their offset must mean something
        # whatever the rule did to it: the scores move to the target's own log-normaliser.
        anchored_K = scores_K + (fused.target_lse - fused.lse)
        seen_K = _counts(fused, (row.prompt_ids, row.output_ids), vocab_size) > 0
        scores_K = reference.repetition_penalty(anchored_K, seen_K, penalty=row.repetition_penalty)
    if row.presence_penalty != 0.0 or row.frequency_penalty != 0.0:
        counts_K = _counts(fused, (row.output_ids,), vocab_size)
        scores_K = reference.presence_penalty(scores_K, counts_K, penalty=row.presence_penalty)
        scores_K = reference.frequency_penalty(scores_K, counts_K, penalty=row.frequency_penalty)
    if row.logit_bias is not None:
        ids, values = row.logit_bias
        bias_V = torch.zeros(vocab_size, dtype=scores_K.dtype, device=scores_K.device)
        scores_K = scores_K + bias_V.index_copy_(0, ids, values.to(scores_K.dtype))[fused.ids_K]
    return scores_K


def _counts(fused: Fused, histories: tuple[torch.Tensor | None, ...], vocab_size: int) -> torch.Tensor:
    counts_V = torch.zeros(vocab_size, dtype=torch.int64, device=fused.ids_K.device)
    for ids in histories:
        if ids is not None:
            counts_V += torch.bincount(ids, minlength=vocab_size)
    return counts_V[fused.ids_K]
