"""Whether this machine's Triton kernels may serve: a trial against the torch sampler, once a device, vocabulary and
type. Called by ops and static_sampler.

A kernel that a new driver or compiler breaks could let through what it should suppress, so none serves untried."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from math import nan
from typing import Final

import torch

from uld_kernels import rules, sampler_reference
from uld_kernels.late import late_list_of
from uld_kernels.rows import LateRows, SampleOutput, SampleRow, Term

logger = logging.getLogger(__name__)

_TOLERANCE: Final = 1e-4
_NUM_LOGITS: Final = 5
_SPOILED: Final = 3
# Late rows of the trial follow the logits: one near the target, one that hushes its best tokens far down, one spoiled.
_NEAR, _FAR, _SPOILED_LATE = range(_NUM_LOGITS, _NUM_LOGITS + 3)
# A whole block of late_triton's columns and a rest, and a multiple of 16 as widths of models are: Triton compiles
# other code for strides that are none.
_WIDTH: Final = 272


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the Triton sampler gave what the torch sampler gives, and if not, what differed."""

    is_proven: bool
    reason: str = ""


@lru_cache(maxsize=64)
def verdict(device: torch.device, vocab_size: int, dtype: torch.dtype) -> Verdict:
    """Runs a mixed batch through both samplers; logs a warning if they differ. Takes seconds (it compiles), once.

    Must not be called for the first time while a CUDA graph is being recorded.
    """
    batches = {False: trial_rows(vocab_size)}
    return _verdict(device, vocab_size, dtype, batches, None, "torch samples instead")


@lru_cache(maxsize=64)
def late_verdict(
    device: torch.device, vocab_size: int, dtype: torch.dtype, head_dtype: torch.dtype
) -> Verdict:
    """The same of rows whose assistants are late, rows of a head of `head_dtype`, among rows whose are not."""
    rows = late_trial_rows(vocab_size)
    # Rows that no list serves turn the logits of their batch into fp32: the others are tried by themselves too. That is
    # about types alone, so rows without penalties and truncations do.
    on_lists = [row for row in rows if row.temperature != 1.0 and _late_list(row, vocab_size) is not None]
    batches = {False: rows, True: on_lists}
    return _verdict(device, vocab_size, dtype, batches, head_dtype, "late rows are computed whole instead")


def _verdict(
    device: torch.device,
    vocab_size: int,
    dtype: torch.dtype,
    batches: dict[bool, list[SampleRow]],
    head_dtype: torch.dtype | None,
    instead: str,
) -> Verdict:
    """`batches` by whether the head has a bias."""
    kind = "the Triton sampler" if head_dtype is None else "the Triton sampler of late rows"
    try:
        tried = (
            _difference(device, vocab_size, dtype, rows, head_dtype, has_bias=has_bias)
            for has_bias, rows in batches.items()
        )
        reason = next(filter(None, tried), "")
    except Exception:
        logger.warning("%s does not run on %s; %s", kind, device, instead, exc_info=True)
        return Verdict(False, "it does not run")
    if reason:
        logger.warning("%s is wrong on %s (%s); %s", kind, device, reason, instead)
    return Verdict(not reason, reason)


