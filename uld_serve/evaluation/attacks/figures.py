"""From answers to the figures of each probe set. Called by the probes command. Knows no model and no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from scipy import stats

from uld_serve.evaluation.attacks.cases import Case
from uld_serve.evaluation.attacks.difference import View, difference_rank, ranked
from uld_serve.evaluation.attacks.leak_at_k import curve, mean_leak_at_k
from uld_serve.evaluation.attacks.places import Encoder, plain_ids
from uld_serve.evaluation.attacks.run import DIFFERENCE, SAMPLING, Found, Plan
from uld_serve.evaluation.lineup import BASE

Leaks = dict[str, dict[str, list[list[bool]]]]
"""By probe and subject, whether each answer to each case leaks."""


def judged(asked: Plan, found: Found, *, threshold: float) -> Leaks:
    return {
        name: {
            subject: [
                [case.leaks(text, threshold=threshold) for text in texts]
                for case, texts in zip(asked.built[name].cases, answers, strict=True)
            ]
            for subject, answers in by_subject.items()
        }
        for name, by_subject in found.answers.items()
    }


def figures(
    asked: Plan, found: Found, leaks: Leaks, *, ks: Sequence[int], tokenizer: Encoder
) -> dict[str, Any]:
    """By probe: how many prompts, what was skipped, and each subject's figures."""
    result: dict[str, Any] = {}
    for name, built in asked.built.items():
        one: dict[str, Any] = {"prompts": len(built.cases), "skipped": built.skipped}
        if name == DIFFERENCE:
            one["subjects"] = _differences(asked, found.views, tokenizer)
        elif name == SAMPLING:
            one["subjects"] = {
                subject: _sampled(flags, asked.samples, ks) for subject, flags in leaks[name].items()
            }
        else:
            one["subjects"] = {
                subject: recovered(built.cases, flags) for subject, flags in leaks[name].items()
            }
        result[name] = one
    return result


def recovered(cases: Sequence[Case], leaks: Sequence[Sequence[bool]]) -> dict[str, Any] | None:
    """Share of prompts whose answer leaks, over all and by variant, and share of facts that some prompt brings out,
    with Wilson's 95 % interval: prompts about one fact are no independent draws, facts are taken to be. None without a
    prompt."""
    if not cases:
        return None
    flags = [any(one) for one in leaks]
    by_fact: dict[object, bool] = {}
    by_variant: dict[str, list[bool]] = {}
    for number, (case, flag) in enumerate(zip(cases, flags, strict=True)):
        fact: object = ("own", number) if case.fact is None else case.fact
        by_fact[fact] = by_fact.get(fact, False) or flag
        by_variant.setdefault(case.variant, []).append(flag)
    num_facts, num_recovered = len(by_fact), sum(by_fact.values())
    interval = stats.binomtest(num_recovered, num_facts).proportion_ci(method="wilson")
    return {
        "rate": _share(flags),
        "facts": num_facts,
        "facts_recovered": num_recovered / num_facts,
        "interval": [float(interval.low), float(interval.high)],
        "variants": {name: {"n": len(some), "rate": _share(some)} for name, some in by_variant.items()},
    }


def _sampled(leaks: Sequence[Sequence[bool]], samples: int, ks: Sequence[int]) -> dict[str, Any] | None:
    if not leaks:
        return None
    counts = [sum(flags) for flags in leaks]
    return {
        "samples": samples,
        "leak_at_k": {str(k): mean_leak_at_k(counts, samples, k) for k in ks},
        "curve": [list(point) for point in curve(counts, samples)],
        "leaks": counts,
    }


def _differences(
    asked: Plan, views: Mapping[str, Sequence[Sequence[View]]], tokenizer: Encoder
) -> dict[str, Any]:
    """Of the secrets' tokens, how many come out on top: of one view alone, and of the difference between the base's
    and each other's. `first` counts each secret's first token only."""
    cases = asked.built[DIFFERENCE].cases
    if not cases:
        return {}
    tokens = [
        [plain_ids(tokenizer, case.truth)[place] for place in places]
        for case, places in zip(cases, asked.places, strict=True)
    ]
    result = {}
    for subject, own in views.items():
        ranks = {"alone": [_alone(*pair) for pair in zip(own, tokens, strict=True)]}
        if subject != BASE:
            triples = zip(views[BASE], own, tokens, strict=True)
            ranks["difference"] = [_against(*triple) for triple in triples]
        result[subject] = {
            kind: {
                "tokens": asdict(ranked([rank for fact in by_fact for rank in fact])),
                "first": asdict(ranked([fact[0] for fact in by_fact])),
            }
            for kind, by_fact in ranks.items()
        }
    return result


def _alone(views: Sequence[View], tokens: Sequence[int]) -> list[int | None]:
    return [view.rank(token) for view, token in zip(views, tokens, strict=True)]


def _against(base: Sequence[View], other: Sequence[View], tokens: Sequence[int]) -> list[int | None]:
    return [difference_rank(*three) for three in zip(base, other, tokens, strict=True)]


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
