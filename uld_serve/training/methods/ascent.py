"""ga and npo: the baselines, an adapter of the target itself that makes forget answers less likely."""

from __future__ import annotations

from uld_serve.training.methods import terms
from uld_serve.training.methods.method import Method, Parts, Tokens, one_lesson
from uld_serve.training.settings import Settings


def _ascend(tokens: Tokens, settings: Settings) -> Parts:
    """-CE(y, p) over forget answers (gradient ascent, arXiv 2210.01504) + lambda times the retain term. It has no lower
    bound: more steps only do more damage."""
    forget = -terms.mean_nll(tokens, terms.OWN, tokens.is_forget_N)
    retain = settings.retain_weight * terms.retain(tokens, terms.OWN, settings.retain_term)
    return {"loss": forget + retain, "forget": forget.detach(), "retain": retain.detach()}


def _prefer_not(tokens: Tokens, settings: Settings) -> Parts:
    forget = terms.npo(tokens, terms.OWN, beta=settings.npo_beta)
    retain = settings.retain_weight * terms.retain(tokens, terms.OWN, settings.retain_term)
    return {"loss": forget + retain, "forget": forget.detach(), "retain": retain.detach()}


def _defaults_ga(num_layers: int) -> Settings:
    return Settings(
        method="ga", fork=0, exit=num_layers, kv="own", steps=60, lr=1e-4, rank=16, retain_weight=1.0,
        forget_batch=6, retain_batch=6,
    )  # fmt: skip


def _defaults_npo(num_layers: int) -> Settings:
    return Settings(
        method="npo", fork=0, exit=num_layers, kv="own", steps=160, lr=2e-4, rank=16, retain_weight=1.0,
        forget_batch=6, retain_batch=6,
    )  # fmt: skip


GA = Method(
    name="ga",
    summary="baseline: gradient ascent on forget answers in an adapter of the target",
    source="arXiv 2210.01504; with a retain term arXiv 2401.06121",
    rule="identity",
    defaults=_defaults_ga,
    lessons=one_lesson(_ascend),
    roles={},
    options=frozenset({"retain_term"}),
)
NPO = Method(
    name="npo",
    summary="baseline: negative preference optimisation in an adapter of the target",
    source="arXiv 2404.05868, Eq. 3",
    rule="identity",
    defaults=_defaults_npo,
    lessons=one_lesson(_prefer_not),
    roles={},
    options=frozenset({"npo_beta", "retain_term"}),
)
