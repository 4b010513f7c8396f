"""Each objective against arithmetic done by hand on a vocabulary of four tokens."""

from __future__ import annotations

import math

import pytest
import torch

from uld_serve.training import objectives
from uld_serve.training.objectives import MarginWeights

WEIGHTS = MarginWeights(slack=1.0, kept_label=2.0, others_of_kept=1.0, others_of_forgotten=0.3)
ONE_TO_FOUR = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
UNLIKE = torch.tensor([0.6, 0.2, 0.15, 0.05]).log()
YES, NO = True, False


def margin_of(
    difference: list[list[float]],
    goal: list[list[float]],
    *,
    counts: list[list[bool]] | None = None,
    chosen: list[bool] | None = None,
    weights: MarginWeights = WEIGHTS,
) -> float:
    difference_NK = torch.tensor(difference)
    return objectives.margin(
        difference_NK,
        goal_NK=torch.tensor(goal),
        counts_NK=torch.tensor(counts) if counts else torch.ones_like(difference_NK, dtype=torch.bool),
        chosen_N=torch.tensor(chosen or [True] * len(difference)),
        weights=weights,
    ).item()


@pytest.mark.parametrize(
    ("difference", "goal", "expected"),
    [
        (4.0, 10.0, 6.0 - 0.5),  # far below the goal: linear
        (9.4, 10.0, 0.6**2 / 2),  # near it: quadratic
        (10.0, 10.0, 0.0),
        (13.0, 10.0, 3.0 - 0.5),  # beyond: the label has a ceiling
        (2.0, 0.0, 2 * (3.0 - 0.5)),  # kept, m = 1: twice smooth_l1(2 + 1)
        (-0.4, 0.0, 2 * 0.6**2 / 2),
        (-1.0, 0.0, 0.0),
        (-7.0, 0.0, 0.0),  # a kept label may fall as far as it likes
    ],
)
def test_margin_of_a_label(difference: float, goal: float, expected: float) -> None:
    # The other column is at rest (kept, far below -m), so that the label alone is seen.
    assert margin_of([[difference, -9.0]], [[goal, 0.0]]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("label", "label_goal", "weight"),
    [(10.0, 10.0, WEIGHTS.others_of_forgotten), (-9.0, 0.0, WEIGHTS.others_of_kept)],
)
@pytest.mark.parametrize(
    ("difference", "goal", "expected"),
    [
        (1.5, 0.0, 2.5 - 0.5),
        (-0.5, 0.0, 0.5**2 / 2),
        (-3.0, 0.0, 0.0),
        (5.0, 15.0, 10.0 - 0.5),
        (14.5, 15.0, 0.5**2 / 2),
        (40.0, 15.0, 0.0),  # at least s: no ceiling for the others
    ],
)
def test_margin_of_another_column(
    label: float, label_goal: float, weight: float, difference: float, goal: float, expected: float
) -> None:
    found = margin_of([[label, difference]], [[label_goal, goal]])
    assert found == pytest.approx(weight * expected, abs=1e-6)


def test_margin_means_the_other_columns_and_leaves_out_the_label_once_more() -> None:
    row, goal = [[10.0, 1.5, 2.5, 99.0]], [[10.0, 0.0, 0.0, 0.0]]
    two = 0.3 * ((2.5 - 0.5) + (3.5 - 0.5)) / 2
    assert margin_of(row, goal, counts=[[NO, YES, YES, NO]]) == pytest.approx(two)
    one = 0.3 * (2.5 - 0.5)
    assert margin_of(row, goal, counts=[[NO, YES, NO, NO]]) == pytest.approx(one)
    assert margin_of(row, goal, counts=[[NO, NO, NO, NO]]) == 0


def test_margin_means_the_chosen_tokens_only() -> None:
    rows, goals = [[4.0, -9.0], [9.0, -9.0], [2.0, -9.0]], [[10.0, 0.0], [10.0, 0.0], [0.0, 0.0]]
    forget, first, kept = (5.5 + 0.5) / 2, 5.5, 5.0
    assert margin_of(rows, goals, chosen=[YES, YES, NO]) == pytest.approx(forget)
    assert margin_of(rows, goals, chosen=[YES, NO, NO]) == pytest.approx(first)
    assert margin_of(rows, goals, chosen=[NO, NO, YES]) == pytest.approx(kept)
    assert margin_of(rows, goals, chosen=[NO, NO, NO]) == 0


