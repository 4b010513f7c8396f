"""The options of a method's settings: one each, refused where the method has no use for it; presets. Called by
command. Knows no data and no model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from uld_serve.errors import DataError
from uld_serve.training.methods.catalog import METHODS, PRESETS
from uld_serve.training.methods.method import Method
from uld_serve.training.settings import CHOICES, Settings, option

# Each stands for a field of Settings, with its type and help; one that is not given keeps the method's default.
SETTINGS: Mapping[str, tuple[type, str]] = {
    "steps": (int, "optimiser steps"),
    "epochs": (float, "passes over the forget examples, in place of --steps"),
    "lr": (float, "highest learning rate"),
    "rank": (int, "LoRA rank"),
    "alpha": (int, "LoRA alpha; default: twice the rank"),
    "dropout": (float, "LoRA dropout"),
    "fork": (int, "layer at which the assistant enters (0 = the embedding)"),
    "exit": (int, "layer after which it leaves"),
    "kv": (
        str,
        "borrowed: the assistant attends over the target's keys and values; own: it computes its own",
    ),
    "modules": (str, "all: every linear layer but the head; qv: query and value projections"),
    "strength": (float, "strength of the profile's rule"),
    "dead_zone": (float, "margin, rkld: the rule takes a - b up to it for none"),
    "filter": (str, "the rule's filter: plausibility, official, fused or none"),
    "tau": (float, "the filter's threshold"),
    "min_keep": (int, "plausibility: how many of the target's best tokens stay at least"),
    "retain_weight": (float, "weight of the retain term (beta for uld)"),
    "retain_term": (
        str,
        "rkld-distill, undial, offset, ga, npo: kl to the target, nll of the answers, or none",
    ),
    "goal": (float, "margin: how far a - b shall rise on what is forgotten"),
    "common_goal": (float, "margin: the same for tokens that any text is made of"),
    "slack": (float, "margin: how far a - b shall stay below 0 on what is kept"),
    "others_of_forgotten": (float, "margin: weight of the other top tokens where the label is forgotten"),
    "others_of_kept": (float, "margin: the same where it is kept"),
    "num_top": (int, "margin: how many of the target's top tokens are compared"),
    "detour_weight": (float, "margin: weight of other answers to forget prompts"),
    "output_scale": (
        float,
        "uld: what the assistant's logits are multiplied by, in training and in the rule",
    ),
    "retain_ramp": (float, "uld: share of the run over which beta rises from 0"),
    "start": (
        str,
        "uld: solved: before the first step its last layer is given what is missing, by ridge regression",
    ),
    "start_quiet": (float, "uld: how strongly the solved start holds what is kept to uniform"),
    "adjust": (float, "undial: by how much the true token's logit is lowered"),
    "focus_weight": (float, "undial: what a token that opens a keyword weighs"),
    "npo_beta": (float, "npo, offset: beta"),
    "teacher_steps": (int, "rkld-distill: steps of the teacher; default: as many as the student's"),
    "teacher_strength": (float, "rkld-distill: strength of the teacher's rule"),
    "direction": (str, "rkld-distill: reverse or forward KL"),
    "forget_batch": (int, "forget examples a step"),
    "retain_batch": (int, "retain examples a step"),
    "grad_accum": (int, "batches a step"),
    "warmup_steps": (int, "steps until the learning rate is reached"),
    "max_answer_tokens": (int, "longest answer learnt from"),
    "save_steps": (int, "steps between checkpoints"),
    "patience": (
        int,
        "checkpoints without a better held-out score after which the run ends; the best is kept",
    ),
    "seed": (int, "seed of everything random"),
}


OWN_SAMPLES = 2
DETOURS = 2
"""Rounds of answers by the base itself."""


def add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--method", choices=tuple(METHODS), help="; ".join(f"{m.name}: {m.summary}" for m in METHODS.values())
    )


def add_settings(group: argparse._ArgumentGroup) -> None:
    for field, (kind, what) in SETTINGS.items():
        choices = CHOICES.get(field)
        group.add_argument(
            f"--{option(field)}", type=kind, choices=choices, metavar=None if choices else "N", help=what
        )


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the command line says of the method, checked before a model is loaded. `given` are the options, `preset` a
    name or ""."""

    method: Method
    preset: str
    given: Mapping[str, object]
    augment: frozenset[str]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Chosen:
        """Raises DataError: no method, a preset of another, an option that is for others."""
        named = [name for name in args.preset if name in PRESETS]
        if len(named) > 1:
            raise DataError(f"give one of the presets {' and '.join(named)}")
        preset = named[0] if named else ""
        method = _method(args.method, preset)
        given = {field: getattr(args, field) for field in SETTINGS if getattr(args, field) is not None}
        if "steps" in given and "epochs" in given:
            raise DataError("give --steps or --epochs, not both")
        _refuse_others(method, given)
        return cls(method, preset, given, frozenset(args.augment))

    def told(self) -> Iterator[str]:
        """The preset's numbers, each with its source."""
        if self.preset:
            for field, (value, where) in PRESETS[self.preset].values.items():
                held = "" if field not in self.given else f"; given here: {self.given[field]}"
                yield f"{self.preset}: --{option(field)} {value} ({where}{held})"

    def settings(self, num_layers: int, *, has_keywords: bool) -> Settings:
        """Defaults of the method, then the preset, then the options. Raises DataError."""
        made = self._augmented(self.method.defaults(num_layers), has_keywords=has_keywords)
        made = replace(made, notes="context" in self.augment)
        values: dict[str, object] = {}
        if self.preset:
            values = {field: value for field, (value, _) in PRESETS[self.preset].values.items()}
        if "steps" in self.given:
            values["epochs"] = None
        found = _replaced(made, values | dict(self.given))
        if (
            "retain_weight" in self.given
            and "retain_term" in self.method.options
            and found.retain_term == "none"
        ):
            raise DataError("--retain-weight weighs nothing with --retain-term none; leave it out")
        if "start_quiet" in self.given and found.start != "solved":
            raise DataError("--start-quiet is of the start that is solved for: give --start solved")
        if "focus_weight" in self.given and not has_keywords:
            raise DataError("--focus-weight needs the tokens that it weighs: give --keywords")
        return found

    def _augmented(self, settings: Settings, *, has_keywords: bool) -> Settings:
        """With the base's own words, as asked for; margin asks by itself where it knows the keywords."""
        augment = self.augment - {"context"}
        if "detours" not in self.method.options:
            return replace(settings, own_samples=OWN_SAMPLES if "self" in augment else 0)
        if "self" in augment and not has_keywords:
            raise DataError(
                "--augment self needs --keywords: without them the other answers would tell as well"
            )
        if has_keywords and (not augment or "self" in augment):
            return replace(settings, detours=DETOURS, detour_batch=4)
        if "detour_weight" in self.given and "columns" not in augment and "file" not in augment:
            raise DataError(
                "--detour-weight needs other answers to weigh: give --keywords, without --augment none"
            )
        return settings


def _replaced(settings: Settings, values: Mapping[str, object]) -> Settings:
    fields: dict[str, Any] = dict(values)  # Settings checks what they are
    return replace(settings, **fields)


def _method(name: str | None, preset: str) -> Method:
    if preset and name not in (None, PRESETS[preset].method):
        raise DataError(f"--preset {preset} is for --method {PRESETS[preset].method}")
    if name is None and not preset:
        raise DataError(f"give --method: {', '.join(METHODS)}")
    return METHODS[name or PRESETS[preset].method]


def _refuse_others(method: Method, given: Mapping[str, object]) -> None:
    owned = {field for one in METHODS.values() for field in one.options}
    for field in given:
        if field in owned - method.options:
            owners = [one.name for one in METHODS.values() if field in one.options]
            raise DataError(f"--{option(field)} is for --method {', '.join(owners)}")
        if field in method.without:
            raise DataError(f"--{option(field)} changes nothing in --method {method.name}; leave it out")
