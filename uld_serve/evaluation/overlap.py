"""ROUGE-L between answers, by the package rouge-score, which the published evaluations use. Called by the evaluations.
The extra `evaluation` brings it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

from rouge_score.rouge_scorer import RougeScorer


class _Score(Protocol):
    precision: float
    recall: float
    fmeasure: float


@dataclass(frozen=True, slots=True)
class RougeL:
    """By the longest common subsequence of words, in lower case."""

    recall: float
    """Over the truth's words: TOFU's and RWKU's choice."""
    f1: float
    """MUSE's choice, for VerbMem (a continuation against the text) and KnowMem (an answer against the right one)."""


def rouge_l(answer: str, truth: str, *, stems: bool = True) -> RougeL:
    """Zeros where either has no word. With `stems` words are Porter-stemmed, as TOFU's code has it; MUSE's and RWKU's
    compare them as they are."""
    score: _Score = _scorer(stems).score(truth, answer)["rougeL"]
    return RougeL(recall=float(score.recall), f1=float(score.fmeasure))


@cache
def _scorer(stems: bool) -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=stems)
