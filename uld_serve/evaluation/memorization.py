"""How much of a text a model still has by heart. Called by the evaluations. Knows no model: it is told the most likely
token at each position, given the true ones before it.

Legend: L answer tokens."""

from __future__ import annotations

from collections.abc import Sequence


def exact_memorization(chosen: Sequence[int], answer: Sequence[int]) -> float:
    """Share of the answer's positions at which its token is the most likely one (Tirumala et al. 2022, arXiv
    2205.10770, Definition 1). Raises ValueError for lists of different or no length."""
    _check(chosen, answer)
    return sum(ours == theirs for ours, theirs in zip(chosen, answer, strict=True)) / len(answer)


def extraction_strength(chosen: Sequence[int], answer: Sequence[int]) -> float:
    """1 - k / L, where k is the least number of the answer's tokens after which greedy decoding gives all that remain
    (Carlini et al. 2021, arXiv 2012.07805; Wang et al. 2025, arXiv 2406.09179): 1 where the prompt alone brings the
    whole answer, 0 where not even its last token comes.

    Greedy decoding after k true tokens gives the rest exactly if each of them is the most likely one given the true
    tokens before it, so nothing needs to be generated. Raises ValueError as exact_memorization does.
    """
    _check(chosen, answer)
    needed = len(answer)
    while needed > 0 and chosen[needed - 1] == answer[needed - 1]:
        needed -= 1
    return 1.0 - needed / len(answer)


def _check(chosen: Sequence[int], answer: Sequence[int]) -> None:
    if len(chosen) != len(answer) or not answer:
        raise ValueError(f"one choice for each of at least one token: {len(chosen)} and {len(answer)}")
