"""What a method is: adapters to be trained one after another, an objective for each, and the rule they are served
with. Each file beside this one makes one; knows no data and no model.

Shapes: N answer tokens of a batch without padding, B examples, V real vocabulary, C columns (the label, then the
target's top tokens), D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from uld_serve.training.examples import Kind
from uld_serve.training.methods.row_wise import row_wise
from uld_serve.training.place import Place
from uld_serve.training.settings import Settings

Parts = dict[str, torch.Tensor]
"""Scalars: "loss", and what it is made of under the names that are shown."""


@dataclass(frozen=True)
class Tokens:
    """What an objective sees: N answer tokens, with the adapter's and the frozen target's last hidden states.

    Logits are fp32 and of real tokens only. `columns_NC` and `target_logits_NC` are for objectives that need no
    whole row; `each` and `mean` are for those that do. `is_named_V` marks tokens that open a keyword. `teacher_ND` is
    there where the lesson has a teacher.
    """

    labels_N: torch.Tensor
    kind_N: torch.Tensor
    example_N: torch.Tensor
    num_examples: int
    goals_N: torch.Tensor
    columns_NC: torch.Tensor
    target_logits_NC: torch.Tensor
    hidden_ND: torch.Tensor
    final_ND: torch.Tensor
    teacher_ND: torch.Tensor | None
    head: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)
    head_weight_WD: torch.Tensor = field(repr=False)
    is_named_V: torch.Tensor | None = None
    progress: float = 1.0
    """Share of the run that is over."""

    @cached_property
    def own_NV(self) -> torch.Tensor:
        """Logits of what is trained."""
        return self.head(self.hidden_ND)

    @cached_property
    def target_NV(self) -> torch.Tensor:
        """Logits of the frozen target."""
        with torch.no_grad():
            return self.head(self.final_ND)

    @cached_property
    def teacher_NV(self) -> torch.Tensor:
        """Logits of the adapter that teaches."""
        assert self.teacher_ND is not None, "this lesson has no teacher"
        with torch.no_grad():
            return self.head(self.teacher_ND)

    def each(self, chosen_N: torch.Tensor, value: Callable[[Tokens], torch.Tensor]) -> torch.Tensor:
        """fp32 values of the chosen tokens, in order. `value` is given a few of them at a time, so that whole rows of
        logits are made of those that have a loss only, and never all at once."""
        numbers = chosen_N.nonzero()[:, 0]
        return row_wise(
            self.hidden_ND[numbers],
            lambda hidden_ND, part: value(self._some(numbers[part], hidden_ND)),
            row_width=self.head_weight_WD.shape[0],
        )

    def mean(self, chosen_N: torch.Tensor, value: Callable[[Tokens], torch.Tensor]) -> torch.Tensor:
        """Of `each`; 0, with a gradient of 0, where nothing is chosen."""
        values = self.each(chosen_N, value)
        return values.sum() / max(1, len(values))

    def _some(self, numbers: torch.Tensor, hidden_ND: torch.Tensor) -> Tokens:
        return replace(
            self,
            labels_N=self.labels_N[numbers],
            kind_N=self.kind_N[numbers],
            example_N=self.example_N[numbers],
            goals_N=self.goals_N[numbers],
            columns_NC=self.columns_NC[numbers],
            target_logits_NC=self.target_logits_NC[numbers],
            hidden_ND=hidden_ND,
            final_ND=self.final_ND[numbers],
            teacher_ND=None if self.teacher_ND is None else self.teacher_ND[numbers],
        )

    def of(self, kind: Kind) -> torch.Tensor:
        """(N,) bool."""
        return self.kind_N == int(kind)

    @property
    def is_forget_N(self) -> torch.Tensor:
        return self.of(Kind.FORGET)

    @property
    def is_kept_N(self) -> torch.Tensor:
        """Retain examples, and other answers to forget prompts."""
        return ~self.is_forget_N


RULE_SETTINGS = frozenset({"strength", "filter", "tau", "min_keep"})

Objective = Callable[[Tokens, Settings], Parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """The training of one adapter. `kinds` are the examples that it learns from."""

    adapter: str
    place: Place
    objective: Objective
    kinds: tuple[Kind, ...] = (Kind.FORGET, Kind.DETOUR, Kind.RETAIN)
    teacher: str | None = None
    """An adapter of an earlier lesson whose logits the objective reads."""
    is_served: bool = True
    """Whether the profile carries it; a teacher alone is thrown away."""
    steps: int | None = None
    """None: the run's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """`rule` is a rule's kind; `roles` says which adapter is which stream of it, and is empty for a method that puts
    its one adapter into the target itself.

    `options` are the settings that belong to this method and not to all.
    """

    name: str
    summary: str
    source: str
    rule: str
    defaults: Callable[[int], Settings]
    """By number of layers of the base."""
    lessons: Callable[[Settings], tuple[Lesson, ...]]
    roles: Mapping[str, str]
    options: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    """Settings of all methods that nothing here reads."""

    @property
    def without(self) -> frozenset[str]:
        """Settings of all methods that would change nothing."""
        return self.unused | (RULE_SETTINGS if self.rule == "identity" else frozenset())

    @property
    def changes_target(self) -> bool:
        return not self.roles


def one_lesson(objective: Objective) -> Callable[[Settings], tuple[Lesson, ...]]:
    """A single adapter, placed as the settings say."""

    def lessons(settings: Settings) -> tuple[Lesson, ...]:
        return (Lesson(adapter="adapter", place=place_of(settings), objective=objective),)

    return lessons


def place_of(settings: Settings) -> Place:
    return Place(settings.fork, settings.exit, settings.kv, settings.modules)


def mean_over(values_N: torch.Tensor, chosen_N: torch.Tensor) -> torch.Tensor:
    """Mean over the chosen tokens; 0, with a gradient of 0, where there are none."""
    weights_N = chosen_N.to(values_N.dtype)
    return (values_N * weights_N).sum() / weights_N.sum().clamp_min(1)
