"""What verify reports, as pure functions of plain values. Each docstring is the figure's definition.

Called by verify; knows nothing of models, profiles or files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def mean_nll(logprobs: Sequence[Sequence[float]]) -> float:
    """Negative log-likelihood per token, in nats: the mean of -log p over all answer tokens of all prompts.

    Long answers weigh more than short ones. Infinite if any token has probability 0.
    """
    tokens = [value for answer in logprobs for value in answer]
    return -math.fsum(tokens) / len(tokens) if tokens else math.nan


def agreement(chosen: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Share of answer positions, over all prompts, at which two distributions have the same most likely
    token."""
    pairs = [
        pair
        for ours, theirs in zip(chosen, reference, strict=True)
        for pair in zip(ours, theirs, strict=True)
    ]
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs) if pairs else math.nan


def recall(answers: Sequence[str], keywords: Sequence[str]) -> float:
    """Share of answers that name at least one keyword, as a whole word or phrase and in any case."""
    pattern = re.compile(
        "|".join(rf"(?<!\w){re.escape(keyword)}(?!\w)" for keyword in keywords) or r"(?!)", re.IGNORECASE
    )
    return (
        sum(pattern.search(answer) is not None for answer in answers) / len(answers) if answers else math.nan
    )


def relative_fall(before: float, after: float) -> float | None:
    """1 - after / before: 1 when nothing is left, 0 when nothing changed. None when there was nothing to
    lose."""
    return 1 - after / before if before > 0 else None


def perplexity(logprobs: Sequence[Sequence[float]]) -> float:
    """exp of the mean NLL per token."""
    return math.exp(mean_nll(logprobs))


def distinct(answers: Sequence[Sequence[int]], n: int = 2) -> float:
    """Share of an answer's n-grams that are different, averaged over the answers that have any.

    Near 1 for natural text of this length; a loop drives it to 0, where perplexity alone would look good.
    """
    shares = []
    for ids in answers:
        grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return math.fsum(shares) / len(shares) if shares else math.nan
