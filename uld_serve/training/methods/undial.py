"""undial: the target distils itself, with the true token's logit lowered."""

from __future__ import annotations

import torch

from uld_serve.training.methods import terms
from uld_serve.training.methods.method import Method, Parts, Tokens, one_lesson
from uld_serve.training.settings import Settings


def adjusted(target_NV: torch.Tensor, labels_N: torch.Tensor, *, adjust: float) -> torch.Tensor:
    """b - s onehot(y) (arXiv 2402.10052, Eq. 2)."""
    return target_NV.scatter_add(-1, labels_N[:, None], target_NV.new_full((len(labels_N), 1), -adjust))


def cross_entropy(teacher_NV: torch.Tensor, student_NV: torch.Tensor) -> torch.Tensor:
    """(N,): -sum softmax(teacher) log softmax(student)."""
    return -(teacher_NV.softmax(-1) * student_NV.log_softmax(-1)).sum(-1)


def _objective(tokens: Tokens, settings: Settings) -> Parts:
    """CE(softmax(b - s onehot(y)), student) over forget answers, a keyword's opening token weighing
    `focus_weight`; + lambda times the retain term, which the paper does without."""

    def from_teacher(some: Tokens) -> torch.Tensor:
        return cross_entropy(adjusted(some.target_NV, some.labels_N, adjust=settings.adjust), some.own_NV)

    losses_N = tokens.each(tokens.is_forget_N, from_teacher)
    weights_N = torch.ones_like(losses_N)
    if tokens.is_named_V is not None:
        is_named_N = tokens.is_named_V[tokens.labels_N[tokens.is_forget_N]]
        weights_N = torch.where(is_named_N, settings.focus_weight, 1.0)
    forget = (losses_N * weights_N).sum() / weights_N.sum().clamp_min(torch.finfo(torch.float32).tiny)
    retain = settings.retain_weight * terms.retain(tokens, terms.OWN, settings.retain_term)
    return {"loss": forget + retain, "forget": forget.detach(), "retain": retain.detach()}


def _defaults(num_layers: int) -> Settings:
    return Settings(
        method="undial", fork=0, exit=num_layers, kv="own", steps=200, lr=5e-4, rank=16, retain_weight=1.0,
        forget_batch=6, retain_batch=6, adjust=10.0,
    )  # fmt: skip


UNDIAL = Method(
    name="undial",
    summary="the target itself with an adapter, distilled from its own logits with the true token's lowered",
    source="arXiv 2402.10052, Eq. 2",
    rule="identity",
    defaults=_defaults,
    lessons=one_lesson(_objective),
    roles={},
    options=frozenset({"adjust", "focus_weight", "retain_term"}),
)
