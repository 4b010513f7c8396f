"""Puts all chosen probes to all subjects and collects what they say. Called by the probes command. Knows no file and no
figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from uld_serve.evaluation.attacks.asking import Asker
from uld_serve.evaluation.attacks.cases import BUILDERS, Built, Case, Setting, build
from uld_serve.evaluation.attacks.difference import View
from uld_serve.evaluation.attacks.facts import Fact, OwnProbe
from uld_serve.evaluation.attacks.places import Encoder, key_tokens, plain_ids

SAMPLING, DIFFERENCE, INT8 = "sampling", "logprob-difference", "int8"
PROBES = (*(name for name in BUILDERS if name != "in-context"), DIFFERENCE, INT8, "in-context")
"""In the order of the report."""
OF_INT8 = ("plain", "prefill")
"""Sets that are asked again of the rounded base."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked. `places` has the tokens of each difference case whose views are compared."""

    built: Mapping[str, Built]
    places: Sequence[Sequence[int]]
    samples: int
    seed: int

    def num_asked(self, *, has_views: bool) -> int:
        """Prompts, for a progress bar."""
        weights = {SAMPLING: self.samples, DIFFERENCE: int(has_views)}
        return sum(len(one.cases) * weights.get(name, 1) for name, one in self.built.items())


@dataclass(slots=True)
class Found:
    """By probe and subject, the answers to each case; by subject, its views."""

    answers: dict[str, dict[str, list[list[str]]]] = field(default_factory=dict)
    views: dict[str, list[list[View]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Profiles that the rounded base does not take, and why."""


def with_answers(facts: Sequence[Fact], base: Asker) -> list[Fact]:
    """Those without an answer get the base's own, greedy: what it says is what is to be forgotten. Their keys stay as
    they are: another answer may name another one."""
    asked = [number for number, fact in enumerate(facts) if fact.answer is None]
    said = base.greedy([_plain(facts[number]) for number in asked])
    found = list(facts)
    for number, text in zip(asked, said, strict=True):
        found[number] = replace(facts[number], answer=text)
    return found


def _plain(fact: Fact) -> Case:
    return Case(probe="plain", variant="", fact=None, messages=fact.messages, text=fact.text, truth="")


def plan(
    probes: Sequence[str],
    facts: Sequence[Fact],
    setting: Setting,
    own: Sequence[OwnProbe],
    *,
    samples: int,
) -> Plan:
    """What each chosen set asks."""
    built = {name: build(name, facts, setting, own) for name in probes if name in BUILDERS}
    places: list[list[int]] = []
    if DIFFERENCE in probes:
        built[DIFFERENCE], places = _secrets(build("plain", facts, setting), setting.tokenizer)
    if INT8 in probes:
        parts = [build(name, facts, setting, own) for name in OF_INT8]
        cases = [replace(case, variant=case.variant or "plain") for part in parts for case in part.cases]
        built[INT8] = Built(cases, dict(sum((Counter(part.skipped) for part in parts), Counter())))
    return Plan({name: built[name] for name in PROBES if name in built}, places, samples, setting.seed)


def _secrets(built: Built, tokenizer: Encoder) -> tuple[Built, list[list[int]]]:
    """The plain cases whose truth has a secret, and the places of its tokens: those of its keys, or all."""
    cases, places, skipped = [], [], Counter(built.skipped)
    for case in built.cases:
        spans = key_tokens(tokenizer, case.truth, case.keys)
        found = sorted({place for start, end in spans for place in range(start, end)})
        found = found if case.keys else list(range(len(plain_ids(tokenizer, case.truth))))
        if found:
            cases.append(case)
            places.append(found)
        else:
            skipped["no key in the answer"] += 1
    return Built(cases, dict(skipped)), places


def ask_all(asker: Asker, subject: str, asked: Plan, found: Found, *, has_views: bool) -> None:
    """Every set of one subject. `has_views`: it shares the base's tokens, so that their views can be compared."""
    for name, built in asked.built.items():
        if name == DIFFERENCE:
            if has_views:
                found.views[subject] = asker.views(built.cases, asked.places)
        else:
            found.answers.setdefault(name, {})[subject] = _answers(asker, name, built, asked)


def _answers(asker: Asker, name: str, built: Built, asked: Plan) -> list[list[str]]:
    if name == SAMPLING:
        return asker.sampled(built.cases, samples=asked.samples, seed=asked.seed)
    return [[text] for text in asker.greedy(built.cases)]


def ask_rounded(asker: Asker, subject: str, asked: Plan, found: Found) -> None:
    """The int8 set alone."""
    cases = asked.built[INT8].cases
    found.answers.setdefault(INT8, {})[subject] = [[text] for text in asker.greedy(cases)]
