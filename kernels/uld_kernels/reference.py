"""Every formula of combining and filtering scores, in plain torch: the definition that all else is tested
against.

Called by the torch sampler (which is the CPU backend) and by tests. Pure functions of (..., V) tensors in
any float dtype; no function changes its input. Knows no rows, requests or devices; random numbers are in
noise.py.

Notation: b target, a assistant, q retain-tuned or tuned, p forget-tuned or reference; strength is
positive."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, inf, log

import torch

from uld_kernels import rules

# --- combine rules: scores before normalisation ---------------------------------------------------


def subtract(b: torch.Tensor, a: torch.Tensor, *, strength: float | torch.Tensor) -> torch.Tensor:
    """s = b - strength * a.  ULD, arXiv 2406.08607 Eq. 2, there on the kept set of a filter."""
    return b - strength * a


def relu_difference(
    b: torch.Tensor,
    a: torch.Tensor,
    *,
    strength: float | torch.Tensor,
    dead_zone: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """s = b - strength * relu(a - b - dead_zone), never raises a logit.  RKLD, arXiv 2406.01983 Eq. 1; 2310.02238.

    The dead zone, in logits, is ours (none in the papers): a soft threshold, below which a difference is noise and
    counts as none.
    """
    return b - strength * torch.relu(a - b - dead_zone)


def pair_linear(
    b: torch.Tensor, log_q: torch.Tensor, log_p: torch.Tensor, *, strength: float | torch.Tensor
) -> torch.Tensor:
    """s = b + strength * (log q - log p).  arXiv 2605.31293; offset unlearning, arXiv 2404.11045; 2401.08565.

    log_q and log_p are log-softmax over the whole vocabulary: their offset then has a meaning of its own.
    """
    return b + strength * (log_q - log_p)


def pair_rank(b: torch.Tensor, q: torch.Tensor, p: torch.Tensor, *, rank_k: int) -> torch.Tensor:
    """s = b, but the rank_k tokens with the largest p - q, ties included, are -inf.  arXiv 2605.31293."""
    return b.masked_fill(pair_rank_removed(q, p, rank_k=rank_k), -inf)


def pair_rank_removed(q: torch.Tensor, p: torch.Tensor, *, rank_k: int) -> torch.Tensor:
    """Which tokens pair_rank removes, as a mask over the whole vocabulary."""
    difference = p - q
    return difference >= kth_largest(difference, rank_k)


# --- composition of several rules -----------------------------------------------------------------


def subtract_penalty(log_a: torch.Tensor, *, strength: float | torch.Tensor, vocab_size: int) -> torch.Tensor:
    """strength * (log a + log V): what `subtract` takes from each token, zero where the assistant is uniform.

    With raw logits the sign of a penalty would hang on an arbitrary offset, and clipping it would mean
    nothing.
    """
    return strength * (log_a + log(vocab_size))


def relu_difference_penalty(
    b: torch.Tensor,
    a: torch.Tensor,
    *,
    strength: float | torch.Tensor,
    dead_zone: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """strength * relu(a - b - dead_zone), never negative."""
    return strength * torch.relu(a - b - dead_zone)


def pair_linear_penalty(
    log_q: torch.Tensor, log_p: torch.Tensor, *, strength: float | torch.Tensor
) -> torch.Tensor:
    """strength * (log p - log q)."""
    return strength * (log_p - log_q)


def compose(b: torch.Tensor, penalties: Sequence[torch.Tensor], *, mode: int) -> torch.Tensor:
    """One row of scores from several penalties.

    COMPOSE_MAX: s = b - max_i max(penalty_i, 0). Another profile never raises a score, order does not matter
    and a repeated one changes nothing. COMPOSE_SUM: s = b - sum_i penalty_i, un-clipped.
    """
    if mode == rules.COMPOSE_SUM:
        return b - sum(penalties, torch.zeros_like(b))
    total = torch.zeros_like(b)
    for penalty in penalties:
        total = torch.maximum(total, penalty)
    return b - total


# --- filters --------------------------------------------------------------------------------------


def kth_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest along the last axis, (..., 1); the smallest if there are fewer than k."""
    k = min(k, values.shape[-1])
    return values.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def plausibility_threshold(b: torch.Tensor, *, tau: float, min_keep: int) -> torch.Tensor:
    """The smallest target logit that stays, (..., 1): min(max + ln tau, the min_keep-th largest)."""
    return torch.minimum(relative_threshold(b.amax(-1, keepdim=True), log(tau)), kth_largest(b, min_keep))


def official_threshold(b: torch.Tensor, *, tau: float) -> torch.Tensor:
    """The plausibility threshold with min_keep = floor(tau * V), as the published ULD code computes it.

    Where floor(tau * V) is 0 that code keeps everything (it indexes the sorted scores at -1), and so does
    this.
    """
    min_keep = floor(tau * b.shape[-1])
    if min_keep == 0:
        return b.amin(-1, keepdim=True)
    return plausibility_threshold(b, tau=tau, min_keep=min_keep)


def plausibility_keep(b: torch.Tensor, *, tau: float, min_keep: int) -> torch.Tensor:
    """keep = { p_b >= tau * max p_b } and the min_keep best of b; banned tokens (-inf) never.

    arXiv 2406.08607, there with floor(tau * V). With min_keep = 1 this fails open: a target that is certain
    of the secret keeps only the secret, and no strength removes it. Profiles with min_keep below 32 are
    refused at load.
    """
    return (b >= plausibility_threshold(b, tau=tau, min_keep=min_keep)) & (b > -inf)


