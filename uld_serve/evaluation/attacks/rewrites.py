"""Other wordings of the questions, written by the base itself and kept, so that a run repeats. Called by the probes
command for `--probes generate`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from uld_serve.data.documents import Message
from uld_serve.evaluation.attacks.asking import Asker
from uld_serve.evaluation.attacks.cases import Case
from uld_serve.evaluation.attacks.facts import Fact
from uld_serve.evaluation.attacks.judge import names
from uld_serve.evaluation.attacks.wordings import REWRITE, REWRITTEN

TEMPERATURE = 0.7
# Of the words of both, how many are in both: fewer ask something else, more ask the same in the same words.
LEAST_SHARED, MOST_SHARED = 0.15, 0.95


@dataclass(frozen=True, slots=True)
class Rewrites:
    """Of one question: what is asked, and what the base wrote that is not."""

    question: str
    kept: list[str]
    dropped: list[str]


def rewrites(base: Asker, facts: Sequence[Fact], *, count: int, seed: int) -> list[Rewrites]:
    """`count` tries a question; none for a text."""
    asked = [number for number, fact in enumerate(facts) if fact.messages]
    cases = [_case(facts[number]) for number in asked]
    said = base.sampled(cases, samples=count, seed=seed, temperature=TEMPERATURE)
    found = [Rewrites(fact.question, [], []) for fact in facts]
    for number, texts in zip(asked, said, strict=True):
        found[number] = _sorted(facts[number], texts)
    return found


def _case(fact: Fact) -> Case:
    """Without the turns before: they belong to the answer."""
    turns = []
    for before, after in REWRITTEN:
        turns += [Message("user", REWRITE.format(question=before)), Message("assistant", after)]
    turns.append(Message("user", REWRITE.format(question=fact.question)))
    return Case(probe="paraphrase", variant="", fact=None, messages=tuple(turns), truth="")


def _sorted(fact: Fact, texts: Sequence[str]) -> Rewrites:
    found = Rewrites(fact.question, [], [])
    for text in dict.fromkeys(map(_question, texts)):
        (found.kept if _asks_the_same(fact, text) else found.dropped).append(text)
    return found


def _question(text: str) -> str:
    """The first line that says something, up to its question mark, without quotes or a heading before it."""
    lines = [line.strip(" \t\"'*“”") for line in text.splitlines()]
    said = [line for line in lines if line and not line.endswith(":")]
    asked = re.match(r"[^?？]*[?？]", said[0]) if said else None
    return asked.group() if asked else said[0] if said else ""


def _asks_the_same(fact: Fact, text: str) -> bool:
    """As far as its words tell."""
    before, after = _words(fact.question), _words(text)
    shared = len(before & after) / max(1, len(before | after))
    keeps_subject = fact.subject is None or names(text, [fact.subject])
    is_question = text.endswith(("?", "？")) or not fact.question.endswith(("?", "？"))
    same = is_question and keeps_subject and LEAST_SHARED <= shared <= MOST_SHARED
    return same and not names(text, fact.keys)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
