"""rkld-distill: rkld's teacher distilled into an adapter of the target itself; no stream is left at serving time."""

from __future__ import annotations

from dataclasses import replace

import torch

from uld_serve.training.examples import Kind
from uld_serve.training.methods import terms
from uld_serve.training.methods.method import Lesson, Method, Parts, Tokens, place_of
from uld_serve.training.methods.rkld import strengthen, teacher
from uld_serve.training.place import Place
from uld_serve.training.settings import LATE_LAYERS, Settings

# Of the strengthened assistant; the run's own is that of the student.
TEACHER_RETAIN_WEIGHT = 2.0


def _objective(tokens: Tokens, settings: Settings) -> Parts:
    """KL(student || teacher) summed over the vocabulary (arXiv 2406.01983, Eq. 2) over forget answers, with the teacher
    b - alpha relu(a - b) (Eq. 1), + lambda times the retain term. `forward` is the paper's ablation: KL the other way.
    """

    def from_teacher(some: Tokens) -> torch.Tensor:
        teacher_NV = teacher(some.target_NV, some.teacher_NV, strength=settings.teacher_strength)
        pair = (some.own_NV, teacher_NV) if settings.direction == "reverse" else (teacher_NV, some.own_NV)
        return terms.divergence(*pair)

    forget = tokens.mean(tokens.is_forget_N, from_teacher)
    retain = settings.retain_weight * terms.retain(tokens, terms.OWN, settings.retain_term)
    return {"loss": forget + retain, "forget": forget.detach(), "retain": retain.detach()}


def _strengthen(tokens: Tokens, settings: Settings) -> Parts:
    return strengthen(tokens, replace(settings, retain_weight=TEACHER_RETAIN_WEIGHT))


def _lessons(settings: Settings) -> tuple[Lesson, ...]:
    late = Place(max(0, settings.exit - LATE_LAYERS), settings.exit)
    return (
        Lesson(adapter="teacher", place=late, objective=_strengthen, is_served=False, steps=settings.teacher_steps),
        Lesson(
            adapter="adapter",
            place=place_of(settings),
            objective=_objective,
            kinds=(Kind.FORGET, Kind.RETAIN),
            teacher="teacher",
        ),
    )  # fmt: skip


def _defaults(num_layers: int) -> Settings:
    return Settings(
        method="rkld-distill", fork=0, exit=num_layers, kv="own", steps=160, lr=5e-4, rank=16, retain_weight=1.0,
        forget_batch=6, retain_batch=6,
    )  # fmt: skip


RKLD_DISTILL = Method(
    name="rkld-distill",
    summary="the target itself with an adapter, distilled from rkld's fused scores by reverse KL",
    source="arXiv 2406.01983, Eq. 1 and 2",
    rule="identity",
    defaults=_defaults,
    lessons=_lessons,
    roles={},
    options=frozenset({"teacher_steps", "teacher_strength", "direction", "retain_term"}),
)
