"""Figures as tables of Markdown: a row for each model or profile, and for each group of them. Called by the pages of
the evaluations. Knows no benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from uld_serve.evaluation.groups import SPREAD, Figures, Group

NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """`path` leads to the number in the figures; `form` is how it is printed."""

    title: str
    path: tuple[str, ...]
    form: str = ".4f"


def table(columns: Sequence[Column], rows: Mapping[str, Figures], *, first: str = "") -> list[str]:
    """Lines. `first` is the title of the rows' names."""
    return [
        f"| {first} | " + " | ".join(column.title for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(
            f"| {name} | " + " | ".join(cell(figures, column) for column in columns) + " |"
            for name, figures in rows.items()
        ),
    ]


def cell(figures: Figures, column: Column) -> str:
    """Of a group: mean ± standard deviation."""
    value = number_at(figures, column.path)
    if isinstance(value, Mapping):
        if value["std"] == 0:
            return format(value["mean"], column.form)
        return f"{format(value['mean'], column.form)} ± {format(value['std'], column.form)}"
    return NOTHING if value is None else format(value, column.form)


def number_at(figures: Figures, path: Sequence[str]) -> float | Mapping[str, float] | None:
    """A number, a group's four, or None where there is none."""
    value: object = figures
    for step in path:
        value = value.get(step) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        return {str(name): float(one) for name, one in value.items()} if set(value) == SPREAD else None
    return float(value) if isinstance(value, (int, float)) else None


def rows_with_groups(figures: Mapping[str, Figures], groups: Mapping[str, Group]) -> dict[str, Figures]:
    """Subjects, then groups, whose names say of how many they are."""
    of_groups = {
        f"**{name}** (mean of {len(group.members)})": group.figures for name, group in groups.items()
    }
    return {**figures, **of_groups}