def trial_rows(vocab_size: int) -> list[SampleRow]:
    """Every rule and filter greedy and sampled; compositions; truncations, penalties, bans and NaN; logits 0 to 4."""
    hush = Term(
        rules.SUBTRACT, 0.75, 1, row_a=1, filter_mode=rules.PLAUSIBILITY, tau=0.01, min_keep=40, protect=True
    )
    relu = Term(rules.RELU_DIFFERENCE, 2.0, 2, row_a=2, filter_mode=rules.FUSED, tau=0.02)
    pair = Term(rules.PAIR_LINEAR, 1.5, 3, row_q=1, row_p=2, filter_mode=rules.FUSED, tau=0.02, protect=True)
    rank = Term(rules.PAIR_RANK, 1.0, 4, row_q=1, row_p=2, rank_k=3)
    official = Term(rules.SUBTRACT, 0.8, 5, row_a=2, filter_mode=rules.OFFICIAL, tau=0.1)
    everywhere = Term(rules.SUBTRACT, 0.5, 6, row_a=2)
    compositions = (
        (),
        (hush,),
        (relu,),
        (pair,),
        (rank,),
        (official,),
        (everywhere,),
        (hush, relu),
        (replace(relu, dead_zone=1.2, digest=7),),
        (rank, pair),
    )
    rows = [
        SampleRow(0, terms, temperature=temperature, seed=11, position=number)
        for number, terms in enumerate(compositions)
        for temperature in (0.0, 0.9)
    ]
    extras = _extras(vocab_size)
    for terms in ((), (hush,), (relu,)):
        rows += [replace(row, terms=terms, seed=12, position=number) for number, row in enumerate(extras)]
    rows += [SampleRow(_SPOILED), SampleRow(0, (replace(relu, row_a=_SPOILED),), seed=2)]
    rows += [SampleRow(4, (replace(hush, row_a=_SPOILED), relu), seed=4)]
    return [*rows, SampleRow(4, (hush,), seed=3, compose=rules.COMPOSE_SUM)]


def late_trial_rows(vocab_size: int) -> list[SampleRow]:
    """Every way to list a late row; rows that are none or that no list serves; truncations, penalties, bans and NaN."""
    hush = Term(
        rules.SUBTRACT,
        0.75,
        1,
        row_a=_NEAR,
        filter_mode=rules.PLAUSIBILITY,
        tau=0.01,
        min_keep=40,
        protect=True,
    )
    far = Term(rules.RELU_DIFFERENCE, 1.0, 3, row_a=_FAR, filter_mode=rules.FUSED, tau=0.02)
    near = replace(far, digest=2, row_a=_NEAR, protect=True)
    whole = replace(far, digest=4, strength=2.0, row_a=2)
    among = replace(hush, kind=rules.RELU_DIFFERENCE, digest=5, row_a=_FAR, protect=False)
    everywhere = Term(rules.SUBTRACT, 0.5, 6, row_a=_NEAR)
    compositions = (
        (), (hush,), (near,), (far,), (near, far), (whole, far), (among, near), (everywhere,), (whole,),
    )  # fmt: skip
    rows = [
        SampleRow(0, terms, temperature=temperature, seed=21, position=number)
        for number, terms in enumerate(compositions)
        for temperature in (0.0, 0.9)
    ]
    for terms in ((hush,), (far,), (near, far)):
        extras = _extras(vocab_size)
        rows += [replace(row, terms=terms, seed=22, position=number) for number, row in enumerate(extras)]
    rows += [SampleRow(_SPOILED, (far,)), SampleRow(0, (whole, replace(near, row_a=_SPOILED_LATE)), seed=2)]
    return [*rows, SampleRow(0, (near, far), seed=3, compose=rules.COMPOSE_SUM)]


def _extras(vocab_size: int) -> list[SampleRow]:
    """Rows without terms: truncations, penalties, bias, bans, alternatives."""
    ids = torch.tensor([1, 5, 5, 8, 30]) % vocab_size
    few = torch.tensor(sorted(set(ids.tolist())))
    mask = torch.arange(vocab_size) % 3 != 1
    bias = (few, torch.full((len(few),), 1.5))
    return [
        SampleRow(0, top_k=7, top_p=0.8),
        SampleRow(0, top_p=0.5),
        SampleRow(0, min_p=0.1),
        SampleRow(0, num_logprobs=3),
        SampleRow(0, repetition_penalty=1.3, presence_penalty=0.4, output_ids=ids, prompt_ids=few),
        SampleRow(0, logit_bias=bias, frequency_penalty=0.3, output_ids=ids),
        SampleRow(0, banned_ids=few[1:], allowed_mask=mask),
    ]


