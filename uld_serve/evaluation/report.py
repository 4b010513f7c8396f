"""An evaluation's figures as a page of Markdown. Called by the eval command. Knows no model and no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "model utility",
    "forget quality p",
    "D",
    "n",
    "forget probability",
    "forget ROUGE-L",
    "extraction strength",
    "exact memorization",
)
MEANING = """\
Model utility is the harmonic mean of nine figures on what must stay; in brackets its share of the base's. Forget
quality is the p of a two-sided Kolmogorov-Smirnov test against the reference, with D and n. On the forget set:
probability is P(answer)^(1/length), ROUGE-L is the recall of greedy answers, extraction strength the share of an answer
that greedy decoding gives by itself, exact memorization the share of its tokens that are the most likely ones.

Likelihoods of a profile with a fused filter are taken without that filter, which would give what it drops
probability 0; answers, extraction strength and exact memorization are of what is served."""


def markdown(
    figures: Mapping[str, Mapping[str, Any]],
    *,
    split: str,
    variant: str,
    has_reference: bool,
    pictures: Sequence[str],
) -> str:
    """`figures` by subject, the base first."""
    base = next(iter(figures.values()))
    rows = [_row(name, one, base) for name, one in figures.items()]
    table = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|", *rows]
    missing = "" if has_reference else "\nWithout a reference there is no forget quality.\n"
    sections = [_sections(name, one) for name, one in figures.items()]
    return "\n".join(
        [
            f"# TOFU, {split}",
            "",
            f"Truth ratios are {variant} means.",
            "",
            *table,
            missing,
            MEANING,
            *(f"\n![{name.removesuffix('.png')}]({name})" for name in pictures),
            "",
            "## By section",
            "",
            "| | section | n | probability | ROUGE-L recall | truth ratio |",
            "|---|---|---|---|---|---|",
            *(line for lines in sections for line in lines),
            "",
        ]
    )


def _row(name: str, one: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    forget, quality = one["sections"]["forget"], one["forget_quality"]
    share = f" ({one['model_utility'] / base['model_utility']:.1%})" if base["model_utility"] > 0 else ""
    cells = [
        f"{one['model_utility']:.4f}{share}",
        *(
            ("", "", "")
            if quality is None
            else (f"{quality['p']:.4g}", f"{quality['d']:.4f}", str(quality["n"]))
        ),
        f"{forget['probability']:.4f}",
        f"{forget['rougeL_recall']:.4f}",
        f"{one['extraction_strength']:.4f}",
        f"{one['exact_memorization']:.4f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def _sections(name: str, one: Mapping[str, Any]) -> list[str]:
    return [
        f"| {name} | {section} | {values['n']} | {values['probability']:.4f} | {values['rougeL_recall']:.4f} | "
        f"{values['truth_ratio']:.4f} |"
        for section, values in one["sections"].items()
    ]
