"""MUSE's figures as a page of Markdown and as a picture. Called by muse_command. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from uld_serve.evaluation.groups import Figures
from uld_serve.evaluation.pictures import bars, new_figure, save
from uld_serve.evaluation.table import Column, number_at, table

PICTURE = "muse.png"
LEAK = ("privleak", "leak")
COLUMNS = (
    Column("VerbMem", ("verbmem", "f1")),
    Column("KnowMem, forget", ("knowmem", "forget", "f1")),
    Column("recall", ("knowmem", "forget", "recall")),
    Column("KnowMem, retain", ("knowmem", "retain", "f1")),
    Column("recall", ("knowmem", "retain", "recall")),
    Column("PrivLeak, %", LEAK, ".1f"),
    Column("AUC", ("privleak", "area")),
)
BARS = {
    "VerbMem\n(forget)": ("verbmem", "f1"),
    "KnowMem\n(forget)": ("knowmem", "forget", "f1"),
    "KnowMem\n(retain)": ("knowmem", "retain", "f1"),
}
MEANING = """\
VerbMem and KnowMem are ROUGE-L F1 of greedy texts (MUSE's paper gives them times 100), beside KnowMem its recall: low
is good on what is to be forgotten, high on what is kept. AUC is of Min-{share:.0%} telling texts held out from texts to
be forgotten: 0 where every forget text looks more familiar than any held out, .5 where they look alike. PrivLeak is how
far it lies from a retrained model's ({area}): 0 is best, negative where what was forgotten still shows, positive where
its absence does. Likelihoods of a profile with a fused filter are taken without that filter; texts are what is
served."""
OF_GROUPS = "A group's row has the mean over its profiles ± their standard deviation (n - 1)."


def markdown(
    rows: Mapping[str, Figures],
    counts: str,
    pictures: Sequence[str],
    *,
    share: float,
    retrained_area: float | None,
) -> str:
    """`rows` are subjects, the base first, and groups."""
    area = "not given: no PrivLeak" if retrained_area is None else f"{retrained_area:.4f}"
    lines = ["# MUSE", "", counts, "", *table(COLUMNS, rows), "", MEANING.format(share=share, area=area), ""]
    if any(name.startswith("**") for name in rows):
        lines += [OF_GROUPS, ""]
    return "\n".join([*lines, *(f"![{name.removesuffix('.png')}]({name})\n" for name in pictures)])


def draw(folder: Path, rows: Mapping[str, Figures]) -> list[str]:
    """Names of the pictures drawn: none without matplotlib."""
    figure = new_figure(9, 4.5)
    if figure is None:
        return []
    has_leak = any(number_at(one, LEAK) is not None for one in rows.values())
    left, *right = figure.subplots(1, 2, width_ratios=(3, 1)) if has_leak else (figure.subplots(),)
    bars(left, BARS, rows)
    left.set(ylim=(0, None), ylabel="ROUGE-L F1", title="MUSE: what is still said")
    left.legend(fontsize="small")
    for axes in right:
        bars(axes, {"PrivLeak": LEAK}, rows)
        axes.axhline(0, color="0.3", linewidth=1)
        axes.set(ylabel="PrivLeak, % (0 is best)", title="what its likelihoods tell")
    return [save(figure, folder / PICTURE)]
