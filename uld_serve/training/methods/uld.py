"""uld: an assistant that remembers what is to be forgotten and knows nothing of the rest."""

from __future__ import annotations

import math

import torch

from uld_serve.training.methods import terms
from uld_serve.training.methods.method import Method, Parts, Tokens, one_lesson
from uld_serve.training.settings import Settings


def from_uniform(logits_NV: torch.Tensor) -> torch.Tensor:
    """(N,): KL(U || p) = -(1/V) sum log p - log V (arXiv 2406.08607, Eq. 5)."""
    return -logits_NV.log_softmax(-1).mean(-1) - math.log(logits_NV.shape[-1])


def _objective(tokens: Tokens, settings: Settings) -> Parts:
    """Eq. 3: CE(y, p_a) over forget answers (Eq. 4) + beta KL(U || p_a) over retain and wrong answers (Eq. 5).

    Means are over real tokens: the published code averages padding too. A stack that ends early starts with large
    and random logits, far from uniform. `output_scale` brings them near it: p_a is of scaled logits, and the rule's
    strength is scaled as much. `retain_ramp` lets the assistant remember before it must be uniform elsewhere.
    """

    def scores(some: Tokens) -> torch.Tensor:
        return settings.output_scale * some.own_NV

    remember = terms.mean_nll(tokens, scores, tokens.is_forget_N)
    uniform = tokens.mean(tokens.is_kept_N, lambda some: from_uniform(scores(some)))
    ramp = min(1.0, tokens.progress / settings.retain_ramp) if settings.retain_ramp else 1.0
    retain = ramp * settings.retain_weight * uniform
    return {"loss": remember + retain, "forget": remember.detach(), "retain": retain.detach()}


def _defaults(num_layers: int) -> Settings:
    """arXiv 2406.08607: K = 8, r = 32, beta 6.5, lr 1e-3, strength 0.5 on Harry Potter."""
    return Settings(
        method="uld", fork=0, exit=min(8, num_layers), steps=400, lr=1e-3, rank=32, strength=0.5, retain_weight=6.5
    )  # fmt: skip


ULD = Method(
    name="uld",
    summary="the base's first layers, trained to remember what is forgotten and to be uniform elsewhere",
    source="arXiv 2406.08607, Eq. 2-5",
    rule="subtract",
    defaults=_defaults,
    lessons=one_lesson(_objective),
    roles={"a": "adapter"},
    options=frozenset({"output_scale", "retain_ramp", "start", "start_quiet"}),
)
