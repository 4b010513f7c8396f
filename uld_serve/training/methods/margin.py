"""margin: train the difference d = a - b itself. Ours; the default method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from uld_serve.training.examples import Kind
from uld_serve.training.methods.method import Method, Parts, Tokens, mean_over, one_lesson
from uld_serve.training.settings import LATE_LAYERS, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginWeights:
    """`slack` is m. The others weigh against a label of weight 1 if it is forgotten, `kept_label` if not."""

    slack: float = 1.0
    kept_label: float = 2.0
    others_of_kept: float = 1.0
    others_of_forgotten: float = 1.0


def margin(
    difference_NC: torch.Tensor,
    *,
    goal_NC: torch.Tensor,
    counts_NC: torch.Tensor,
    chosen_N: torch.Tensor,
    weights: MarginWeights,
) -> torch.Tensor:
    """Column 0 is the label y, the others are the target's top tokens.

        y with a goal s       smooth_l1(d, s)
        others with a goal    smooth_l1(relu(s - d), 0)    at least s
        goal 0                smooth_l1(relu(d + m), 0)    at most -m: relu(d) is 0, with room to spare

    It is UNDIAL's adjusted logit b - s onehot(y) (arXiv 2402.10052, Eq. 2) placed in an assistant under the
    rule b - alpha relu(a - b - z). Bounded, and with a gradient at a = b, where relu(a - b) itself has none. The dead
    zone z is left to the rule: an assistant taught to stay below z - m only kept less than one taught to stay below -m.
    `counts_NC` is False for a column that is the label once more. The mean is over `chosen_N`, one kind of
    example; the caller weighs the kinds.
    """
    has_goal_NC = goal_NC > 0
    closed_NC = _huber(torch.relu(difference_NC + weights.slack))
    raised_NC = _huber(torch.relu(goal_NC - difference_NC))
    # From both sides for the label: without a ceiling its difference grows for ever.
    label_N = torch.where(
        has_goal_NC[:, 0], _huber(difference_NC[:, 0] - goal_NC[:, 0]), weights.kept_label * closed_NC[:, 0]
    )
    top_NC = torch.where(has_goal_NC, raised_NC, closed_NC)[:, 1:]
    counts = counts_NC[:, 1:].float()
    top_N = (top_NC * counts).sum(-1) / counts.sum(-1).clamp_min(1)
    weight_N = torch.where(has_goal_NC[:, 0], weights.others_of_forgotten, weights.others_of_kept)
    return mean_over(label_N + weight_N * top_N, chosen_N)


def _objective(tokens: Tokens, settings: Settings) -> Parts:
    columns_NC = tokens.columns_NC
    # Only the columns that are compared: 65 rows of the head a token, not all 49,152.
    logits_NC = torch.einsum("nd,ncd->nc", tokens.hidden_ND, tokens.head_weight_WD[columns_NC]).float()
    goal_NC = torch.zeros_like(logits_NC)
    if tokens.is_named_V is not None:
        is_named_NC = tokens.is_named_V[columns_NC] & ~tokens.of(Kind.RETAIN)[:, None]
        goal_NC[is_named_NC] = settings.goal
    goal_NC[:, 0] = tokens.goals_N
    weights = MarginWeights(
        slack=settings.slack,
        others_of_kept=settings.others_of_kept,
        others_of_forgotten=settings.others_of_forgotten,
    )
    terms = {
        kind: margin(
            logits_NC - tokens.target_logits_NC,
            goal_NC=goal_NC,
            counts_NC=columns_NC != columns_NC[:, :1],
            chosen_N=tokens.of(kind),
            weights=weights,
        )
        for kind in Kind
    }
    loss = (
        terms[Kind.FORGET]
        + settings.detour_weight * terms[Kind.DETOUR]
        + settings.retain_weight * terms[Kind.RETAIN]
    )
    return {"loss": loss, **{kind.name.lower(): term.detach() for kind, term in terms.items()}}


def _huber(difference: torch.Tensor) -> torch.Tensor:
    """smooth_l1(x, 0): x^2/2 within 1, |x| - 1/2 beyond."""
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none")


def _defaults(num_layers: int) -> Settings:
    """What worked on SmolLM2-135M with some hundred prompts of each kind."""
    return Settings(
        method="margin", fork=max(0, num_layers - LATE_LAYERS), exit=num_layers, steps=300, lr=1e-3, rank=16,
        strength=2.0, dead_zone=2.0, retain_weight=1.0,
    )  # fmt: skip


MARGIN = Method(
    name="margin",
    summary="an assistant whose logits differ from the target's by a margin on what is forgotten, by none elsewhere",
    source="ours; adjusted logits of arXiv 2402.10052, Eq. 2, under the rule of arXiv 2406.01983, Eq. 1",
    rule="relu_difference",
    defaults=_defaults,
    lessons=one_lesson(_objective),
    roles={"a": "adapter"},
    options=frozenset(
        {
            "dead_zone",
            "goal",
            "common_goal",
            "common_share",
            "slack",
            "others_of_forgotten",
            "others_of_kept",
            "num_top",
        }
        | {"detours", "detour_weight"}
    ),
)
