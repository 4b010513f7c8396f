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
from uld_kernels.rows import SampleOutput, SampleRow, Term

logger = logging.getLogger(__name__)

_TOLERANCE: Final = 1e-4
_NUM_LOGITS: Final = 5
_SPOILED: Final = 3


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
    try:
        reason = _difference(device, vocab_size, dtype)
    except Exception:
        logger.warning("the Triton sampler does not run on %s; torch samples instead", device, exc_info=True)
        return Verdict(False, "it does not run")
    if reason:
        logger.warning("the Triton sampler is wrong on %s (%s); torch samples instead", device, reason)
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
        (rank, pair),
    )
    ids = torch.tensor([1, 5, 5, 8, 30]) % vocab_size
    few = torch.tensor(sorted(set(ids.tolist())))
    mask = torch.arange(vocab_size) % 3 != 1
    rows = [
        SampleRow(0, terms, temperature=temperature, seed=11, position=number)
        for number, terms in enumerate(compositions)
        for temperature in (0.0, 0.9)
    ]
    bias = (few, torch.full((len(few),), 1.5))
    extras = [
        SampleRow(0, top_k=7, top_p=0.8),
        SampleRow(0, top_p=0.5),
        SampleRow(0, min_p=0.1),
        SampleRow(0, num_logprobs=3),
        SampleRow(0, repetition_penalty=1.3, presence_penalty=0.4, output_ids=ids, prompt_ids=few),
        SampleRow(0, logit_bias=bias, frequency_penalty=0.3, output_ids=ids),
        SampleRow(0, banned_ids=few[1:], allowed_mask=mask),
    ]
    for terms in ((), (hush,), (relu,)):
        rows += [replace(row, terms=terms, seed=12, position=number) for number, row in enumerate(extras)]
    rows += [SampleRow(_SPOILED), SampleRow(0, (replace(relu, row_a=_SPOILED),), seed=2)]
    rows += [SampleRow(4, (replace(hush, row_a=_SPOILED), relu), seed=4)]
    return [*rows, SampleRow(4, (hush,), seed=3, compose=rules.COMPOSE_SUM)]


def _difference(device: torch.device, vocab_size: int, dtype: torch.dtype) -> str:
    """What differs between the two samplers; nothing if they agree."""
    from uld_kernels import sampler_triton

    generator = torch.Generator().manual_seed(vocab_size)
    logits_RV = (torch.randn(_NUM_LOGITS, vocab_size, generator=generator) * 3).to(dtype)
    logits_RV[_SPOILED, logits_RV[0].argmax()] = nan
    rows = trial_rows(vocab_size)
    ids = torch.tensor(sorted({0, vocab_size - 1}))
    ours = sampler_triton.sample(
        logits_RV.to(device), rows, vocab_size=vocab_size, protected_ids=ids.to(device)
    )
    exact, rounded = (
        sampler_reference.sample(numbers, rows, vocab_size=vocab_size, protected_ids=ids)
        for numbers in (logits_RV.double(), logits_RV.float())
    )
    # Where rounding to fp32 decides for torch itself, nothing is to be learnt.
    is_clear_B = exact.token_ids_B == rounded.token_ids_B
    return _first_difference(ours, exact, is_clear_B)


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
