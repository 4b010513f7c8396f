"""The definitions that verify reports."""

from __future__ import annotations

import math

import pytest

from uld_serve.evaluation import metrics


def test_nll_is_a_mean_over_tokens_not_over_answers() -> None:
    assert metrics.mean_nll([[-1.0], [-3.0, -5.0]]) == pytest.approx(3.0)


def test_nll_of_an_impossible_token_is_infinite_and_of_nothing_undefined() -> None:
    assert metrics.mean_nll([[-1.0, -math.inf]]) == math.inf
    assert math.isnan(metrics.mean_nll([]))


def test_agreement_counts_positions() -> None:
    assert metrics.agreement([[1, 2, 3], [4]], [[1, 9, 3], [4]]) == pytest.approx(3 / 4)


def test_agreement_refuses_answers_of_different_length() -> None:
    with pytest.raises(ValueError, match="longer"):
        metrics.agreement([[1]], [[1, 2]])


@pytest.mark.parametrize(
    ("answer", "is_named"),
    [
        ("It was Ron.", True),
        ("it was RON!", True),
        ("Ronald and the iron", False),
        ("He met Wile E. at noon", True),
        ("the Sorting  Hat", False),
        ("", False),
    ],
)
def test_recall_looks_for_whole_words_in_any_case(answer: str, is_named: bool) -> None:
    assert metrics.recall([answer], ["Ron", "Wile E.", "Sorting Hat"]) == float(is_named)


def test_recall_is_a_share_of_answers_and_keywords_are_not_patterns() -> None:
    assert metrics.recall(["Ron", "Ron Ron", "x", "y"], ["Ron"]) == 0.5
    assert metrics.recall(["anything"], [".*"]) == 0.0
    assert metrics.recall(["anything"], []) == 0.0


def test_relative_fall() -> None:
    assert metrics.relative_fall(0.5, 0.1) == pytest.approx(0.8)
    assert metrics.relative_fall(0.5, 0.75) == pytest.approx(-0.5)
    assert metrics.relative_fall(0.0, 0.0) is None


def test_perplexity_of_fair_coins_is_two() -> None:
    assert metrics.perplexity([[math.log(0.5)] * 7]) == pytest.approx(2.0)


def test_distinct_tells_a_loop_from_a_text() -> None:
    assert metrics.distinct([[1, 2, 3, 4]]) == 1.0
    assert metrics.distinct([[1, 2] * 50]) == pytest.approx(2 / 99)
    assert metrics.distinct([[1, 2, 3], [7]]) == 1.0
