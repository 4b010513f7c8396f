"""The sampler without any shortcut: every formula on the whole vocabulary, every token with its noise, fp64.

What sampler_reference (compressed, lazily sorted) and the Triton kernel are compared with."""

from __future__ import annotations

from math import inf

import torch
from uld_kernels import SampleRow, Term, reference, rules
from uld_kernels.noise import Stream, gumbel_noise


def banned_target(logits_RV: torch.Tensor, row: SampleRow) -> torch.Tensor:
    b = logits_RV[row.row_b].double()
    if row.allowed_mask is not None:
        b = b.masked_fill(~row.allowed_mask, -inf)
    if row.banned_ids is not None:
        b = b.index_fill(0, row.banned_ids, -inf)
    return b


def prefilter_keep(b: torch.Tensor, terms: tuple[Term, ...]) -> torch.Tensor:
    keep = b > -inf
    for term in terms:
        if term.filter_mode == rules.PLAUSIBILITY:
            keep &= reference.plausibility_keep(b, tau=term.tau, min_keep=term.min_keep)
        elif term.filter_mode == rules.OFFICIAL:
            keep &= reference.official_keep(b, tau=term.tau)
    return keep


def combined(logits_RV: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """Scores after combining, before the fused filter; -inf where the pre-filters removed a token."""
    b = banned_target(logits_RV, row)
    raw = logits_RV.double()
    terms = row.distinct_terms
    if not terms:
        return b
    if len(terms) == 1:
        s = _plain(b, raw, terms[0])
    else:
        s = reference.compose(b, [_penalty(b, raw, term) for term in terms], mode=row.compose)
    return torch.where(prefilter_keep(b, terms), s, -inf)


def fused_scores(logits_RV: torch.Tensor, row: SampleRow, protected_ids: torch.Tensor) -> torch.Tensor:
    """The scores of which log-probabilities are reported."""
    s, terms = combined(logits_RV, row), row.distinct_terms
    tau = max((term.tau for term in terms if term.filter_mode == rules.FUSED), default=0.0)
    if tau > 0.0:
        s = s.masked_fill(~reference.fused_keep(s, tau=tau), -inf)
    if any(term.protect for term in terms):
        s = reference.protect(s, banned_target(logits_RV, row), protected_ids)
    return s


def penalized(s: torch.Tensor, b: torch.Tensor, row: SampleRow) -> torch.Tensor:
    vocab_size = s.shape[0]
    none = torch.tensor([], dtype=torch.int64)
    output = none if row.output_ids is None else row.output_ids
    prompt = none if row.prompt_ids is None else row.prompt_ids
    counts = torch.bincount(output, minlength=vocab_size)
    seen = torch.bincount(torch.cat([prompt, output]), minlength=vocab_size) > 0
    anchored = s + (b.logsumexp(-1) - s.logsumexp(-1))
    s = anchored if row.repetition_penalty != 1.0 else s
    s = reference.repetition_penalty(s, seen, penalty=row.repetition_penalty)
    s = reference.presence_penalty(s, counts, penalty=row.presence_penalty)
    s = reference.frequency_penalty(s, counts, penalty=row.frequency_penalty)
    if row.logit_bias is not None:
        s = s.index_add(0, row.logit_bias[0], row.logit_bias[1].double())
    return s


def truncated(z: torch.Tensor, row: SampleRow) -> torch.Tensor:
    z = z.masked_fill(~reference.top_k_keep(z, row.top_k), -inf)
    if row.top_p < 1.0:
        z = z.masked_fill(~reference.top_p_keep(z, row.top_p), -inf)
    return z.masked_fill(~reference.min_p_keep(z, row.min_p), -inf)


def sampling_scores(logits_RV: torch.Tensor, row: SampleRow, protected_ids: torch.Tensor) -> torch.Tensor:
    """Log-weights that the draw is made from, at temperature > 0."""
    s = fused_scores(logits_RV, row, protected_ids)
    return truncated(penalized(s, banned_target(logits_RV, row), row) / row.temperature, row)


def token(logits_RV: torch.Tensor, row: SampleRow, protected_ids: torch.Tensor) -> int:
    if row.temperature == 0.0:
        s = fused_scores(logits_RV, row, protected_ids)
        return int(penalized(s, banned_target(logits_RV, row), row).argmax())
    z = sampling_scores(logits_RV, row, protected_ids)
    ids = torch.arange(z.shape[0])
    return int((z + gumbel_noise(ids, Stream.of([row.seed], [row.position]))[0]).argmax())


def _plain(b: torch.Tensor, raw: torch.Tensor, term: Term) -> torch.Tensor:
    if term.kind == rules.SUBTRACT:
        return reference.subtract(b, raw[term.row_a], strength=term.strength)
    if term.kind == rules.RELU_DIFFERENCE:
        # A banned b would give a difference of inf, and inf minus inf.
        s = reference.relu_difference(
            b.where(b > -inf, 0.0), raw[term.row_a], strength=term.strength, dead_zone=term.dead_zone
        )
        return s.where(b > -inf, -inf)
    if term.kind == rules.PAIR_LINEAR:
        log_q, log_p = raw[term.row_q].log_softmax(-1), raw[term.row_p].log_softmax(-1)
        return reference.pair_linear(b, log_q, log_p, strength=term.strength)
    return reference.pair_rank(b, raw[term.row_q], raw[term.row_p], rank_k=term.rank_k)


def _penalty(b: torch.Tensor, raw: torch.Tensor, term: Term) -> torch.Tensor:
    if term.kind == rules.SUBTRACT:
        log_a = raw[term.row_a].log_softmax(-1)
        return reference.subtract_penalty(log_a, strength=term.strength, vocab_size=b.shape[0])
    if term.kind == rules.RELU_DIFFERENCE:
        assistant = raw[term.row_a].where(b > -inf, -inf)
        return reference.relu_difference_penalty(
            b.where(b > -inf, 0.0), assistant, strength=term.strength, dead_zone=term.dead_zone
        )
    if term.kind == rules.PAIR_LINEAR:
        log_q, log_p = raw[term.row_q].log_softmax(-1), raw[term.row_p].log_softmax(-1)
        return reference.pair_linear_penalty(log_q, log_p, strength=term.strength)
    removed = reference.pair_rank_removed(raw[term.row_q], raw[term.row_p], rank_k=term.rank_k)
    return torch.zeros_like(b).masked_fill(removed, inf)
