"""TOFU's figures as pictures: forget quality against model utility, and where truth ratios lie. Called by
tofu_command."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import ceil, log10
from pathlib import Path
from typing import Any

import numpy as np

from uld_serve.evaluation.groups import Figures
from uld_serve.evaluation.lineup import REFERENCE
from uld_serve.evaluation.pictures import DASHES, MARKS, Range, new_figure, range_at, save
from uld_serve.evaluation.tofu import Array, Samples, TruthRatio, truth_ratios

QUALITY, RATIOS = "quality.png", "truth-ratios.png"
LEAST_P = 1e-30
"""Below it a p-value is drawn as this."""
THRESHOLD = 0.05
"""Where the axis of p changes from linear to logarithmic, and where a test at the usual level rejects."""
UPPER_TICKS = (0.05, 0.2, 0.4, 0.6, 0.8, 1.0)


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
    figure = new_figure(7, 6)
    if figure is None:
        return []
    drawn = [save(_ratios(figure, forgotten, split, variant), folder / RATIOS)]
    points = {name: (_utility(one), range_at(one, ("forget_quality", "p"))) for name, one in rows.items()}
    known = {name: (x, p) for name, (x, p) in points.items() if x is not None and p is not None}
    if len(known) == len(rows):
        drawn.append(save(_quality(new_figure(7, 5), known, split), folder / QUALITY))
    return drawn


def _utility(one: Figures) -> Range | None:
    return range_at(one, ("model_utility",))


def folded(p: Array, *, least: float) -> Array:
    """Height of a p-value on an axis that is linear from THRESHOLD (0) to 1 (1), to tell good ones apart, and
    logarithmic from there down to `least` (-1), to tell bad ones apart."""
    above_N = (p - THRESHOLD) / (1 - THRESHOLD)
    below_N = np.log(np.maximum(p, LEAST_P) / THRESHOLD) / np.log(THRESHOLD / least)
    return np.where(p >= THRESHOLD, above_N, below_N)


def unfolded(height: Array, *, least: float) -> Array:
    """The p-value at a height."""
    below_N = THRESHOLD * np.exp(np.minimum(height, 0.0) * np.log(THRESHOLD / least))
    return np.where(height >= 0, THRESHOLD + height * (1 - THRESHOLD), below_N)


def _quality(figure: Any, points: Mapping[str, tuple[Range, Range]], split: str) -> Any:
    """As figure 3 of RKLD (arXiv 2406.01983): up and to the right is better. Lines go to the least and the greatest of
    a group."""
    axes = figure.subplots()
    lowest = min(max(p.low, LEAST_P) for _, p in points.values())
    decades = max(2, ceil(-log10(lowest)))
    least = 10.0 ** -(decades + 1)
    axes.set_yscale("function", functions=(partial(folded, least=least), partial(unfolded, least=least)))
    for number, (name, (x, p)) in enumerate(points.items()):
        value = max(p.value, LEAST_P)
        reach = {
            "xerr": [[x.value - x.low], [x.high - x.value]],
            "yerr": [[value - max(p.low, LEAST_P)], [max(p.high, LEAST_P) - value]],
        }
        axes.errorbar(
            x.value,
            value,
            fmt=MARKS[number % len(MARKS)],
            color=f"C{number % 10}",
            markersize=9,
            capsize=3,
            label=name.replace("**", ""),
            **(reach if x.low < x.high or p.low < p.high else {}),
        )
    _mark_axis(axes, decades)
    axes.set(
        ylim=(least, 1.05),
        xlabel="model utility",
        ylabel="forget quality, p",
        title=f"TOFU, {split}: forgotten and kept",
    )
    axes.grid(alpha=0.3)
    axes.margins(x=0.15)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def _mark_axis(axes: Any, decades: int) -> None:
    step = max(1, decades // 6)
    powers = range(-1 - step, -decades - 1, -step)  # not so near to the threshold that two labels meet
    ticks = {**{value: f"{value:g}" for value in UPPER_TICKS}, **{10.0**n: f"$10^{{{n}}}$" for n in powers}}
    axes.set_yticks(list(ticks), labels=list(ticks.values()))
    axes.minorticks_off()
    axes.axhline(THRESHOLD, color="0.5", linewidth=1)
    axes.annotate(
        f"p = {THRESHOLD:g}: linear above, logarithmic below",
        (0.01, THRESHOLD),
        xytext=(0, -3),
        textcoords="offset points",
        xycoords=("axes fraction", "data"),
        va="top",
        color="0.35",
        fontsize="small",
    )


def _ratios(figure: Any, forgotten: Mapping[str, Samples], split: str, variant: TruthRatio) -> Any:
    """Densities above, and below them the distribution functions, between which forget quality's D is the gap."""
    density, share = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.3])
    logs = {name: np.log10(truth_ratios(samples, variant)) for name, samples in forgotten.items()}
    every_N = np.concatenate(list(logs.values()))
    grid_G = np.linspace(every_N.min() - 0.3, every_N.max() + 0.3, 400)
    for number, (name, logs_N) in enumerate(logs.items()):
        # The reference is what all others are held against: no other is black, and its line is whole.
        is_reference = name == REFERENCE
        style = "-" if is_reference else DASHES[number % len(DASHES)]
        color = "black" if is_reference else f"C{number % 10}"
        density.plot(10**grid_G, smoothed(logs_N, grid_G), style, color=color, linewidth=1.6)
        upward = (np.arange(1, len(logs_N) + 1) / len(logs_N)).tolist()
        ratios_N = 10 ** np.sort(logs_N)
        share.step(ratios_N, upward, style, where="post", color=color, label=name, linewidth=1.6)
    density.set(ylabel="density", title=f"TOFU, {split}: truth ratios ({variant} mean)")
    density.set_ylim(bottom=0)
    share.set(
        xscale="log",
        ylim=(0, 1.02),
        xlabel="truth ratio: P(paraphrased answer) / P(wrong answers)",
        ylabel="share of the forget set up to it",
    )
    for axes in (density, share):
        axes.axvline(1.0, color="0.6", linewidth=1)
        axes.grid(alpha=0.3)
    share.legend(fontsize="small")
    return figure


def smoothed(values: Array, at: Array) -> Array:
    """A density of (N,) values at (G,) places: a mean of Gaussians with Silverman's width, 0.9 min(sd, IQR / 1.34)
    N^(-1/5), and at least a hundredth, so that equal values have one too."""
    quartiles = np.percentile(values, [25, 75])
    spread = min(values.std(), (quartiles[1] - quartiles[0]) / 1.34)
    width = max(0.9 * spread * len(values) ** -0.2, 0.01)
    bells_GN = np.exp(-0.5 * ((at[:, None] - values[None, :]) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    density: Array = bells_GN.mean(axis=1)
    return density
