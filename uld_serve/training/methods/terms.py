"""Terms that several objectives are made of, as pure functions of logits. Called by the methods; a mean over no token
is 0. Shapes: N tokens, V vocabulary, B examples.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch

from uld_serve.training.examples import Kind
from uld_serve.training.methods.method import Tokens, mean_over
from uld_serve.training.settings import RetainTerm

Scores = Callable[[Tokens], torch.Tensor]
"""(N, V) logits of some tokens."""

OWN: Scores = attrgetter("own_NV")
"""Those of what is trained."""


def nll(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """(N,): -log p(y), in nats."""
    return -logits_NV.log_softmax(-1).gather(-1, labels_N[:, None])[:, 0]


def divergence(logits_NV: torch.Tensor, other_NV: torch.Tensor) -> torch.Tensor:
    """(N,): KL(softmax(logits) || softmax(other)), summed over the vocabulary."""
    log_p_NV, log_q_NV = logits_NV.log_softmax(-1), other_NV.log_softmax(-1)
    # Where p is 0 its term is 0, whatever q is.
    gap_NV = torch.where(log_p_NV > float("-inf"), log_p_NV - log_q_NV, 0.0)
    return (log_p_NV.exp() * gap_NV).sum(-1)


def mean_nll(tokens: Tokens, scores: Scores, chosen_N: torch.Tensor) -> torch.Tensor:
    """CE(y, scores) over the chosen tokens."""
    return tokens.mean(chosen_N, lambda some: nll(scores(some), some.labels_N))


def retain(tokens: Tokens, scores: Scores, kind: RetainTerm) -> torch.Tensor:
    """What keeps the rest as it is: KL(target || scores) over tokens that are kept, or the NLL of the answers. That of
    other answers to forget prompts is left out: they are to stay possible, not to be learnt."""
    if kind == "none":
        return tokens.hidden_ND.float().sum() * 0.0
    if kind == "nll":
        return mean_nll(tokens, scores, tokens.of(Kind.RETAIN))
    return tokens.mean(tokens.is_kept_N, lambda some: divergence(some.target_NV, scores(some)))


def npo(tokens: Tokens, scores: Scores, *, beta: float) -> torch.Tensor:
    """Negative preference optimisation (arXiv 2404.05868, Eq. 3) against the frozen target.

        -(2 / beta) E log sigmoid(-beta log(pi(y|x) / pi_ref(y|x)))

    Over whole answers; bounded below, where gradient ascent is not. As beta goes to 0 its gradient is that of ascent.
    """

    def log_ratio(some: Tokens) -> torch.Tensor:
        return nll(some.target_NV, some.labels_N) - nll(scores(some), some.labels_N)

    ratio_N = tokens.each(tokens.is_forget_N, log_ratio)
    example_N = tokens.example_N[tokens.is_forget_N]
    ratio_B = ratio_N.new_zeros(tokens.num_examples).index_add(0, example_N, ratio_N)
    is_forget_B = torch.zeros_like(ratio_B, dtype=torch.bool).index_fill(0, example_N, True)
    return mean_over(-(2.0 / beta) * torch.nn.functional.logsigmoid(-beta * ratio_B), is_forget_B)
