"""The computed figures of docs/scaling.md are what its formulas give, and the formulas what routing does."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from uld_serve.fleet.affinity import preference

PAGE = (Path(__file__).parent.parent.parent / "docs" / "scaling.md").read_text()
ROWS = [
    tuple(map(float, row))
    for row in re.findall(r"^\| (\d+) \| (0\.\d+) \| (0\.\d+) \| ([\d.]+)× \|$", PAGE, re.M)
]
USES = 20


def by_load(replicas: float, uses: float) -> float:
    return 1 - replicas * (1 - (1 - 1 / replicas) ** uses) / uses


def by_prefix(uses: float) -> float:
    return 1 - 1 / uses


def test_the_table_is_computed_from_the_formulas() -> None:
    assert len(ROWS) == 4
    for replicas, load, prefix, saved in ROWS:
        assert load == pytest.approx(by_load(replicas, USES), abs=5e-4)
        assert prefix == pytest.approx(by_prefix(USES), abs=5e-4)
        assert saved == pytest.approx((1 - by_load(replicas, USES)) / (1 - by_prefix(USES)), abs=0.05)


@pytest.mark.parametrize("replicas", [2, 8])
def test_the_formulas_are_what_placing_requests_gives(replicas: int) -> None:
    dice, idle = random.Random(0), {f"r{number}": 0 for number in range(replicas)}
    beginnings = [f"beginning {number}" for number in range(400)]
    hits = {"load": 0, "prefix": 0}
    for beginning in beginnings:
        seen: dict[str, set[str]] = {"load": set(), "prefix": set()}
        for _ in range(USES):
            chosen = {"load": dice.choice(list(idle)), "prefix": preference(beginning, idle, slack=8)[0]}
            for how, replica in chosen.items():
                hits[how] += replica in seen[how]
                seen[how].add(replica)
    total = len(beginnings) * USES
    assert hits["load"] / total == pytest.approx(by_load(replicas, USES), abs=0.01)
    assert hits["prefix"] / total == by_prefix(USES)
