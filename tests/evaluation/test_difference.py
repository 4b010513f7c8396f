"""The log-probability difference attack on views that are known by hand."""

from __future__ import annotations

import pytest

from uld_serve.evaluation.attacks.difference import Ranked, View, difference_rank, ranked

BASE = View((1, 2, 3), (-0.5, -1.0, -3.0))


def test_the_token_that_forgetting_lowers_most_comes_first() -> None:
    forgetting = View((2, 3, 1), (-0.4, -2.0, -6.0))
    assert [difference_rank(BASE, forgetting, token) for token in (1, 2, 3)] == [1, 2, 3]
    assert BASE.rank(1) == 1
    assert forgetting.rank(1) == 3


def test_a_token_that_is_no_longer_shown_counts_as_the_least_likely_that_is() -> None:
    forgetting = View((2, 7, 8), (-0.4, -2.0, -2.5))
    # 1 fell by at least 2, 3 by at least -0.5, 2 rose by 0.6.
    assert [difference_rank(BASE, forgetting, token) for token in (1, 3, 2)] == [1, 2, 3]


def test_equal_falls_go_by_what_was_likelier_and_impossible_tokens_stay_numbers() -> None:
    same = View(BASE.ids_K, BASE.logprobs_K)
    assert [difference_rank(BASE, same, token) for token in (1, 2, 3)] == [1, 2, 3]
    filtered = View((2, 1, 3), (0.0, float("-inf"), float("-inf")))
    assert [difference_rank(BASE, filtered, token) for token in (1, 3, 2)] == [1, 2, 3]


def test_a_token_that_the_first_view_does_not_show_is_not_found() -> None:
    assert difference_rank(BASE, BASE, 9) is None
    assert BASE.rank(9) is None


def test_shares_count_what_is_not_found_as_missed() -> None:
    assert ranked([1, 5, 6, None]) == Ranked(4, 0.25, 0.5)
    with pytest.raises(ValueError, match="no token"):
        ranked([])
