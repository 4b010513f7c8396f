"""What a training run is told. Methods give the defaults, presets and the command change them. Read by all of
training; knows no tensor and no method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from uld_serve.errors import DataError
from uld_serve.training.place import KeysValues, Modules

RetainTerm = Literal["kl", "nll", "none"]
Direction = Literal["reverse", "forward"]
Start = Literal["none", "solved"]
Filter = Literal["plausibility", "official", "fused", "none"]
LATE_LAYERS = 8

POSITIVE = (
    "steps",
    "epochs",
    "lr",
    "rank",
    "alpha",
    "strength",
    "grad_accum",
    "forget_batch",
    "retain_batch",
    "max_answer_tokens",
    "save_steps",
    "adjust",
    "npo_beta",
    "teacher_steps",
    "teacher_strength",
    "tau",
    "min_keep",
    "focus_weight",
    "num_top",
    "output_scale",
    "start_quiet",
)
NOT_NEGATIVE = (
    "retain_weight",
    "goal",
    "common_goal",
    "slack",
    "dead_zone",
    "detour_weight",
    "warmup_steps",
    "patience",
    "others_of_forgotten",
    "others_of_kept",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run. Batch sizes are examples a step; goals, slack and `adjust` are differences of logits.

    Where a field belongs to some methods only, its comment names them; the command refuses it for others. None
    stands for what the method or the rule has by default.
    """

    method: str
    fork: int
    exit: int
    kv: KeysValues = "borrowed"
    modules: Modules = "all"
    steps: int
    epochs: float | None = None
    """Passes over the forget examples; where given it says how many steps there are."""
    lr: float
    rank: int
    alpha: int | None = None
    """LoRA's scale is alpha / rank; None: twice the rank."""
    dropout: float = 0.0
    seed: int = 0
    warmup_steps: int = 10
    grad_accum: int = 1
    forget_batch: int = 8
    retain_batch: int = 12
    detour_batch: int = 0
    """Other answers to forget prompts; 0: half as many as forget examples, if there are any."""
    own_samples: int = 0
    """Answers that the base is asked for beside its greedy one, to each forget prompt."""
    notes: bool = False
    """Whether forget questions are also asked beside their answer, which may then be used."""
    max_answer_tokens: int = 64
    save_steps: int = 40
    patience: int = 0
    """Checkpoints without a better held-out score after which a run ends; 0: never."""

    strength: float = 1.0
    """Of the profile's rule."""
    dead_zone: float = 0.0
    """margin, rkld: differences of logits that the rule takes for none."""
    filter: Filter | None = None
    tau: float | None = None
    min_keep: int | None = None

    retain_weight: float
    """Of the retain term; beta in ULD."""
    retain_term: RetainTerm = "kl"
    """rkld-distill, undial, ga, npo, offset: KL to the target, NLL of the answers, or none."""

    goal: float = 15.0
    common_goal: float = 5.0
    common_share: float = 0.05
    slack: float = 1.0
    others_of_forgotten: float = 1.0
    others_of_kept: float = 1.0
    num_top: int = 64
    detours: int = 0
    detour_weight: float = 0.5
    """margin, from `goal` on."""

    output_scale: float = 1.0
    retain_ramp: float = 0.0
    """uld: what its logits are multiplied by, and the share of the run over which beta rises from 0."""
    start: Start = "none"
    start_quiet: float = 2.0
    """uld: where it begins to learn from (training/start.py), and how much longer a kept state is made than a
    forgotten one."""

    adjust: float = 3.0
    focus_weight: float = 1.0
    """undial: by how much the true token's logit is lowered, and what a token of a keyword weighs."""

    npo_beta: float = 0.1
    """npo, offset."""

    teacher_steps: int | None = None
    teacher_strength: float = 4.0
    direction: Direction = "reverse"
    """rkld-distill: steps of its first lesson (None: as many as of its second), alpha of its teacher, which KL."""

    def __post_init__(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise DataError(f"--{option(name)} must be positive, not {value}")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise DataError(f"--{option(name)} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise DataError(f"--dropout must be 0 or more and less than 1, not {self.dropout}")
        if not 0 <= self.retain_ramp <= 1:
            raise DataError(f"--retain-ramp must be 0 to 1, not {self.retain_ramp}")
        if not 0 <= self.fork < self.exit:
            raise DataError(
                f"the assistant must enter before it leaves: --fork {self.fork} --exit {self.exit}"
            )
        if self.start == "solved" and self.modules == "qv":
            raise DataError("--start solved is written into down_proj, which --modules qv leaves out")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise DataError(f"--{option(name)} must be {', '.join(choices)}, not {value}")

    @property
    def scale_alpha(self) -> int:
        return 2 * self.rank if self.alpha is None else self.alpha

    def for_data(self, *, num_forget: int, num_detours: int, num_processes: int = 1) -> Settings:
        """With epochs turned into steps, and room in a batch for other answers if there are any."""
        detour_batch = self.detour_batch
        if num_detours and not detour_batch:
            detour_batch = max(1, self.forget_batch // 2)
        steps = self.steps
        if self.epochs is not None:
            a_step = self.forget_batch * self.grad_accum * num_processes
            steps = max(1, math.ceil(self.epochs * num_forget / a_step))
        return replace(self, steps=steps, epochs=None, detour_batch=detour_batch)


CHOICES: dict[str, tuple[str, ...]] = {
    "kv": get_args(KeysValues),
    "modules": get_args(Modules),
    "retain_term": get_args(RetainTerm),
    "direction": get_args(Direction),
    "filter": get_args(Filter),
    "start": get_args(Start),
}


def option(name: str) -> str:
    """A field's name on the command line."""
    return name.replace("_", "-")
