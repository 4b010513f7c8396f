"""rkld: an assistant strengthened on what is to be forgotten, used at decode time; and its teacher's formula."""

from __future__ import annotations

import torch
from uld_kernels import reference

from uld_serve.training.methods import terms
from uld_serve.training.methods.method import Method, Parts, Tokens, one_lesson
from uld_serve.training.settings import LATE_LAYERS, Settings


def strengthen(tokens: Tokens, settings: Settings) -> Parts:
    """CE(y, p_a) over forget answers (arXiv 2406.01983, section 3.1) + weight KL(p_b || p_a) over the rest, so that
    relu(a - b) vanishes there."""
    forget = terms.mean_nll(tokens, terms.OWN, tokens.is_forget_N)
    retain = settings.retain_weight * terms.retain(tokens, terms.OWN, "kl")
    return {"loss": forget + retain, "forget": forget.detach(), "retain": retain.detach()}


def teacher(target_NV: torch.Tensor, strengthened_NV: torch.Tensor, *, strength: float) -> torch.Tensor:
    """Eq. 1: b - alpha relu(a - b)."""
    return reference.relu_difference(target_NV, strengthened_NV, strength=strength)


def _defaults(num_layers: int) -> Settings:
    return Settings(
        method="rkld", fork=max(0, num_layers - LATE_LAYERS), exit=num_layers, steps=160, lr=1e-3, rank=16,
        strength=4.0, retain_weight=2.0,
    )  # fmt: skip


RKLD = Method(
    name="rkld",
    summary="an assistant strengthened on what is forgotten; what it likes better than the target is lowered",
    source="arXiv 2406.01983, section 3.1 and Eq. 1; also arXiv 2310.02238",
    rule="relu_difference",
    defaults=_defaults,
    lessons=one_lesson(strengthen),
    roles={"a": "adapter"},
    options=frozenset({"dead_zone"}),
)
