"""divergence: two small adapters, one tuned on what stays and one on what goes; their difference steers the target."""

from __future__ import annotations

from collections.abc import Callable

import torch

from uld_serve.training.examples import Kind
from uld_serve.training.methods import terms
from uld_serve.training.methods.method import Lesson, Method, Parts, Tokens, place_of
from uld_serve.training.settings import LATE_LAYERS, Settings


def _tuned_on(is_forgetting: bool) -> Callable[[Tokens, Settings], Parts]:
    def objective(tokens: Tokens, _: Settings) -> Parts:
        """CE(y, p) over one side's answers (arXiv 2605.31293)."""
        chosen_N = tokens.is_forget_N if is_forgetting else tokens.is_kept_N
        loss = terms.mean_nll(tokens, terms.OWN, chosen_N)
        zero = torch.zeros_like(loss)
        forget, retain = (loss, zero) if is_forgetting else (zero, loss)
        return {"loss": loss, "forget": forget.detach(), "retain": retain.detach()}

    return objective


def _lessons(settings: Settings) -> tuple[Lesson, ...]:
    place = place_of(settings)
    return (
        Lesson(adapter="forget", place=place, objective=_tuned_on(True), kinds=(Kind.FORGET,)),
        Lesson(adapter="retain", place=place, objective=_tuned_on(False), kinds=(Kind.DETOUR, Kind.RETAIN)),
    )


def _defaults(num_layers: int) -> Settings:
    return Settings(
        method="divergence", fork=max(0, num_layers - LATE_LAYERS), exit=num_layers, steps=160, lr=5e-4, rank=16,
        strength=2.0, retain_weight=1.0,
    )  # fmt: skip


DIVERGENCE = Method(
    name="divergence",
    summary="two assistants, tuned on retain (q) and forget (p) answers: b + strength (log q - log p)",
    source="arXiv 2605.31293",
    rule="pair_linear",
    defaults=_defaults,
    lessons=_lessons,
    roles={"q": "retain", "p": "forget"},
    unused=frozenset({"retain_weight"}),
)
