"""The training objectives, one pure function each. Called by assistant; knows no model and no data.

Shapes: N answer tokens (padding already removed), K logits compared at each, V vocabulary. b are the frozen
target's logits, a the assistant's, y the answer's next token. A mean over no token is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Terms:
    """Already weighted; the sum is minimised."""

    forget: torch.Tensor
    retain: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.forget + self.retain


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginWeights:
    """`slack` is m. The others weigh against a label of weight 1 if it is forgotten, `kept_label` if not."""

    slack: float = 1.0
    kept_label: float = 2.0
    others_of_kept: float = 1.0
    others_of_forgotten: float = 0.3


def margin(
    difference_NK: torch.Tensor,
    *,
    goal_NK: torch.Tensor,
    counts_NK: torch.Tensor,
    chosen_N: torch.Tensor,
    weights: MarginWeights,
) -> torch.Tensor:
    """Train the difference d = a - b itself. Column 0 is the label y, the others are the target's top tokens.

        y with a goal s       smooth_l1(d, s)
        others with a goal    smooth_l1(relu(s - d), 0)    at least s
        goal 0                smooth_l1(relu(d + m), 0)    at most -m: relu(a - b) stays 0, with room to spare

    It is UNDIAL's adjusted logit b - s onehot(y) (arXiv 2402.10052, Eq. 2) placed in an assistant under the
    rule b - alpha relu(a - b). Bounded, and with a gradient at a = b, where relu(a - b) itself has none.
    `counts_NK` is False for a column that is the label once more. The mean is over `chosen_N`, one kind of
    example; the caller weighs the kinds.
    """
    has_goal_NK = goal_NK > 0
    closed_NK = _huber(torch.relu(difference_NK + weights.slack))
    raised_NK = _huber(torch.relu(goal_NK - difference_NK))
    # From both sides for the label: without a ceiling its difference grows for ever.
    label_N = torch.where(
        has_goal_NK[:, 0], _huber(difference_NK[:, 0] - goal_NK[:, 0]), weights.kept_label * closed_NK[:, 0]
    )
    top_NK = torch.where(has_goal_NK, raised_NK, closed_NK)[:, 1:]
    counts = counts_NK[:, 1:].float()
    top_N = (top_NK * counts).sum(-1) / counts.sum(-1).clamp_min(1)
    weight_N = torch.where(has_goal_NK[:, 0], weights.others_of_forgotten, weights.others_of_kept)
    return _mean(label_N + weight_N * top_N, chosen_N)


def uld(logits_NV: torch.Tensor, labels_N: torch.Tensor, *, is_forget_N: torch.Tensor, beta: float) -> Terms:
    """ULD (arXiv 2406.08607, Eq. 3-5): remember what is to be forgotten, know nothing of the rest.

    forget   CE(y, p_a)                                      Eq. 4
    retain   beta KL(U || p_a) = -(beta/V) sum log p_a - beta log V     Eq. 5
    """
    log_p_NV = logits_NV.log_softmax(-1)
    remember_N = -log_p_NV.gather(-1, labels_N[:, None])[:, 0]
    uniform_N = -log_p_NV.mean(-1) - math.log(logits_NV.shape[-1])
    return Terms(_mean(remember_N, is_forget_N), beta * _mean(uniform_N, ~is_forget_N))


def rkld(
    logits_NV: torch.Tensor,
    target_logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    is_forget_N: torch.Tensor,
    weight: float,
) -> Terms:
    """RKLD's strengthened model (arXiv 2406.01983, section 3.1) with a retain term, for decode-time use.

    forget   CE(y, p_a)
    retain   weight KL(p_b || p_a)      so that relu(a - b) vanishes there
    """
    log_p_NV = logits_NV.log_softmax(-1)
    strengthen_N = -log_p_NV.gather(-1, labels_N[:, None])[:, 0]
    log_target_NV = target_logits_NV.log_softmax(-1)
    divergence_N = (log_target_NV.exp() * (log_target_NV - log_p_NV)).sum(-1)
    return Terms(_mean(strengthen_N, is_forget_N), weight * _mean(divergence_N, ~is_forget_N))


def _huber(difference: torch.Tensor) -> torch.Tensor:
    """smooth_l1(x, 0): x^2/2 within 1, |x| - 1/2 beyond."""
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none")


def _mean(values_N: torch.Tensor, chosen_N: torch.Tensor) -> torch.Tensor:
    """Mean over the chosen tokens; 0, with a gradient of 0, where there are none."""
    chosen = chosen_N.to(values_N.dtype)
    return (values_N * chosen).sum() / chosen.sum().clamp_min(1)
