"""The public operations, and the only place that asks which backend runs them. Called by engines.

Knows no formula (reference.py) and no launch; it checks arguments that would otherwise read the wrong
memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from uld_kernels import sampler_reference, trial
from uld_kernels.rows import FusedOutput, LateRows, SampleOutput, SampleRow, ScoreOutput


def fused_sample(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
    late: LateRows | None = None,
) -> SampleOutput:
    """Combine the streams of each row, filter, and draw one token a row with its log-probability.

    logits_RV      (R, W) fp32, bf16 or fp16 (fp64 for oracles); columns from vocab_size on are padding of
                   the head and count nowhere. Arithmetic is fp32.
    rows           B descriptions in any order, with any mix of rules and parameters; they may share rows
                   of logits.
    protected_ids  int64 ids without repeats (end of text, control), on the same device, that terms with
                   `protect` leave at the target's probability.
    late           more streams, as rows after the logits', whose scores are computed where they are needed.

    Order: bans and grammar mask on b; plausibility or official filter from b; combine; fused filter on the
    scores; protect. Log-probabilities are reported of these scores. Then penalties and logit_bias (they
    never revive a filtered token), temperature, top-k, top-p, min-p, draw. Temperature 0 takes the argmax,
    ties by lowest id.

    A draw depends on nothing but the row's scores and (seed, position, token id): not on batch, order or
    device.
    NaN or +inf in the target, or NaN or inf in another stream on a kept token, gives status
    NUMERICAL for that row alone; nothing ever falls back to the target's scores.

    Raises ValueError for rows or ids outside the logits.

    >>> from uld_kernels import SampleRow, Term, rules
    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [4.0, 0.0, 0.0]])
    >>> hush = Term(kind=rules.SUBTRACT, strength=1.0, digest=7, row_a=1)
    >>> fused_sample(logits, [SampleRow(row_b=0, terms=(hush,), temperature=0.0)], vocab_size=3,
    ...              protected_ids=torch.tensor([], dtype=torch.int64)).token_ids_B
    tensor([1])
    """
    _check(logits_RV, rows, vocab_size, late)
    if _runs_on_triton(logits_RV, vocab_size):
        # Imported where used: triton is not there on every machine that serves from the CPU.
        from uld_kernels import sampler_triton

        logits_RV, late = _with_late(logits_RV, late, vocab_size)
        return sampler_triton.sample(
            logits_RV, rows, vocab_size=vocab_size, protected_ids=protected_ids, late=late
        )
    return sampler_reference.sample(
        logits_RV, rows, vocab_size=vocab_size, protected_ids=protected_ids, late=late
    )


def fused_score(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    target_ids_B: torch.Tensor,
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
    late: LateRows | None = None,
) -> ScoreOutput:
    """The log-probability and rank of given tokens under the same fused scores that fused_sample draws from.

    For log-probabilities of prompts and for evaluation. Penalties, bias and sampling parameters of the rows
    play no part. A filtered token has -inf. Raises ValueError for rows or ids outside the logits.
    """
    _check(logits_RV, rows, vocab_size, late)
    if target_ids_B.shape != (len(rows),):
        raise ValueError(f"one target id a row: {len(rows)} rows, target_ids_B {tuple(target_ids_B.shape)}")
    if target_ids_B.device.type == "cpu" and not ((target_ids_B >= 0) & (target_ids_B < vocab_size)).all():
        raise ValueError(f"target ids must be 0 to {vocab_size - 1}, got {target_ids_B.tolist()}")
    if _runs_on_triton(logits_RV, vocab_size):
        from uld_kernels import sampler_triton

        logits_RV, late = _with_late(logits_RV, late, vocab_size)
        return sampler_triton.score(
            logits_RV, rows, target_ids_B, vocab_size=vocab_size, protected_ids=protected_ids, late=late
        )
    return sampler_reference.score(
        logits_RV, rows, target_ids_B, vocab_size=vocab_size, protected_ids=protected_ids, late=late
    )


def fused_scores(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
    late: LateRows | None = None,
) -> FusedOutput:
    """The scores that fused_sample draws from, before penalties and temperature, as whole rows: for engines that draw
    themselves. Sampling parameters of the rows play no part.

    Runs in torch on every device. A row whose status is not OK is -inf everywhere: whoever draws must look at it, and
    never draw from the target's logits instead. Raises ValueError for rows or ids outside the logits.
    """
    _check(logits_RV, rows, vocab_size, late)
    return sampler_reference.fused(
        logits_RV, rows, vocab_size=vocab_size, protected_ids=protected_ids, late=late
    )


def prove(
    device: torch.device,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    head_dtype: torch.dtype | None = None,
) -> bool:
    """Tries the Triton kernels on a device against the torch sampler; whether fused_sample will use them there. With
    `head_dtype`, whether it will also score late rows of such a head on lists: if not, it computes them whole.

    The first call for a device, vocabulary and types takes seconds, so an engine makes it before serving. Without it
    the first fused_sample does. False on CPU, and where the kernels differ or do not run (logged as a warning).
    """
    if device.type != "cuda" or dtype == torch.float64:
        return False
    if not trial.verdict(device, vocab_size, dtype).is_proven:
        return False
    return head_dtype is None or trial.late_verdict(device, vocab_size, dtype, head_dtype).is_proven


def _runs_on_triton(logits_RV: torch.Tensor, vocab_size: int) -> bool:
    # fp64 is for oracles.
    return prove(logits_RV.device, vocab_size, dtype=logits_RV.dtype)


def _with_late(
    logits_RV: torch.Tensor, late: LateRows | None, vocab_size: int
) -> tuple[torch.Tensor, LateRows | None]:
    """Late rows computed whole where the kernels that score them on lists have not been proven."""
    if late is None:
        return logits_RV, None
    head_dtype = late.weight_WD.dtype
    if prove(logits_RV.device, vocab_size, dtype=logits_RV.dtype, head_dtype=head_dtype):
        return logits_RV, late
    return torch.cat([logits_RV.float(), late.all_scores()]), None


def _check(
    logits_RV: torch.Tensor, rows: Sequence[SampleRow], vocab_size: int, late: LateRows | None
) -> None:
    num_logit_rows, width = logits_RV.shape
    num_rows = num_logit_rows + (0 if late is None else late.hidden_AD.shape[0])
    if not 0 < vocab_size <= width:
        raise ValueError(f"vocab_size {vocab_size} does not fit logits of width {width}")
    if late is not None:
        late.check(vocab_size)
    for row in rows:
        used = [row.row_b, *(index for term in row.terms for index in (term.row_a, term.row_q, term.row_p))]
        if max(used) >= num_rows:
            raise ValueError(f"row {max(used)} is outside the {num_rows} rows of logits")
        if row.row_b >= num_logit_rows:
            raise ValueError(f"row {row.row_b} is late; a target needs all its logits")
