"""offset: an assistant trained through the sum, against the same layers untrained."""

from __future__ import annotations

import torch

from uld_serve.training.methods import terms
from uld_serve.training.methods.method import Lesson, Method, Parts, Tokens, place_of
from uld_serve.training.settings import LATE_LAYERS, Settings


def fused(
    target_NV: torch.Tensor, tuned_NV: torch.Tensor, reference_NV: torch.Tensor, *, strength: float
) -> torch.Tensor:
    """b + alpha (log q - log p) (arXiv 2404.11045)."""
    return target_NV + strength * (tuned_NV.log_softmax(-1) - reference_NV.log_softmax(-1))


def _objective(tokens: Tokens, settings: Settings) -> Parts:
    """NPO over forget answers and the retain term over the rest, both of the fused scores.

    The reference is what the assistant was before its first step: over the last layers, the target itself.
    """

    def scores(some: Tokens) -> torch.Tensor:
        reference_NV = some.target_NV if some.teacher_ND is None else some.teacher_NV
        return fused(some.target_NV, some.own_NV, reference_NV, strength=settings.strength)

    forget = terms.npo(tokens, scores, beta=settings.npo_beta)
    retain = settings.retain_weight * terms.retain(tokens, scores, settings.retain_term)
    return {"loss": forget + retain, "forget": forget.detach(), "retain": retain.detach()}


def _lessons(settings: Settings) -> tuple[Lesson, ...]:
    place = place_of(settings)
    untrained = Lesson(adapter="reference", place=place, objective=_objective, steps=0)
    tuned = Lesson(adapter="tuned", place=place, objective=_objective, teacher="reference")
    return untrained, tuned


def _defaults(num_layers: int) -> Settings:
    return Settings(
        method="offset", fork=max(0, num_layers - LATE_LAYERS), exit=num_layers, steps=160, lr=1e-3, rank=16,
        strength=1.0, retain_weight=2.0,
    )  # fmt: skip


OFFSET = Method(
    name="offset",
    summary="an assistant trained so that b + strength (log q - log p) forgets; p is the same layers untrained",
    source="arXiv 2404.11045; loss of arXiv 2404.05868, Eq. 3",
    rule="pair_linear",
    defaults=_defaults,
    lessons=_lessons,
    roles={"q": "tuned", "p": "reference"},
    options=frozenset({"npo_beta", "retain_term"}),
)
