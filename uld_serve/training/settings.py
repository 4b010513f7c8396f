"""What a training run is told, with defaults by method. "Auto" values are resolved once, against a base.
Made by command; read by run, assistant and trainer. Knows no tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from uld_serve.errors import DataError

Method = Literal["margin", "uld", "rkld"]
METHODS: tuple[Method, ...] = get_args(Method)
LATE_LAYERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run. `strength` is what the profile's rule gets; goals and slack are differences of logits (margin);
    `retain_weight` is beta for uld. Batch sizes are examples a step."""

    method: Method
    fork: int
    exit: int
    steps: int
    lr: float
    rank: int
    strength: float
    retain_weight: float
    seed: int = 0
    warmup_steps: int = 10
    grad_accum: int = 1
    forget_batch: int = 8
    retain_batch: int = 12
    detour_batch: int = 0
    detours: int = 0
    max_answer_tokens: int = 64
    goal: float = 15.0
    common_goal: float = 5.0
    common_share: float = 0.05
    slack: float = 1.0
    detour_weight: float = 0.5
    num_top: int = 64
    save_steps: int = 40

    def __post_init__(self) -> None:
        positive = ("steps", "lr", "rank", "strength", "grad_accum", "forget_batch", "retain_batch")
        for name in (*positive, "max_answer_tokens", "save_steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise DataError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        for name in ("retain_weight", "goal", "common_goal", "slack", "detour_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DataError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.fork < self.exit:
            raise DataError(
                f"the assistant must enter before it leaves: --fork {self.fork} --exit {self.exit}"
            )

    @property
    def batch_size(self) -> int:
        return self.forget_batch + self.retain_batch + self.detour_batch


def defaults(method: Method, *, num_layers: int) -> Settings:
    """A run that worked on SmolLM2-135M with some hundred prompts of each kind."""
    late = max(0, num_layers - LATE_LAYERS)
    if method == "uld":
        # arXiv 2406.08607: K = 8, r = 32, beta 6.5, lr 1e-3, strength 0.5 on Harry Potter.
        return Settings(
            method=method, fork=0, exit=min(8, num_layers), steps=400, lr=1e-3, rank=32, strength=0.5,
            retain_weight=6.5,
        )  # fmt: skip
    if method == "rkld":
        return Settings(
            method=method, fork=late, exit=num_layers, steps=160, lr=1e-3, rank=16, strength=4.0,
            retain_weight=2.0,
        )  # fmt: skip
    return Settings(
        method=method, fork=late, exit=num_layers, steps=300, lr=1e-3, rank=16, strength=1.5, retain_weight=1.0
    )  # fmt: skip
