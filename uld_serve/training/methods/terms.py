"""Terms that several objectives are made of, as pure functions of logits. Called by the methods; a mean over no token
is 0. Shapes: N tokens, V vocabulary, B examples.
"""

from __future__ import annotations

import torch

from uld_serve.training.examples import Kind
from uld_serve.training.methods.method import Tokens, mean_over
from uld_serve.training.settings import RetainTerm


def nll(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """(N,): -log p(y), in nats."""
    return -logits_NV.log_softmax(-1).gather(-1, labels_N[:, None])[:, 0]


def divergence(logits_NV: torch.Tensor, other_NV: torch.Tensor) -> torch.Tensor:
    """(N,): KL(softmax(logits) || softmax(other)), summed over the vocabulary."""
    log_p_NV, log_q_NV = logits_NV.log_softmax(-1), other_NV.log_softmax(-1)
    # Where p is 0 its term is 0, whatever q is.
    gap_NV = torch.where(log_p_NV > float("-inf"), log_p_NV - log_q_NV, 0.0)
    return (log_p_NV.exp() * gap_NV).sum(-1)


def by_example(values_N: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """(B,): sums over each example's tokens."""
    return values_N.new_zeros(tokens.num_examples).index_add(0, tokens.example_N, values_N)


def retain(tokens: Tokens, logits_NV: torch.Tensor, kind: RetainTerm) -> torch.Tensor:
    """What keeps the rest as it is: KL(target || logits) over tokens that are kept, or the NLL of the answers. That of
    other answers to forget prompts is left out: they are to stay possible, not to be learnt."""
    if kind == "none":
        return logits_NV.sum() * 0.0
    if kind == "nll":
        return mean_over(nll(logits_NV, tokens.labels_N), tokens.of(Kind.RETAIN))
    return mean_over(divergence(tokens.target_NV, logits_NV), tokens.is_kept_N)


def npo(logits_NV: torch.Tensor, tokens: Tokens, *, beta: float) -> torch.Tensor:
    """Negative preference optimisation (arXiv 2404.05868, Eq. 3) against the frozen target.

        -(2 / beta) E log sigmoid(-beta log(pi(y|x) / pi_ref(y|x)))

    Over whole answers; bounded below, where gradient ascent is not. As beta goes to 0 its gradient is that of ascent.
    """
    reference_N = nll(tokens.target_NV, tokens.labels_N)
    ratio_B = by_example(reference_N - nll(logits_NV, tokens.labels_N), tokens)
    is_forget_B = by_example(tokens.is_forget_N.float(), tokens) > 0
    return mean_over(-(2.0 / beta) * torch.nn.functional.logsigmoid(-beta * ratio_B), is_forget_B)
