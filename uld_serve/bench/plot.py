"""Draws growth's two pictures into one file. Called by growth. matplotlib comes with the extra `plot` only."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from uld_serve.bench.line import Line
from uld_serve.errors import InvalidRequest

# Marks as well as colours: two modes may lie on one line, and prints may be grey.
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
PANELS = (
    ("bytes", "cache, MB", 1e-6, "Keys and values held"),
    ("ms", "one decode step, ms", 1.0, "Time of a step"),
)


def require_plot(file: Path) -> None:
    """Raises InvalidRequest before anything is measured: no matplotlib, or no place for the file."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise InvalidRequest(
            "--plot needs matplotlib, which is not installed: pip install 'uld-serve[plot]'"
        ) from error
    if file.suffix != ".png" or not file.resolve().parent.is_dir():
        raise InvalidRequest(f"--plot {file}: name a .png file in a folder that exists")


def plot_growth(
    file: Path,
    series: Mapping[str, Mapping[str, Sequence[float]]],
    lines: Mapping[str, Mapping[str, Line]],
) -> None:
    """`series`: mode -> tokens, bytes, ms; `lines`: mode -> the fits of bytes and ms, drawn dashed."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (what, label, scale, title) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for number, (mode, points) in enumerate(series.items()):
            tokens, line = points["tokens"], lines[mode][what]
            values = [value * scale for value in points[what]]
            # Smaller and smaller, so that marks of equal values stay visible around each other.
            size = 11 - 3 * number if number < 3 else 3
            (drawn,) = axes.plot(
                tokens, values, MARKS[number % len(MARKS)], markersize=size, fillstyle="none"
            )
            ends = [0.0, tokens[-1]]
            axes.plot(
                ends,
                [(line.intercept + line.slope * x) * scale for x in ends],
                "--",
                color=drawn.get_color(),
                linewidth=1,
            )
            drawn.set_label(f"{mode} (R² {line.r_squared:.4f})")
        axes.set(title=title, xlabel="tokens of context", ylabel=label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    figure.savefig(file, dpi=120)
