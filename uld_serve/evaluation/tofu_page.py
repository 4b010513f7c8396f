"""TOFU's figures as a page of Markdown. Called by tofu_command. Knows no model and no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from uld_serve.evaluation.eval_log import SECTIONS
from uld_serve.evaluation.groups import Figures, Group
from uld_serve.evaluation.table import Column, rows_with_groups, table

FORGET = ("sections", "forget")
COLUMNS = (
    Column("model utility", ("model_utility",)),
    Column("of the base's", ("utility_share",), ".1%"),
    Column("forget quality p", ("forget_quality", "p"), ".4g"),
    Column("D", ("forget_quality", "d")),
    Column("n", ("forget_quality", "n"), "g"),
    Column("forget probability", (*FORGET, "probability")),
    Column("forget ROUGE-L", (*FORGET, "rougeL_recall")),
    Column("extraction strength", ("extraction_strength",)),
    Column("exact memorization", ("exact_memorization",)),
)
MEANING = """\
Model utility is the harmonic mean of nine figures on what must stay. Forget quality is the p of a two-sided
Kolmogorov-Smirnov test against the reference, with D and n. On the forget set: probability is P(answer)^(1/length),
ROUGE-L is the recall of greedy answers, extraction strength the share of an answer that greedy decoding gives by
itself, exact memorization the share of its tokens that are the most likely ones.

Likelihoods of a profile with a fused filter are taken without that filter, which would give what it drops
probability 0; answers, extraction strength and exact memorization are of what is served."""
OF_GROUPS = """\
A group's row has the mean over its profiles ± their standard deviation (n - 1)."""


def markdown(
    figures: Mapping[str, Figures],
    groups: Mapping[str, Group],
    *,
    split: str,
    variant: str,
    has_reference: bool,
    pictures: Sequence[str],
) -> str:
    """`figures` by subject, the base first."""
    rows = rows_with_groups(figures, groups)
    return "\n".join(
        [
            f"# TOFU, {split}",
            "",
            f"Truth ratios are {variant} means.",
            "",
            *table(COLUMNS, rows),
            "" if has_reference else "\nWithout a reference there is no forget quality.\n",
            MEANING,
            *(["", OF_GROUPS] if groups else []),
            *(f"\n![{name.removesuffix('.png')}]({name})" for name in pictures),
            "",
            "## By section",
            "",
            *_by_section(rows),
            "",
        ]
    )


def _by_section(rows: Mapping[str, Figures]) -> list[str]:
    lines = []
    for section in SECTIONS:
        columns = (
            Column("n", ("sections", section, "n"), "g"),
            Column("probability", ("sections", section, "probability")),
            Column("ROUGE-L recall", ("sections", section, "rougeL_recall")),
            Column("truth ratio", ("sections", section, "truth_ratio")),
        )
        lines += [f"### {section}", "", *table(columns, rows), ""]
    return lines
