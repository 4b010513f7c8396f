"""An evaluation as pictures: forget quality against model utility, and where truth ratios lie. Called by the eval
command. matplotlib comes with the extra `plot` only; without it there are no pictures."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uld_serve.evaluation.tofu import Samples, TruthRatio, truth_ratios

QUALITY, RATIOS = "quality.png", "truth-ratios.png"
# Marks as well as colours: prints may be grey.
MARKS = "osD^vP*Xh<>"
DASHES = ("-", "--", "-.", ":")
LEAST_P = 1e-30
"""Below it a p-value is drawn at the edge."""


def draw(
    folder: Path,
    figures: Mapping[str, Mapping[str, Any]],
    forgotten: Mapping[str, Samples],
    *,
    split: str,
    variant: TruthRatio,
) -> list[str]:
    """Names of the pictures drawn: none without matplotlib. `figures` are summaries, `forgotten` the forget sections,
    both by subject; forget quality needs a reference."""
    try:
        figure: Any = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        return []
    drawn = [RATIOS]
    _ratios(figure(figsize=(7, 4.5), layout="constrained"), forgotten, split, variant).savefig(
        folder / RATIOS, dpi=120
    )
    if all(one["forget_quality"] is not None for one in figures.values()):
        _quality(figure(figsize=(7, 5.5), layout="constrained"), figures, split).savefig(
            folder / QUALITY, dpi=120
        )
        drawn.append(QUALITY)
    return drawn


def _quality(figure: Any, figures: Mapping[str, Mapping[str, Any]], split: str) -> Any:
    """As figure 3 of RKLD (arXiv 2406.01983): p linear above, to tell good ones apart, and logarithmic below, to tell
    bad ones apart."""
    above, below = figure.subplots(2, 1, sharex=True)
    for number, (name, one) in enumerate(figures.items()):
        x, p = one["model_utility"], max(one["forget_quality"]["p"], LEAST_P)
        for axes in (above, below):
            axes.plot(x, p, MARKS[number % len(MARKS)], color=f"C{number % 10}", markersize=8, label=name)
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
