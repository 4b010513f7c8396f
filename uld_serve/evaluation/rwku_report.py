"""RWKU's figures, of one person and over all. Called by rwku_command. Knows no model and no file.

Every person counts alike, as where each is forgotten by a model of their own (arXiv 2406.10890, section 4)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import fsum

from uld_serve.evaluation.groups import Figures
from uld_serve.evaluation.membership import area_under_curve
from uld_serve.evaluation.rwku_data import PROBES, TEXTS
from uld_serve.evaluation.rwku_run import Known

ATTACK_SECTION = "forget_level3"


def figures_of(known: Sequence[Known]) -> dict[str, object]:
    """All figures of one subject. What was not asked is None."""
    people = {one.person.name: _of_person(one) for one in known}
    return {
        **_mean_tree(list(people.values())),
        "attacks": _by_attack(known),
        "n": {
            "people": len(known),
            **{name: sum(len(one.person.probes.get(name, ())) for one in known) for name in PROBES},
            **{name: sum(len(one.person.texts.get(name, ())) for one in known) for name in TEXTS},
        },
        "people": people,
    }


def _of_person(known: Known) -> dict[str, object]:
    recalls = {name: section.recalls for name, section in known.answered.items()}
    sides: dict[str, dict[str, float | None]] = {}
    for side in ("forget", "neighbor"):
        of_side = {
            name.removeprefix(f"{side}_"): recalls.get(name, []) for name in PROBES if name.startswith(side)
        }
        sides[side] = {name: _mean(values) for name, values in of_side.items()}
        sides[side]["all"] = _mean([value for values in of_side.values() for value in values])
    return {**sides, "mia": _membership(known)}


def _membership(known: Known) -> dict[str, dict[str, float | None]]:
    """Scores with their sign turned, so that they are as RWKU has them: larger where a text is *less* known. `auc` is
    the chance that one of the forget texts looks more familiar than one of the others: it falls with forgetting."""
    scores = {
        name: asdict(known.attacked[name])
        if name in known.attacked
        else {"loss": [], "zlib": [], "min_k": []}
        for name in TEXTS
    }
    forget, retain = (scores[name] for name in TEXTS)
    return {
        "forget": {attack: _mean([-value for value in values]) for attack, values in forget.items()},
        "retain": {attack: _mean([-value for value in values]) for attack, values in retain.items()},
        "auc": {
            attack: area_under_curve(forget[attack], retain[attack])
            if forget[attack] and retain[attack]
            else None
            for attack in forget
        },
    }


def _by_attack(known: Sequence[Known]) -> dict[str, dict[str, float | int | None]]:
    """Recall over all questions of an attack, whoever they are about."""
    found: dict[str, list[float]] = defaultdict(list)
    for one in known:
        answered = one.answered.get(ATTACK_SECTION)
        for probe, recall in zip(
            one.person.probes.get(ATTACK_SECTION, ()), answered.recalls if answered else (), strict=True
        ):
            found[probe.kind].append(recall)
    return {kind: {"recall": _mean(found[kind]), "n": len(found[kind])} for kind in sorted(found)}


def _mean_tree(trees: Sequence[Figures]) -> dict[str, object]:
    """Of trees of one form, number by number, over those that have one."""
    return {
        name: _mean_tree([_tree(tree[name]) for tree in trees])
        if isinstance(first, Mapping)
        else _mean(tree[name] for tree in trees)
        for name, first in trees[0].items()
    }


def _tree(value: object) -> Figures:
    assert isinstance(value, Mapping)
    return value


def _mean(values: Iterable[object]) -> float | None:
    numbers = [value for value in values if isinstance(value, (int, float))]
    return fsum(numbers) / len(numbers) if numbers else None
