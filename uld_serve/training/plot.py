"""Draws a run's losses into one picture. Called by command. matplotlib comes with the extra `plot` only."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from uld_serve.errors import DataError

# Marks as well as colours: prints may be grey.
TERMS = {"loss": "k-", "forget": "C3o-", "retain": "C0s-", "detour": "C2^-"}


def require_plot(file: Path) -> None:
    """Raises DataError before anything is trained: no matplotlib, or no place for the file."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise DataError(
            "--plot needs matplotlib, which is not installed: pip install 'uld-serve[plot]'"
        ) from error
    if file.suffix != ".png" or not file.resolve().parent.is_dir():
        raise DataError(f"--plot {file}: name a .png file in a folder that exists")


def plot_losses(file: Path, logs: Mapping[str, Sequence[Mapping[str, float]]], *, title: str) -> None:
    """One panel for every adapter that was trained: the loss and its parts by step, as they were logged."""
    taught = {adapter: log for adapter, log in logs.items() if log}
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(1 + 5.5 * len(taught), 4.5), layout="constrained"
    )
    panels = figure.subplots(1, len(taught), squeeze=False)[0]
    for axes, (adapter, log) in zip(panels, taught.items(), strict=True):
        for name, style in TERMS.items():
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            if any(value for _, value in points):
                axes.plot(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=1.2)
        axes.set(title=adapter, xlabel="step", ylabel="loss and its terms, mean since the last point")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
