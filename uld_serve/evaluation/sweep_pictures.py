"""A sweep as a picture: strength against what is forgotten and what is lost, and one against the other. Called by tune
and `eval sweep`. matplotlib comes with the extra `plot` only; without it there is no picture."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uld_serve.evaluation.settings import told
from uld_serve.evaluation.sweep import Point

PICTURE = "sweep.png"
# Marks as well as colours: prints may be grey.
MARKS = "osD^vPX"
LINEAR_NATS = 0.1
"""The axis of strength against loss is linear up to here, where constraints lie, and logarithmic above."""
TICKS = (0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """What is pointed out: the knee of each curve, the settings that the profile has and gets, and the constraint."""

    knees: Sequence[Point] = ()
    own: Point | None = None
    chosen: Point | None = None
    max_rise: float | None = None


def curves(points: Sequence[Point]) -> dict[str, list[Point]]:
    """By rule and filter, in order of strength. Taus of a fused filter share a curve: what is drawn is without it."""
    found: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda one: one.rule.strength):
        rule, tau = point.rule, f" {point.rule.filter.tau:g}"
        zone = f" beyond {rule.dead_zone:g}" if rule.dead_zone else ""
        name = f"{rule.kind}{zone}, {rule.filter.mode}{'' if rule.filter.mode in ('fused', 'none') else tau}"
        curve = found.setdefault(name, [])
        if not curve or curve[-1].rule.strength != rule.strength:
            curve.append(point)
    return found


def draw_sweep(folder: Path, points: Sequence[Point], marked: Marked, *, title: str) -> str | None:
    """Name of the picture; None without matplotlib."""
    try:
        figure: Any = importlib.import_module("matplotlib.figure").Figure(
            figsize=(9, 5.8), layout="constrained"
        )
    except ImportError:
        return None
    panels = figure.subplot_mosaic([["forget", "trade"], ["retain", "trade"]], width_ratios=[1, 1.15])
    drawn = curves(points)
    strengths(panels, drawn, marked)
    trade(panels["trade"], drawn, marked)
    figure.legend(
        *panels["trade"].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small"
    )
    figure.suptitle(title, fontsize="medium")
    figure.savefig(folder / PICTURE, dpi=120)
    return PICTURE


def strengths(panels: Mapping[str, Any], drawn: Mapping[str, Sequence[Point]], marked: Marked) -> None:
    forget, retain = panels["forget"], panels["retain"]
    _lines(forget, drawn, lambda point: (point.rule.strength, point.forget.rise))
    _lines(retain, drawn, lambda point: (point.rule.strength, point.retain.rise))
    _marks(forget, marked, lambda point: (point.rule.strength, point.forget.rise))
    _marks(retain, marked, lambda point: (point.rule.strength, point.retain.rise))
    forget.set(ylabel="forgotten\n(forget NLL rise, nats)")
    forget.tick_params(labelbottom=False)
    retain.set(xlabel="strength α", ylabel="lost\n(retain NLL rise, nats)")
    retain.set_yscale("symlog", linthresh=LINEAR_NATS)
    # By default there is a tick at each power of ten: two of them, as powers.
    retain.set_yticks(TICKS, labels=[f"{tick:g}" for tick in TICKS])
    retain.minorticks_off()
    losses = [0.0, *(point.retain.rise for points in drawn.values() for point in points)]
    retain.set_ylim(min(losses) - 0.01, max(losses) * 1.3 + 0.02)
    if marked.max_rise is not None:
        retain.axhline(marked.max_rise, color="0.4", linestyle=":", linewidth=1.3)
    for axes in (forget, retain):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)


def trade(axes: Any, drawn: Mapping[str, Sequence[Point]], marked: Marked) -> None:
    """Linear, for the knee is the point farthest above the chord, which is drawn."""
    _lines(axes, drawn, _lost_and_forgotten)
    for number, points in enumerate(drawn.values()):
        if any(point in marked.knees for point in points):
            ends = [(0.0, 0.0), _lost_and_forgotten(points[-1])]
            axes.plot(*zip(*ends, strict=True), "--", color=f"C{number % 10}", linewidth=0.8)
    _marks(axes, marked, _lost_and_forgotten)
    if marked.max_rise is not None:
        label = f"constraint: lost ≤ {marked.max_rise:g}"
        axes.axvline(marked.max_rise, color="0.4", linestyle=":", linewidth=1.3, label=label)
    axes.plot(0, 0, "k+", markersize=9, label="base")
    axes.set(xlabel="lost (retain NLL rise, nats)", ylabel="forgotten (forget NLL rise, nats)")
    axes.grid(alpha=0.3)


def _lost_and_forgotten(point: Point) -> tuple[float, float]:
    return point.retain.rise, point.forget.rise


def _lines(
    axes: Any, drawn: Mapping[str, Sequence[Point]], place: Callable[[Point], tuple[float, float]]
) -> None:
    for number, (name, points) in enumerate(drawn.items()):
        places = [(0.0, 0.0), *map(place, points)]
        style = f"{MARKS[number % len(MARKS)]}-"
        axes.plot(
            *zip(*places, strict=True),
            style,
            color=f"C{number % 10}",
            markersize=4,
            linewidth=1.3,
            label=name,
        )


def _marks(axes: Any, marked: Marked, place: Callable[[Point], tuple[float, float]]) -> None:
    """Hollow, so that the points inside stay visible, and of three sizes for where they are one."""
    for knee in marked.knees:
        label = f"knee of {knee.rule.kind}, {knee.rule.filter.mode}: α = {knee.rule.strength:g}"
        axes.plot(*place(knee), "s", color="C3", markersize=10, fillstyle="none", label=label)
    for point, mark, size, what in ((marked.own, "o", 13, "now"), (marked.chosen, "*", 17, "chosen")):
        if point is not None:
            label = f"{what}: {told(point.rule)}"
            axes.plot(*place(point), mark, color="k", markersize=size, fillstyle="none", label=label)
