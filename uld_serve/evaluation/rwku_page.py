"""RWKU's figures as a page of Markdown and as pictures. Called by rwku_command. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from uld_serve.evaluation.groups import Figures
from uld_serve.evaluation.pictures import bars, new_figure, save
from uld_serve.evaluation.table import Column, table

LEVELS = {
    "forget: blank": ("forget", "level1"),
    "forget: question": ("forget", "level2"),
    "forget: attack": ("forget", "level3"),
    "neighbour: blank": ("neighbor", "level1"),
    "neighbour: question": ("neighbor", "level2"),
}
COLUMNS = (
    Column("forget: blank", ("forget", "level1")),
    Column("forget: question", ("forget", "level2")),
    Column("forget: attack", ("forget", "level3")),
    Column("forget: all", ("forget", "all")),
    Column("neighbour: blank", ("neighbor", "level1")),
    Column("neighbour: question", ("neighbor", "level2")),
    Column("neighbour: all", ("neighbor", "all")),
)
MEMBERSHIP = (
    Column("loss, forget", ("mia", "forget", "loss")),
    Column("loss, retain", ("mia", "retain", "loss")),
    Column("loss, AUC", ("mia", "auc", "loss")),
    Column("zlib, forget", ("mia", "forget", "zlib")),
    Column("zlib, retain", ("mia", "retain", "zlib")),
    Column("zlib, AUC", ("mia", "auc", "zlib")),
    Column("min-20%, forget", ("mia", "forget", "min_k")),
    Column("min-20%, retain", ("mia", "retain", "min_k")),
    Column("min-20%, AUC", ("mia", "auc", "min_k")),
)
MEANING = """\
ROUGE-L recall of greedy answers, each person counting alike: low is good on forget probes, and neighbours should stay
where the base has them. "All" is over all probes of a person."""
OF_MEMBERSHIP = """\
Mean negative log-probability of the texts in nats, by token (loss), by compressed byte (zlib), and of the least likely
fifth of the tokens: forgetting raises it on forget texts. AUC is the chance that a forget text looks more familiar than
one of the others. Likelihoods of a profile with a fused filter are taken without that filter."""
OF_GROUPS = "A group's row has the mean over its profiles ± their standard deviation (n - 1)."
MANY_PEOPLE = 12
"""Above it people are in summary.json only."""
LEVELS_PICTURE, ATTACKS_PICTURE = "rwku.png", "rwku-attacks.png"


def markdown(rows: Mapping[str, Figures], people: Mapping[str, str], pictures: Sequence[str]) -> str:
    """`rows` are subjects, the base first, and groups; `people` are names with a line of numbers of each."""
    kinds = _attacks(rows)
    lines = [
        "# RWKU",
        "",
        f"{len(people)} people: {', '.join(people)}.",
        "",
        *table(COLUMNS, rows),
        "",
        MEANING,
        OF_GROUPS if any(name.startswith("**") for name in rows) else "",
        *(f"![{name.removesuffix('.png')}]({name})\n" for name in pictures),
    ]
    if kinds:
        columns = [
            Column(f"{kind} (n {count})", ("attacks", kind, "recall")) for kind, count in kinds.items()
        ]
        lines += ["## Attacks", "", *table(columns, rows), ""]
    lines += ["## Membership", "", *table(MEMBERSHIP, rows), "", OF_MEMBERSHIP, ""]
    if 1 < len(people) <= MANY_PEOPLE:
        lines += _by_person(rows, people)
    return "\n".join(lines)


def draw(folder: Path, rows: Mapping[str, Figures]) -> list[str]:
    """Names of the pictures drawn: none without matplotlib."""
    figure = new_figure(9, 4.5)
    if figure is None:
        return []
    axes = figure.subplots()
    bars(axes, LEVELS, rows)
    axes.set(ylim=(0, None), ylabel="ROUGE-L recall", title="RWKU: what is still said, by kind of probe")
    axes.axvline(2.5, color="0.6", linewidth=1)
    axes.legend(fontsize="small")
    drawn = [save(figure, folder / LEVELS_PICTURE)]
    kinds = _attacks(rows)
    if kinds:
        figure = new_figure(9, 5)
        axes = figure.subplots()
        bars(
            axes, {f"{kind}\n(n {count})": ("attacks", kind, "recall") for kind, count in kinds.items()}, rows
        )
        axes.set(ylim=(0, None), ylabel="ROUGE-L recall", title="RWKU, level 3: what is said to each attack")
        for label in axes.get_xticklabels():
            label.set(rotation=35, ha="right", rotation_mode="anchor", fontsize="small")
        axes.legend(fontsize="small")
        drawn.append(save(figure, folder / ATTACKS_PICTURE))
    return drawn


def _attacks(rows: Mapping[str, Figures]) -> dict[str, int]:
    """How many questions of each: alike for all."""
    attacks = next(iter(rows.values()))["attacks"]
    assert isinstance(attacks, Mapping)
    return {str(kind): int(one["n"]) for kind, one in attacks.items()}


def _by_person(rows: Mapping[str, Figures], people: Mapping[str, str]) -> list[str]:
    lines = ["## By person", ""]
    for name, counts in people.items():
        columns = [Column(column.title, ("people", name, *column.path)) for column in COLUMNS]
        lines += [f"### {name}", "", counts, "", *table(columns, rows), ""]
    return lines