def test_margin_takes_its_slack_and_weights_from_what_it_is_given() -> None:
    weights = MarginWeights(slack=3.0, kept_label=5.0, others_of_kept=7.0, others_of_forgotten=11.0)
    kept = 5 * (3.0 - 0.5) + 7 * (4.0 - 0.5)
    assert margin_of([[0.0, 1.0]], [[0.0, 0.0]], weights=weights) == pytest.approx(kept)
    forgotten = (2.0 - 0.5) + 11 * (4.0 - 0.5)
    assert margin_of([[0.0, 1.0]], [[2.0, 0.0]], weights=weights) == pytest.approx(forgotten)


@pytest.mark.parametrize("distance", [0.0, 1e4, -1e4])
def test_margin_has_a_bounded_gradient_and_one_at_a_equal_to_b(distance: float) -> None:
    difference_NK = torch.full((2, 3), distance, requires_grad=True)
    goal_NK = torch.tensor([[10.0, 10.0, 0.0], [0.0, 10.0, 0.0]])
    everything = torch.ones(2, 3, dtype=torch.bool)
    objectives.margin(
        difference_NK, goal_NK=goal_NK, counts_NK=everything, chosen_N=everything[:, 0], weights=WEIGHTS
    ).backward()
    # A mean over two tokens; the others of each share their weight between two columns.
    bound = torch.tensor([[1.0, 0.3 / 2, 0.3 / 2], [2.0, 1.0 / 2, 1.0 / 2]]) / 2
    gradient = difference_NK.grad
    assert gradient is not None
    if distance == 0:
        torch.testing.assert_close(gradient, bound * torch.tensor([[-1.0, -1, 1], [1, -1, 1]]))
    assert (gradient.abs() <= bound + 1e-7).all()


def test_uld_is_cross_entropy_on_forget_and_distance_from_uniform_on_retain() -> None:
    terms = objectives.uld(
        torch.stack([ONE_TO_FOUR, ONE_TO_FOUR + 7, ONE_TO_FOUR]),
        torch.tensor([2, 0, 3]),
        is_forget_N=torch.tensor([YES, YES, NO]),
        beta=6.5,
    )
    assert terms.forget.item() == pytest.approx((-math.log(0.3) - math.log(0.1)) / 2)
    uniform = -(math.log(0.1) + math.log(0.2) + math.log(0.3) + math.log(0.4)) / 4 - math.log(4)
    assert terms.retain.item() == pytest.approx(6.5 * uniform, rel=1e-5)
    assert terms.total.item() == pytest.approx(terms.forget.item() + terms.retain.item())


def test_uld_asks_nothing_of_an_assistant_that_knows_nothing() -> None:
    terms = objectives.uld(
        torch.full((2, 4), 3.0), torch.tensor([1, 2]), is_forget_N=torch.tensor([NO, NO]), beta=6.5
    )
    assert terms.retain.item() == pytest.approx(0, abs=1e-6)
    assert terms.forget.item() == 0


def test_rkld_is_cross_entropy_on_forget_and_divergence_from_the_target_on_retain() -> None:
    terms = objectives.rkld(
        torch.stack([ONE_TO_FOUR, ONE_TO_FOUR]),
        torch.stack([UNLIKE, UNLIKE]),
        torch.tensor([1, 1]),
        is_forget_N=torch.tensor([YES, NO]),
        weight=2.0,
    )
    assert terms.forget.item() == pytest.approx(-math.log(0.2))
    divergence = (
        0.6 * math.log(0.6 / 0.1)
        + 0.2 * math.log(0.2 / 0.2)
        + 0.15 * math.log(0.15 / 0.3)
        + 0.05 * math.log(0.05 / 0.4)
    )
    assert terms.retain.item() == pytest.approx(2 * divergence)


def test_rkld_asks_nothing_of_retention_where_the_assistant_is_the_target() -> None:
    logits = torch.stack([UNLIKE, ONE_TO_FOUR])
    terms = objectives.rkld(
        logits + 5, logits, torch.tensor([1, 1]), is_forget_N=torch.tensor([NO, NO]), weight=2.0
    )
    assert terms.retain.item() == pytest.approx(0, abs=1e-6)
