"""What the evaluations' pictures share: matplotlib where it is installed, marks, bars, and files replaced whole. Called
by the benchmarks' pictures. matplotlib comes with the extra `plot` only; without it there are no pictures."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uld_serve.evaluation.groups import Figures
from uld_serve.evaluation.kept import scratch_of
from uld_serve.evaluation.table import number_at

# Marks and hatches as well as colours: prints may be grey.
MARKS = "osD^vP*Xh<>"
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "\\\\", "xx", "++")


def new_figure(width: float, height: float) -> Any:
    """In inches; None without matplotlib."""
    try:
        figure: Any = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        return None
    return figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> str:
    """As PNG. Its name."""
    scratch = scratch_of(path)
    figure.savefig(scratch, dpi=120, format="png")
    scratch.replace(path)
    return path.name


@dataclass(frozen=True, slots=True)
class Range:
    """A bar's height, and from where to where a group's members reach."""

    value: float
    low: float
    high: float


def range_at(figures: Figures, path: Sequence[str]) -> Range | None:
    """None where there is no such figure."""
    found = number_at(figures, path)
    if isinstance(found, Mapping):
        return Range(found["mean"], found["min"], found["max"])
    return None if found is None else Range(found, found, found)


def bars(axes: Any, kinds: Mapping[str, Sequence[str]], rows: Mapping[str, Figures]) -> None:
    """A bunch of bars for each kind (its label, and the path to its figure), in it one bar for each row. Whiskers go
    to the least and the greatest of a group."""
    width = 0.8 / len(rows)
    for number, (name, figures) in enumerate(rows.items()):
        places, heights, below, above = [], [], [], []
        for place, path in enumerate(kinds.values()):
            found = range_at(figures, path)
            if found is not None:
                places.append(place + width * (number - (len(rows) - 1) / 2))
                heights.append(found.value)
                below.append(found.value - found.low)
                above.append(found.high - found.value)
        axes.bar(
            places,
            heights,
            width,
            label=name.replace("**", ""),
            color=f"C{number % 10}",
            edgecolor="white",
            hatch=HATCHES[number % len(HATCHES)],
            yerr=[below, above] if any(below) or any(above) else None,
            capsize=3,
        )
    axes.set_xticks(range(len(kinds)), list(kinds))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
