"""What a model still has by heart, and whether an attack can tell that it does."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest

from uld_serve.evaluation.membership import (
    area_under_curve,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    privacy_leak,
    zlib_score,
)
from uld_serve.evaluation.memorization import exact_memorization, extraction_strength
from uld_serve.evaluation.overlap import rouge_l


def test_exact_memorization_is_the_share_of_right_guesses() -> None:
    assert exact_memorization([1, 2, 9, 4], [1, 2, 3, 4]) == 0.75


@pytest.mark.parametrize(
    ("chosen", "strength"),
    [
        ([1, 2, 3, 4], 1.0),
        ([9, 2, 3, 4], 0.75),
        ([1, 2, 3, 9], 0.0),
        ([9, 2, 9, 4], 0.25),
        ([9, 9, 9, 9], 0.0),
    ],
)
def test_extraction_strength_counts_the_tail_that_comes_by_itself(chosen: list[int], strength: float) -> None:
    assert extraction_strength(chosen, [1, 2, 3, 4]) == strength


def test_extraction_strength_is_what_greedy_decoding_would_show() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        answer, chosen = rng.integers(0, 3, (2, 6)).tolist()
        by_trying = next(k for k in range(7) if chosen[k:] == answer[k:])
        assert extraction_strength(chosen, answer) == pytest.approx(1 - by_trying / 6)


@pytest.mark.parametrize("measure", [exact_memorization, extraction_strength])
def test_lists_that_do_not_go_together_are_refused(measure) -> None:  # type: ignore[no-untyped-def]
    for chosen, answer in (([1], [1, 2]), ([], [])):
        with pytest.raises(ValueError, match="one choice for each"):
            measure(chosen, answer)


def test_scores_of_an_attack_by_hand() -> None:
    logprobs = [-1.0, -5.0, -0.5, -3.0, -2.0]
    assert loss_score(logprobs) == pytest.approx(-2.3)
    assert zlib_score(logprobs, "abc") == pytest.approx(-11.5 / len(zlib.compress(b"abc")))
    assert min_k_score(logprobs, share=0.4) == pytest.approx(-4.0)
    assert min_k_score(logprobs, share=0.01) == -5.0
    standard = min_k_plus_plus_score(logprobs, [-2.0] * 5, [1.0, 1.5, 1.0, 2.0, 0.0], share=0.4)
    assert standard == pytest.approx((-2.0 - 0.5) / 2)


def test_area_is_the_chance_that_a_seen_text_scores_higher() -> None:
    assert area_under_curve([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert area_under_curve([1.0, 2.0], [3.0, 4.0]) == 0.0
    assert area_under_curve([1.0, 3.0], [2.0, 3.0]) == pytest.approx((0 + 0 + 1 + 0.5) / 4)


def test_privacy_leak_is_relative_to_the_retrained_model() -> None:
    assert privacy_leak(0.5, 0.5) == 0.0
    assert privacy_leak(0.0, 0.5) == -100.0
    assert privacy_leak(0.75, 0.5) == 50.0


def test_what_no_attack_could_be_made_of_is_refused() -> None:
    with pytest.raises(ValueError, match="none above 0"):
        loss_score([0.1])
    with pytest.raises(ValueError, match="at least one token"):
        min_k_score([])
    with pytest.raises(ValueError, match="share"):
        min_k_score([-1.0], share=0.0)
    with pytest.raises(ValueError, match="one mean and one deviation"):
        min_k_plus_plus_score([-1.0], [], [1.0])
    with pytest.raises(ValueError, match="none NaN"):
        area_under_curve([math.nan], [1.0])
    with pytest.raises(ValueError, match="none NaN"):
        area_under_curve([], [1.0])
    with pytest.raises(ValueError, match="retrained"):
        privacy_leak(0.5, 0.0)


def test_rouge_l_goes_by_words_in_order_and_their_stems() -> None:
    found = rouge_l("The author was writing novels in Paris", "the author writes a novel")
    # the, author, write, novel of 5 words in the truth and 7 in the answer
    assert found.recall == pytest.approx(4 / 5)
    assert found.f1 == pytest.approx(2 * (4 / 7) * (4 / 5) / (4 / 7 + 4 / 5))
    assert rouge_l("", "truth").recall == 0.0
    assert rouge_l("novel author", "author novel").recall == 0.5
