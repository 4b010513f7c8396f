"""Which setting is chosen, where a sweep bends, and which settings a profile can have: pure functions of numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_profile import PROFILE

from uld_serve.errors import DataError
from uld_serve.evaluation.choice import Limits, choose, farthest_above_chord, forgets_most, knee
from uld_serve.evaluation.settings import SHARES, grid, told, without_fused_filter
from uld_serve.evaluation.sweep import Point, Side
from uld_serve.evaluation.sweep_pictures import curves
from uld_serve.profiles.profile import FilterSpec, Profile, RuleSpec

LIMITS = Limits(max_rise=0.05, max_cut=0.01)


def point(
    forget: float,
    retain: float,
    *,
    strength: float = 1.0,
    tau: float = 0.02,
    cut: float = 0.0,
    gone: float = 0.0,
) -> Point:
    rule = RuleSpec(kind="relu_difference", strength=strength, filter=FilterSpec(mode="fused", tau=tau))
    return Point(
        rule=rule,
        forget=Side(nll=1 + forget, rise=forget, cut=gone, agreement=0.0),
        retain=Side(nll=1 + retain, rise=retain, cut=cut, agreement=1.0),
    )


def test_chosen_is_what_forgets_most_within_the_limit() -> None:
    points = [point(1.0, 0.01), point(2.0, 0.05), point(3.0, 0.051)]
    assert choose(points, LIMITS) is points[1]
    assert forgets_most(points) is points[2]


def test_a_filter_that_cuts_what_must_stay_is_not_chosen() -> None:
    points = [point(2.0, 0.01, cut=0.02), point(1.0, 0.01, cut=0.01)]
    assert choose(points, LIMITS) is points[1]


def test_of_equal_forgetting_the_larger_cut_of_forget_tokens_wins() -> None:
    points = [point(2.0, 0.01, gone=0.3), point(2.0, 0.01, gone=0.6), point(2.0, 0.01, gone=0.4)]
    assert choose(points, LIMITS) is points[1]


@pytest.mark.parametrize(
    "points",
    [[], [point(3.0, 0.2)], [point(-0.5, 0.0)], [point(0.0, 0.0)]],
    ids=["none", "loses", "helps", "idle"],
)
def test_nothing_is_chosen_where_nothing_forgets_within_the_limit(points: list[Point]) -> None:
    assert choose(points, LIMITS) is None


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([0, 1, 2, 3, 4], [0, 8, 9, 9.5, 10], 1),
        ([0, 1, 2, 10], [0, 1, 9, 10], 2),
        ([0, 1, 2], [0, 1, 2], None),  # straight
        ([0, 1, 2], [0, 0.2, 2], None),  # bends the other way
        ([0, 1], [0, 1], None),
        ([0, 1, 0], [0, 2, 1], None),  # nothing is lost at the end
        ([0, 1, 2], [0, 1, -1], None),
    ],
)
def test_knee_is_the_point_farthest_above_the_chord(
    x: list[float], y: list[float], expected: int | None
) -> None:
    assert farthest_above_chord(x, y) == expected


def test_scaling_an_axis_moves_no_knee() -> None:
    x, y = [0.0, 0.01, 0.03, 0.2, 1.0], [0.0, 1.0, 3.0, 3.5, 4.0]
    assert farthest_above_chord(x, y) == 2
    assert farthest_above_chord([1000 * value for value in x], [value / 7 for value in y]) == 2


def test_knee_of_a_sweep_counts_the_base_as_its_first_point() -> None:
    points = [point(3.0, 0.02, strength=1), point(4.0, 1.0, strength=2)]
    assert knee(points) is points[0]
    assert knee(points[:1]) is None


def test_a_curve_is_in_order_of_strength_with_one_point_for_all_taus_of_a_fused_filter() -> None:
    points = [point(2, 0, strength=2, tau=0.01), point(1, 0, strength=1), point(2, 0, strength=2, tau=0.05)]
    assert [[one.rule.strength for one in curve] for curve in curves(points).values()] == [[1, 2]]


def test_grid_begins_with_what_the_profile_has_and_repeats_nothing() -> None:
    rules = grid(PROFILE)
    assert rules[0] == PROFILE.rule
    assert len(rules) == len({rule.model_dump_json() for rule in rules})
    assert {rule.strength for rule in rules} == {2.0 * share for share in SHARES}
    assert {rule.filter.tau for rule in rules} == {0.01, 0.02, 0.05}
    assert {(rule.kind, rule.filter.mode) for rule in rules} == {("relu_difference", "fused")}


def test_grid_is_of_the_values_given() -> None:
    rules = grid(PROFILE, rules=["relu_difference:none", "subtract"], strengths=[1, 3], taus=[0.1])
    assert [told(rule) for rule in rules[1:]] == [
        "relu_difference x 1, no filter",
        "relu_difference x 3, no filter",
        "subtract x 1, plausibility 0.1",
        "subtract x 3, plausibility 0.1",
    ]
    assert rules[-1].protect


def test_grid_takes_dead_zones_where_the_rule_has_one() -> None:
    rules = grid(
        PROFILE, rules=["relu_difference:none", "subtract"], strengths=[3], taus=[0.1], dead_zones=[0, 4]
    )
    assert [told(rule) for rule in rules[1:]] == [
        "relu_difference x 3, no filter",
        "relu_difference beyond 4 x 3, no filter",
        "subtract x 3, plausibility 0.1",
    ]
    beside = point(1, 0)
    drawn = curves([replace(beside, rule=rule) for rule in rules[1:]])
    assert list(drawn) == [
        "relu_difference, none",
        "relu_difference beyond 4, none",
        "subtract, plausibility 0.1",
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rules": ["pair_linear"]}, "needs 2 streams"),
        ({"rules": ["pair_rank"]}, "no rule with a strength"),
        ({"rules": ["product"]}, "no rule with a strength"),
        ({"rules": ["subtract:soft"]}, "is no filter"),
        ({"rules": ["subtract:none"], "taus": [0.1]}, "would change nothing"),
        ({"strengths": [101]}, "no profile may have"),
        ({"dead_zones": [-1]}, "no profile may have"),
        ({"rules": ["subtract"], "dead_zones": [4]}, "only relu_difference has one"),
        ({"taus": [1.5]}, "no profile may have"),
        ({"rules": ["subtract:official"], "taus": [0.01]}, "no profile may have"),  # 3 of 300 tokens kept
    ],
)
def test_what_no_profile_may_have_is_refused(options: dict[str, list[float]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        grid(PROFILE, **options)  # type: ignore[arg-type]


def test_a_profile_without_a_strength_has_nothing_to_choose() -> None:
    fields = {
        **PROFILE.model_dump(),
        "streams": (),
        "target_adapter": "adapter",
        "rule": {"kind": "identity"},
    }
    with pytest.raises(DataError, match="no strength"):
        grid(Profile.model_validate(fields))


def test_without_its_fused_filter_a_rule_is_else_the_same() -> None:
    rule = RuleSpec(kind="relu_difference", strength=3.0, protect=True)
    assert without_fused_filter(rule) == rule.model_copy(update={"filter": FilterSpec(mode="none")})
    kept = RuleSpec(kind="subtract", strength=3.0)
    assert without_fused_filter(kept) is kept