def _difference(
    device: torch.device,
    vocab_size: int,
    dtype: torch.dtype,
    rows: list[SampleRow],
    head_dtype: torch.dtype | None,
    *,
    has_bias: bool,
) -> str:
    """What differs between the two samplers; nothing if they agree."""
    from uld_kernels import sampler_triton

    generator = torch.Generator().manual_seed(vocab_size)
    logits_RV = torch.randn(_NUM_LOGITS, vocab_size, generator=generator) * 3
    late = None
    if head_dtype is not None:
        late = _late_rows(logits_RV, vocab_size, generator, head_dtype, has_bias=has_bias)
    logits_RV = logits_RV.to(dtype)
    logits_RV[_SPOILED, logits_RV[0].argmax()] = nan
    ids = torch.tensor(sorted({0, vocab_size - 1}))
    ours = sampler_triton.sample(
        logits_RV.to(device),
        rows,
        vocab_size=vocab_size,
        protected_ids=ids.to(device),
        late=None if late is None else _moved(late, device),
    )
    whole_RV = logits_RV.double()
    if late is not None:
        late_RV = late.hidden_AD.double() @ late.weight_WD.double().T
        whole_RV = torch.cat([whole_RV, late_RV if late.bias_W is None else late_RV + late.bias_W])
    exact, rounded = (
        sampler_reference.sample(numbers, rows, vocab_size=vocab_size, protected_ids=ids)
        for numbers in (whole_RV, whole_RV.float())
    )
    # Where rounding to fp32 decides for torch itself, nothing is to be learnt.
    is_clear_B = exact.token_ids_B == rounded.token_ids_B
    return _first_difference(ours, exact, is_clear_B)


def _late_list(row: SampleRow, vocab_size: int) -> int | None:
    return late_list_of(row.distinct_terms, first_late=_NUM_LOGITS, vocab_size=vocab_size)


def _moved(late: LateRows, device: torch.device) -> LateRows:
    bias_W = None if late.bias_W is None else late.bias_W.to(device)
    return LateRows(late.hidden_AD.to(device), late.weight_WD.to(device), bias_W)


def _late_rows(
    logits_RV: torch.Tensor,
    vocab_size: int,
    generator: torch.Generator,
    head_dtype: torch.dtype,
    *,
    has_bias: bool,
) -> LateRows:
    """Makes the first row of the logits one of the same head."""
    weight_VD = torch.randn(vocab_size, _WIDTH, generator=generator).to(head_dtype)
    hidden_D = torch.randn(_WIDTH, generator=generator) * 3 / _WIDTH**0.5
    near_D = hidden_D + 0.2 * torch.randn(_WIDTH, generator=generator) / _WIDTH**0.5
    hidden_AD = torch.stack([near_D, 1.5 * hidden_D, torch.full_like(hidden_D, nan)]).to(head_dtype)
    logits_RV[0] = weight_VD.float() @ hidden_D
    if not has_bias:
        return LateRows(hidden_AD, weight_VD)
    bias_V = torch.randn(vocab_size, generator=generator)
    logits_RV[0] += bias_V
    return LateRows(hidden_AD, weight_VD, bias_V)


def _first_difference(ours: SampleOutput, exact: SampleOutput, is_clear_B: torch.Tensor) -> str:
    if ours.digests != exact.digests:
        return "digests"
    if not is_clear_B.sum() * 2 > len(is_clear_B):
        return "too few rows are clear"
    for name in ("status_B", "token_ids_B", "num_kept_B", "argmax_changed_B"):
        if not torch.equal(getattr(ours, name).cpu()[is_clear_B], getattr(exact, name)[is_clear_B]):
            return name
    for name in ("logprob_B", "kl_B", "top_logprobs_BN"):
        got, wanted = getattr(ours, name).cpu()[is_clear_B], getattr(exact, name)[is_clear_B]
        if not torch.allclose(got, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
            return name
    return ""
