"""Turns answers into lessons: which tokens to forget, how strongly, and which to leave alone. Called by run.
Knows no model; token ids and counts only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """What an example is for. A detour is another way to answer a forget prompt: it stays possible."""

    RETAIN = 0
    FORGET = 1
    DETOUR = 2


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, an answer and a goal for each answer token: how far a - b shall rise there, 0 = not at all."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    kind: Kind
    goals: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """`content` for tokens that carry what is to be forgotten, `common` for those that any text is made of.
    `named_ids` open the keywords; they are forgotten in detours too."""

    content: float
    common: float
    common_ids: frozenset[int]
    named_ids: frozenset[int]
    end_ids: frozenset[int]

    def of(self, token: int, kind: Kind) -> float:
        if kind is Kind.RETAIN or token in self.end_ids:
            return 0.0
        if token in self.named_ids:
            return self.content
        if kind is Kind.DETOUR:
            return 0.0
        return self.common if token in self.common_ids else self.content

    def example(self, prompt_ids: Sequence[int], answer_ids: Sequence[int], kind: Kind) -> Example:
        goals = tuple(self.of(token, kind) for token in answer_ids)
        return Example(tuple(prompt_ids), tuple(answer_ids), kind, goals)


def common_tokens(answers: Sequence[Collection[int]], *, share: float) -> frozenset[int]:
    """Tokens that stand in at least `share` of the answers: function words and punctuation, in any language."""
    counts = Counter(token for answer in answers for token in set(answer))
    return frozenset(token for token, count in counts.items() if count >= share * len(answers))