def official_keep(b: torch.Tensor, *, tau: float) -> torch.Tensor:
    """plausibility_keep with min_keep = floor(tau * V): the filter of the published ULD code."""
    return (b >= official_threshold(b, tau=tau)) & (b > -inf)


def fused_keep(s: torch.Tensor, *, tau: float) -> torch.Tensor:
    """keep = { s >= max s + ln tau }: min-p on fused scores. It cannot force a suppressed token to stay."""
    return (s >= relative_threshold(s.amax(-1, keepdim=True), log(tau))) & (s > -inf)


def relative_threshold(best: torch.Tensor, log_tau: float | torch.Tensor) -> torch.Tensor:
    """The smallest score at least tau times as likely as the best one."""
    return best + log_tau


# --- protection -----------------------------------------------------------------------------------


def protect(s: torch.Tensor, b: torch.Tensor, protected_ids: torch.Tensor) -> torch.Tensor:
    """Protected tokens (end of text, control) keep the probability that the target alone gives them.

    The other tokens share the rest in the proportions of s. In logits: s(t) = b(t) for protected t, and all
    others move by LSE(b over the others) - LSE(s over the others), so that LSE of the result is LSE(b). 1 - p
    is never formed, which keeps it exact where the target is certain of the end. Banned tokens (b = -inf)
    stay banned.
    """
    others_b = b.index_fill(-1, protected_ids, -inf)
    others_s = s.index_fill(-1, protected_ids, -inf)
    shift = protection_shift(others_b.logsumexp(-1, keepdim=True), others_s.logsumexp(-1, keepdim=True))
    return (others_s + shift).index_copy(-1, protected_ids, b.index_select(-1, protected_ids))


def protection_shift(lse_b: torch.Tensor, lse_s: torch.Tensor) -> torch.Tensor:
    """How far `protect` moves all but the protected tokens, of which these are the log-sum-exps before and after the
    rule; 0 where there are none."""
    return torch.where(lse_s > -inf, lse_b - lse_s, 0.0)


# --- penalties on history -------------------------------------------------------------------------


def repetition_penalty(s: torch.Tensor, seen: torch.Tensor, *, penalty: float | torch.Tensor) -> torch.Tensor:
    """Seen tokens: s / penalty if s > 0, else s * penalty (after arXiv 1909.05858, as in transformers)."""
    return torch.where(seen, torch.where(s > 0, s / penalty, s * penalty), s)


def presence_penalty(s: torch.Tensor, counts: torch.Tensor, *, penalty: float | torch.Tensor) -> torch.Tensor:
    """s - penalty for every token that has been put out, as OpenAI defines it."""
    return s - penalty * (counts > 0).to(s.dtype)


def frequency_penalty(
    s: torch.Tensor, counts: torch.Tensor, *, penalty: float | torch.Tensor
) -> torch.Tensor:
    """s - penalty * how often the token has been put out, as OpenAI defines it."""
    return s - penalty * counts.to(s.dtype)


# --- truncation for sampling ----------------------------------------------------------------------


def largest(values: torch.Tensor, n: int) -> torch.Tensor:
    """Indices of the n largest of a (V,) tensor, largest first, ties by lowest index."""
    if n >= values.shape[0]:
        return values.sort(descending=True, stable=True).indices
    candidates = (values >= kth_largest(values, n)).nonzero().flatten()
    return candidates[values[candidates].sort(descending=True, stable=True).indices[:n]]


def top_k_keep(z: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest; of equal ones the lowest ids. k = 0 keeps all."""
    if k <= 0 or k >= z.shape[-1]:
        return z > -inf
    order = z.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(z, dtype=torch.bool).scatter_(-1, order, True) & (z > -inf)


def nucleus_size(sorted_weights: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """How many of the weights (largest first, fp64) it takes to reach `mass`; at least one."""
    before = sorted_weights.cumsum(-1) - sorted_weights
    return (before < mass).sum(-1, keepdim=True).clamp_min(1)


def top_p_keep(z: torch.Tensor, p: float) -> torch.Tensor:
    """The fewest most likely tokens whose probability reaches p (arXiv 1904.09751); ties by lowest id."""
    weights = (z.double() - z.amax(-1, keepdim=True).double()).exp()
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    size = nucleus_size(ordered, p * weights.sum(-1, keepdim=True))
    in_nucleus = torch.arange(z.shape[-1], device=z.device) < size
    return torch.zeros_like(z, dtype=torch.bool).scatter_(-1, order, in_nucleus) & (z > -inf)


def min_p_keep(z: torch.Tensor, p: float) -> torch.Tensor:
    """Tokens at least p times as likely as the most likely one (arXiv 2407.01082); 0 keeps all."""
    return z > -inf if p <= 0.0 else z >= z.amax(-1, keepdim=True) + log(p)


# --- preset uld-official: the published code's numbers, for parity tests only ---------------------


def official_sampling_scores(
    b: torch.Tensor, a: torch.Tensor, *, strength: float, tau: float
) -> torch.Tensor:
    """What the published ULD code samples from: subtract on its kept set, -1000 elsewhere.

    The published greedy step, argmax(scores * keep), picks a filtered token whenever all kept scores are
    negative; that defect is not reproduced. Serving uses neither this nor official_scoring_scores.
    """
    return torch.where(official_keep(b, tau=tau), subtract(b, a, strength=strength), -1000.0)


def official_scoring_scores(b: torch.Tensor, a: torch.Tensor, *, strength: float, tau: float) -> torch.Tensor:
    """What the published ULD code evaluates: subtract on its kept set, the target's own logits elsewhere."""
    return torch.where(official_keep(b, tau=tau), subtract(b, a, strength=strength), b)
