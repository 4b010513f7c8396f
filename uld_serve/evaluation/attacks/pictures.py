"""Probes as pictures: leak@k curves, recovery by probe set, and what two views give away. Called by the probes command.
matplotlib comes with the extra `plot` only; without it there are no pictures."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uld_serve.evaluation.attacks.report import MARKED
from uld_serve.evaluation.attacks.run import DIFFERENCE, INT8, SAMPLING
from uld_serve.evaluation.pictures import DASHES, MARKS

CURVES, RECOVERY, VIEWS = "leak-at-k.png", "recovery.png", "views.png"
HATCHES = ("", "///", "...", "xxx", "\\\\\\")
"""As well as colours: prints may be grey."""


def draw(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Names of the pictures drawn of summary.json: those that there are figures for, none without matplotlib."""
    try:
        figure: Any = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        return []
    probes, drawn = record["probes"], []
    rates = _rates(probes)
    if rates:
        _recovery(figure(figsize=(7.5, 1.6 + 0.55 * len(rates)), layout="constrained"), rates).savefig(
            folder / RECOVERY, dpi=120
        )
        drawn.append(RECOVERY)
    curves = _given(probes, SAMPLING)
    if curves:
        _curves(figure(figsize=(7, 4.5), layout="constrained"), curves).savefig(folder / CURVES, dpi=120)
        drawn.append(CURVES)
    views = _given(probes, DIFFERENCE)
    if views:
        _views(figure(figsize=(7.5, 1.8 + 0.5 * len(views)), layout="constrained"), views).savefig(
            folder / VIEWS, dpi=120
        )
        drawn.append(VIEWS)
    return drawn


def _given(probes: Mapping[str, Any], name: str) -> dict[str, Any]:
    subjects = probes[name]["subjects"] if name in probes else {}
    return {subject: one for subject, one in subjects.items() if one}


def _rates(probes: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By probe and subject, share of prompts; int8 stands beside the stored weights of the same prompts."""
    found = {}
    for name in probes:
        given = _given(probes, name) if name not in (SAMPLING, DIFFERENCE) else {}
        if name == INT8:
            given = {
                subject.removesuffix(", int8"): one
                for subject, one in given.items()
                if subject.endswith(", int8")
            }
        if given:
            found[MARKED.get(name, name)] = {subject: one["rate"] for subject, one in given.items()}
    return found


def _recovery(figure: Any, rates: Mapping[str, Mapping[str, float]]) -> Any:
    axes = figure.subplots()
    subjects = list(dict.fromkeys(subject for one in rates.values() for subject in one))
    height = 0.8 / len(subjects)
    for number, subject in enumerate(subjects):
        there = [(row, one[subject]) for row, one in enumerate(rates.values()) if subject in one]
        places = [row + (number - (len(subjects) - 1) / 2) * height for row, _ in there]
        bars = axes.barh(
            places,
            [100 * rate for _, rate in there],
            height,
            label=subject,
            color=f"C{number % 10}",
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="white",
        )
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize="small")
    axes.set_yticks(range(len(rates)), list(rates))
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 108), xlabel="prompts whose answer gives the fact away (%)", title="Recovery by probe set"
    )
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _legend_below(figure, axes)
    return figure


def _curves(figure: Any, curves: Mapping[str, Mapping[str, Any]]) -> Any:
    axes = figure.subplots()
    for number, (subject, one) in enumerate(curves.items()):
        ks, chances = zip(*one["curve"], strict=True)
        style = DASHES[number % len(DASHES)] + MARKS[number % len(MARKS)]
        # Curves at 0 or 1 lie on the frame.
        axes.plot(
            ks,
            [100 * chance for chance in chances],
            style,
            color=f"C{number % 10}",
            label=subject,
            clip_on=False,
        )
    draws = next(iter(curves.values()))["samples"]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(
        ylim=(0, 100),
        xlabel="answers drawn at T = 1, k",
        ylabel="leak@k: facts that one of them gives away (%)",
        title=f"leak@k, estimated from {draws} draws a fact",
    )
    axes.grid(alpha=0.3)
    _legend_below(figure, axes)
    return figure


def _views(figure: Any, views: Mapping[str, Mapping[str, Any]]) -> Any:
    axes = figure.subplots()
    rows = [
        (f"{subject} alone" if kind == "alone" else f"base minus {subject}", parts["tokens"])
        for subject, kinds in views.items()
        for kind, parts in kinds.items()
    ]
    figure.set_figheight(1.8 + 0.55 * len(rows))
    parts = (("first", "first", -0.2), ("among_five", "among the first five", 0.2))
    for number, (field, label, shift) in enumerate(parts):
        bars = axes.barh(
            [row + shift for row in range(len(rows))],
            [100 * one[field] for _, one in rows],
            0.38,
            label=label,
            color=f"C{number}",
            hatch=HATCHES[number],
            edgecolor="white",
        )
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize="small")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 108), xlabel="tokens of the secrets (%)", title="What one view and two views rank first"
    )
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _legend_below(figure, axes)
    return figure


def _legend_below(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns: Sequence[str] = labels[:4]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(columns), fontsize="small")
