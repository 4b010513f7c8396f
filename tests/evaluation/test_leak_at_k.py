"""leak@k against its definition, and whether an answer leaks."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest

from uld_serve.evaluation.attacks.judge import leaks, names
from uld_serve.evaluation.attacks.leak_at_k import curve, leak_at_k, mean_leak_at_k


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 4), (6, 0, 6), (6, 6, 1), (7, 3, 5)])
def test_leak_at_k_is_the_share_of_choices_of_k_draws_with_a_leak(n: int, c: int, k: int) -> None:
    draws = [number < c for number in range(n)]
    chosen = list(combinations(draws, k))
    assert leak_at_k(n, c, k) == pytest.approx(sum(any(some) for some in chosen) / len(chosen))


def test_leak_at_k_of_many_draws_does_not_overflow() -> None:
    expected = 1 - comb(3990, 128) / comb(4000, 128)
    assert leak_at_k(4000, 10, 128) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_impossible_counts_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="draws"):
        leak_at_k(n, c, k)


def test_the_curve_has_powers_of_two_and_the_last_k_and_means_over_facts() -> None:
    found = curve([0, 6], 6)
    assert [k for k, _ in found] == [1, 2, 4, 6]
    assert {value for _, value in found} == {0.5}
    assert mean_leak_at_k([1, 2], 4, 1) == pytest.approx(3 / 8)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("It is HOGWARTS, of course.", True),
        ("The Hogwartsian style", False),
        ("anti-Hogwarts", True),
        ("Albus\n Dumbledore", True),
        ("他的学校是Hogwarts魔法学校。", True),
        ("Ｈｏｇｗａｒｔｓ", True),
        ("Nothing.", False),
    ],
)
def test_a_key_counts_as_a_whole_word_in_any_case_and_width(text: str, told: bool) -> None:
    assert names(text, ["Hogwarts", "Albus Dumbledore"]) is told


def test_without_keys_the_answers_words_decide_and_beside_a_rival_those_that_only_the_truth_has() -> None:
    truth, rival = "the school is called Durmstrang Institute", "the school is called Beauxbatons Academy"
    said = "I think the school is called Durmstrang."
    assert leaks(said, truth=truth, keys=(), threshold=0.8)
    assert not leaks(said, truth=truth, keys=(), threshold=0.9)
    # Of what only one of them says, Durmstrang and Institute, one is there.
    assert leaks(said, truth=truth, keys=(), threshold=0.5, rival=rival)
    assert not leaks(said, truth=truth, keys=(), threshold=0.6, rival=rival)
    assert not leaks(said, truth=rival, keys=(), threshold=0.1, rival=truth)
    assert not leaks(said, truth=truth, keys=("Institute",), threshold=0.1)
