"""Profiles that one method gave with several seeds, taken together: mean and spread of every figure. Called by the
evaluations. Knows no benchmark: figures are trees of numbers, alike for every profile.

Answers are greedy and likelihoods drawn from nothing, so a second look at one profile gives the same figures. What
hangs on a seed is the training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from uld_serve.errors import DataError

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
SPREAD = frozenset({"mean", "std", "min", "max"})

Figures = Mapping[str, object]


def parse_groups(options: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Of NAME=PROFILE,PROFILE. Raises DataError."""
    groups: dict[str, tuple[str, ...]] = {}
    for option in options:
        name, _, rest = option.partition("=")
        members = tuple(member.strip() for member in rest.split(",") if member.strip())
        if not NAME.fullmatch(name) or len(members) < 2 or len(set(members)) < len(members):
            raise DataError(
                f"--group {option!r}: NAME=PROFILE,PROFILE with at least two different profiles; names are of "
                "lower-case letters, digits and hyphens"
            )
        if name in groups:
            raise DataError(f"--group {name} is there twice")
        groups[name] = members
    return groups


@dataclass(frozen=True, slots=True)
class Group:
    """`figures` has the members' tree, with the four numbers of `over` for each of theirs."""

    members: tuple[str, ...]
    figures: Figures

    def record(self) -> dict[str, object]:
        """For JSON."""
        return {"members": list(self.members), "figures": self.figures}


def grouped(groups: Mapping[str, Sequence[str]], figures: Mapping[str, Figures]) -> dict[str, Group]:
    """`figures` are by subject."""
    found = {}
    for name, members in groups.items():
        together = over([figures[member] for member in members])
        assert isinstance(together, Mapping)
        found[name] = Group(tuple(members), together)
    return found


def over(trees: Sequence[object]) -> object:
    """One tree where each number is {"mean", "std", "min", "max"}: `std` is the sample's (n - 1). What is no number
    stays if all agree, and None where any has none."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {name: over([_of(tree, name) for tree in trees]) for name in first}
    if any(tree is None for tree in trees):
        return None
    numbers = [float(tree) for tree in trees if isinstance(tree, (int, float)) and not isinstance(tree, bool)]
    if len(numbers) < len(trees):
        return first if all(tree == first for tree in trees) else None
    return {"mean": fmean(numbers), "std": stdev(numbers), "min": min(numbers), "max": max(numbers)}


def _of(tree: object, name: str) -> object:
    return tree.get(name) if isinstance(tree, Mapping) else None
