"""TOFU's figures as pictures: forget quality against model utility, and where truth ratios lie. Called by
tofu_command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uld_serve.evaluation.groups import Figures
from uld_serve.evaluation.pictures import DASHES, MARKS, Range, new_figure, range_at, save
from uld_serve.evaluation.tofu import Samples, TruthRatio, truth_ratios

QUALITY, RATIOS = "quality.png", "truth-ratios.png"
LEAST_P = 1e-30
"""Below it a p-value is drawn at the edge."""


def draw(
    folder: Path,
    rows: Mapping[str, Figures],
    forgotten: Mapping[str, Samples],
    *,
    split: str,
    variant: TruthRatio,
) -> list[str]:
    """Names of the pictures drawn: none without matplotlib. `rows` are the figures of subjects and groups, `forgotten`
    the forget sections by subject; forget quality needs a reference."""
    figure = new_figure(7, 4.5)
    if figure is None:
        return []
    drawn = [save(_ratios(figure, forgotten, split, variant), folder / RATIOS)]
    points = {name: (_utility(one), range_at(one, ("forget_quality", "p"))) for name, one in rows.items()}
    known = {name: (x, p) for name, (x, p) in points.items() if x is not None and p is not None}
    if len(known) == len(rows):
        drawn.append(save(_quality(new_figure(7, 5.5), known, split), folder / QUALITY))
    return drawn


def _utility(one: Figures) -> Range | None:
    return range_at(one, ("model_utility",))


def _quality(figure: Any, points: Mapping[str, tuple[Range, Range]], split: str) -> Any:
    """As figure 3 of RKLD (arXiv 2406.01983): p linear above, to tell good ones apart, and logarithmic below, to tell
    bad ones apart. Lines go to the least and the greatest of a group."""
    above, below = figure.subplots(2, 1, sharex=True)
    for number, (name, (x, p)) in enumerate(points.items()):
        value = max(p.value, LEAST_P)
        reach = {
            "xerr": [[x.value - x.low], [x.high - x.value]],
            "yerr": [[value - max(p.low, LEAST_P)], [max(p.high, LEAST_P) - value]],
        }
        mark = MARKS[number % len(MARKS)]
        for axes in (above, below):
            axes.errorbar(
                x.value,
                value,
                fmt=mark,
                color=f"C{number % 10}",
                markersize=8,
                capsize=3,
                label=name.replace("**", ""),
                **(reach if x.low < x.high or p.low < p.high else {}),
            )
    above.set(ylim=(-0.03, 1.03), ylabel="forget quality, p", title=f"TOFU, {split}: forgotten and kept")
    below.set(yscale="log", ylabel="forget quality, p (log)", xlabel="model utility")
    below.axhline(0.05, color="0.6", linewidth=1)
    below.annotate(
        "p = 0.05", (0.99, 0.05), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4"
    )
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.margins(x=0.15)
    above.legend(loc="best", fontsize="small")
    return figure


def _ratios(figure: Any, forgotten: Mapping[str, Samples], split: str, variant: TruthRatio) -> Any:
    axes = figure.subplots()
    for number, (name, samples) in enumerate(forgotten.items()):
        ratios_N = np.sort(truth_ratios(samples, variant))
        shares: Sequence[float] = (np.arange(1, len(ratios_N) + 1) / len(ratios_N)).tolist()
        style = DASHES[number % len(DASHES)]
        axes.step(ratios_N, shares, style, where="post", color=f"C{number % 10}", label=name, linewidth=1.6)
    axes.set(
        xscale="log",
        ylim=(0, 1.02),
        xlabel="truth ratio: P(paraphrased answer) / P(wrong answers)",
        ylabel="share of the forget set up to it",
        title=f"TOFU, {split}: truth ratios ({variant} mean)",
    )
    axes.axvline(1.0, color="0.6", linewidth=1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
