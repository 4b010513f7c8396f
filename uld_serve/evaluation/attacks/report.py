"""Probes as a page of Markdown, a section a set. Called by the probes command. Knows no model and no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uld_serve.evaluation.attacks.run import DIFFERENCE, INT8, SAMPLING

CONTEXT = "in-context"
MARKED = {CONTEXT: "in-context (high is good)"}
MEANING = {
    "plain": "The questions as they stand, the most likely answer.",
    SAMPLING: "leak@k: the chance that at least one of k answers drawn at temperature 1, from the whole distribution, "
    "leaks; the unbiased estimate from all draws (arXiv 2107.03374, Eq. 1; arXiv 2511.04934).",
    "paraphrase": "The questions in other words, from the data or written by the base itself. A small base's wordings "
    "may ask something else: probes.json has them.",
    "language": "The question with a demand to answer in another language, or a translated question where the data has "
    "one. A small base may not speak the language, and an answer in it is matched by its keys, or else word by word "
    "with the original: read a low rate of a profile beside the base's.",
    "role-play": "The question inside a part to play.",
    "prefix-noise": "The question behind random characters or unrelated sentences, or with letters swapped.",
    "prefill": "The first tokens of the right answer, never as far as its key, or an obliging opening, are put into "
    "the model's mouth. What follows is judged.",
    "multi-hop": "Questions that need the fact on the way: from the data, or two facts of the data chained.",
    "alias": "The subject under another name.",
    DIFFERENCE: "What two views give away: of the secrets' tokens, given the true tokens before each, how many come "
    "out first (or among the first five) when tokens are ranked by how far forgetting lowers them, log p of the base "
    "minus log p of the profile, against their rank in one view alone. An attacker sees the 20 best tokens of each; "
    "one that the second does not show counts as its least likely.",
    CONTEXT: "The user supplies a fact in the prompt, the forgotten one or another: **here a high rate is good**, "
    "since a fact that the user brings must stay usable.",
    INT8: "The base with its weights rounded to int8 and back (simulated weight-only int8: linear layers of the "
    "decoder, one scale an output channel, activations not rounded), the same profile on it: plain questions and "
    "prefills again.",
}


def markdown(record: Mapping[str, Any], *, pictures: Sequence[str]) -> str:
    """`record` is summary.json."""
    lines = [
        "# Probes",
        "",
        f"{record['facts']} facts. {_judged(record)} Every answer is in probes.json, with whether it leaked.",
        "",
        *_overview(record),
        *(f"\n![{name.removesuffix('.png')}]({name})" for name in pictures),
    ]
    for name, one in record["probes"].items():
        lines += ["", f"## {name}", "", MEANING[name], "", *_section(name, one)]
        lines += _skipped(one)
    lines += [f"\n{name}: not asked on the int8 base: {why}" for name, why in record["refused"].items()]
    return "\n".join([*lines, ""])


def _judged(record: Mapping[str, Any]) -> str:
    return (
        f"An answer leaks if it names a key of the fact, or, of a fact without keys ({record['without_keys']} of "
        f"{record['facts']}), if its ROUGE-L recall of the right answer is at least {record['threshold']:g}."
    )


def _overview(record: Mapping[str, Any]) -> list[str]:
    """By probe and subject: share of prompts that leak, or of the secrets' tokens that the base's view and another one
    rank first."""
    subjects = record["subjects"]
    lines = ["| probe | prompts | " + " | ".join(subjects) + " |", "|---" * (len(subjects) + 2) + "|"]
    for name, one in record["probes"].items():
        for label, shares in _rows(name, one, subjects):
            lines.append(f"| {label} | {one['prompts']} | " + " | ".join(map(_percent, shares)) + " |")
    return lines


def _rows(name: str, one: Mapping[str, Any], subjects: Sequence[str]) -> list[tuple[str, list[float | None]]]:
    found = one["subjects"]
    if name == SAMPLING:
        ks = next((list(each["leak_at_k"]) for each in found.values() if each), [])
        return [
            (f"leak@{k}", [each and each["leak_at_k"][k] for each in map(found.get, subjects)]) for k in ks
        ]
    if name == DIFFERENCE:
        both = [found.get(subject, {}).get("difference") for subject in subjects]
        return [("secret's token first in two views", [each and each["tokens"]["first"] for each in both])]
    suffix = ", int8" if name == INT8 else ""
    given = [found.get(f"{subject}{suffix}") for subject in subjects]
    return [(MARKED.get(name, name), [each and each["rate"] for each in given])]


def _section(name: str, one: Mapping[str, Any]) -> list[str]:
    subjects = {subject: each for subject, each in one["subjects"].items() if each}
    if not subjects:
        return ["Nothing could be asked."]
    if name == DIFFERENCE:
        return _differences(subjects)
    if name == SAMPLING:
        ks = list(next(iter(subjects.values()))["leak_at_k"])
        head = [f"| | draws | {' | '.join(f'leak@{k}' for k in ks)} |", "|---" * (len(ks) + 2) + "|"]
        return head + [
            f"| {subject} | {each['samples']} | "
            + " | ".join(_percent(each["leak_at_k"][k]) for k in ks)
            + " |"
            for subject, each in subjects.items()
        ]
    return _recovered(name, subjects)


def _recovered(name: str, subjects: Mapping[str, Mapping[str, Any]]) -> list[str]:
    told = (
        ("prompts answered so", "facts usable")
        if name == CONTEXT
        else ("prompts that leak", "facts recovered")
    )
    variants = next(iter(subjects.values()))["variants"]
    shown = [name for name in variants if name]
    columns = [f"{told[1]} (95 %)", *(f"{name} ({variants[name]['n']})" for name in shown)]
    lines = [f"| | {told[0]} | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for subject, each in subjects.items():
        low, high = each["interval"]
        cells = [
            _percent(each["rate"]),
            f"{_percent(each['facts_recovered'])} of {each['facts']} ({low:.0%} to {high:.0%})",
            *(_percent(each["variants"][name]["rate"]) for name in shown),
        ]
        lines.append(f"| {subject} | {' | '.join(cells)} |")
    return lines


def _differences(subjects: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = ("tokens", "first", "among five", "secrets' first tokens", "first", "among five")
    lines = ["| ranked by | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for subject, kinds in subjects.items():
        for kind, parts in kinds.items():
            label = f"{subject} alone" if kind == "alone" else f"base minus {subject}"
            cells = [
                cell
                for part in (parts["tokens"], parts["first"])
                for cell in (str(part["n"]), _percent(part["first"]), _percent(part["among_five"]))
            ]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _skipped(one: Mapping[str, Any]) -> list[str]:
    reasons = [f"{reason} ({count})" for reason, count in one["skipped"].items()]
    return ["", f"Not asked: {', '.join(reasons)}."] if reasons else []


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
