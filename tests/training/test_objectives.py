"""Each objective against arithmetic done by hand on a vocabulary of four tokens."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import settings_of

from uld_serve.training.examples import Kind
from uld_serve.training.methods.catalog import METHODS
from uld_serve.training.methods.margin import MarginWeights, margin
from uld_serve.training.methods.method import Parts, Tokens

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
    difference_NC = torch.tensor(difference)
    return margin(
        difference_NC,
        goal_NC=torch.tensor(goal),
        counts_NC=torch.tensor(counts) if counts else torch.ones_like(difference_NC, dtype=torch.bool),
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
    difference_NC = torch.full((2, 3), distance, requires_grad=True)
    goal_NC = torch.tensor([[10.0, 10.0, 0.0], [0.0, 10.0, 0.0]])
    everything = torch.ones(2, 3, dtype=torch.bool)
    margin(
        difference_NC, goal_NC=goal_NC, counts_NC=everything, chosen_N=everything[:, 0], weights=WEIGHTS
    ).backward()
    # A mean over two tokens; the others of each share their weight between two columns.
    bound = torch.tensor([[1.0, 0.3 / 2, 0.3 / 2], [2.0, 1.0 / 2, 1.0 / 2]]) / 2
    gradient = difference_NC.grad
    assert gradient is not None
    if distance == 0:
        torch.testing.assert_close(gradient, bound * torch.tensor([[-1.0, -1, 1], [1, -1, 1]]))
    assert (gradient.abs() <= bound + 1e-7).all()


def parts_of(
    method: str,
    own: list[torch.Tensor],
    *,
    labels: list[int],
    kinds: list[Kind],
    target: list[torch.Tensor] | None = None,
    teacher: list[torch.Tensor] | None = None,
    examples: list[int] | None = None,
    named: tuple[int, ...] = (),
    lesson: int = -1,
    progress: float = 1.0,
    **changes: object,
) -> dict[str, float]:
    """The parts of a method's loss on tokens whose logits are given: hidden states are logits, the head is nothing."""
    settings = settings_of(method, **changes)
    own_NV = torch.stack(own)
    nothing_NC = torch.zeros(len(own), 0)
    is_named_V = torch.zeros(own_NV.shape[1], dtype=torch.bool)
    is_named_V[list(named)] = True
    tokens = Tokens(
        labels_N=torch.tensor(labels),
        kind_N=torch.tensor([int(kind) for kind in kinds]),
        example_N=torch.tensor(examples or list(range(len(own)))),
        num_examples=max(examples or [len(own) - 1]) + 1,
        goals_N=torch.zeros(len(own)),
        columns_NC=nothing_NC.long(),
        target_logits_NC=nothing_NC,
        hidden_ND=own_NV,
        final_ND=torch.stack(target or own),
        teacher_ND=None if teacher is None else torch.stack(teacher),
        head=lambda hidden_ND: hidden_ND,
        head_weight_WD=nothing_NC,
        is_named_V=is_named_V if named else None,
        progress=progress,
    )
    parts: Parts = METHODS[method].lessons(settings)[lesson].objective(tokens, settings)
    return {name: value.item() for name, value in parts.items()}


FORGET, RETAIN, DETOUR = Kind.FORGET, Kind.RETAIN, Kind.DETOUR


def divergence(p: list[float], q: list[float]) -> float:
    return sum(one * math.log(one / other) for one, other in zip(p, q, strict=True))


P_ONE, P_UNLIKE = [0.1, 0.2, 0.3, 0.4], [0.6, 0.2, 0.15, 0.05]


def test_uld_is_cross_entropy_on_forget_and_distance_from_uniform_on_the_rest() -> None:
    found = parts_of(
        "uld",
        [ONE_TO_FOUR, ONE_TO_FOUR + 7, ONE_TO_FOUR, ONE_TO_FOUR],
        labels=[2, 0, 3, 1],
        kinds=[FORGET, FORGET, RETAIN, DETOUR],
        retain_weight=6.5,
    )
    assert found["forget"] == pytest.approx((-math.log(0.3) - math.log(0.1)) / 2)
    uniform = -sum(math.log(p) for p in P_ONE) / 4 - math.log(4)
    assert found["retain"] == pytest.approx(6.5 * uniform, rel=1e-5)
    assert found["loss"] == pytest.approx(found["forget"] + found["retain"])


def test_uld_scales_its_logits_and_raises_beta_over_the_first_part_of_a_run() -> None:
    weights = [p**0.5 for p in P_ONE]
    halved = [one / sum(weights) for one in weights]
    found = parts_of(
        "uld", [ONE_TO_FOUR, ONE_TO_FOUR], labels=[2, 3], kinds=[FORGET, RETAIN], output_scale=0.5, retain_ramp=0.4,
        retain_weight=6.5, progress=0.1,
    )  # fmt: skip
    assert found["forget"] == pytest.approx(-math.log(halved[2]), rel=1e-5)
    uniform = -sum(math.log(p) for p in halved) / 4 - math.log(4)
    assert found["retain"] == pytest.approx(6.5 / 4 * uniform, rel=1e-5)
    for progress in (0.4, 1.0):
        later = parts_of(
            "uld",
            [ONE_TO_FOUR],
            labels=[3],
            kinds=[RETAIN],
            retain_ramp=0.4,
            retain_weight=6.5,
            progress=progress,
        )
        whole = parts_of("uld", [ONE_TO_FOUR], labels=[3], kinds=[RETAIN], retain_weight=6.5)
        assert later["retain"] == whole["retain"] > 0


def test_uld_asks_nothing_of_an_assistant_that_knows_nothing() -> None:
    found = parts_of("uld", [torch.full((4,), 3.0)] * 2, labels=[1, 2], kinds=[RETAIN, RETAIN])
    assert found["retain"] == pytest.approx(0, abs=1e-6)
    assert found["forget"] == 0


@pytest.mark.parametrize("method", ["rkld", "rkld-distill"])
def test_strengthening_is_cross_entropy_on_forget_and_divergence_from_the_target_on_the_rest(
    method: str,
) -> None:
    found = parts_of(
        method,
        [ONE_TO_FOUR, ONE_TO_FOUR],
        target=[UNLIKE, UNLIKE],
        labels=[1, 1],
        kinds=[FORGET, RETAIN],
        retain_weight=2.0,
        lesson=0,
    )
    assert found["forget"] == pytest.approx(-math.log(0.2))
    assert found["retain"] == pytest.approx(2 * divergence(P_UNLIKE, P_ONE), rel=1e-5)


@pytest.mark.parametrize("method", ["rkld", "rkld-distill", "undial", "offset", "npo", "ga"])
def test_nothing_is_asked_of_retention_where_what_is_trained_says_what_the_target_says(method: str) -> None:
    found = parts_of(
        method, [UNLIKE + 5, ONE_TO_FOUR + 5], target=[UNLIKE, ONE_TO_FOUR], teacher=[UNLIKE, ONE_TO_FOUR],
        labels=[1, 1], kinds=[RETAIN, RETAIN],
    )  # fmt: skip
    assert found["retain"] == pytest.approx(0, abs=1e-6)
    assert found["forget"] == 0


@pytest.mark.parametrize(("direction", "order"), [("reverse", 1), ("forward", -1)])
def test_the_distilled_student_comes_to_the_teachers_scores(direction: str, order: int) -> None:
    """b = log P_ONE, a = b + (3, 0, -1, 0), so the teacher is b - 2 (3, 0, 0, 0)."""
    strengthened = ONE_TO_FOUR + torch.tensor([3.0, 0.0, -1.0, 0.0])
    weights = [0.1 * math.exp(-6), 0.2, 0.3, 0.4]
    teacher = [one / sum(weights) for one in weights]
    found = parts_of(
        "rkld-distill", [UNLIKE], target=[ONE_TO_FOUR], teacher=[strengthened], labels=[0], kinds=[FORGET],
        teacher_strength=2.0, direction=direction,
    )  # fmt: skip
    assert found["forget"] == pytest.approx(divergence(*(P_UNLIKE, teacher)[::order]), rel=1e-4)
    assert found["retain"] == 0


def test_undial_distils_the_targets_logits_with_the_true_tokens_lowered() -> None:
    weights = [0.1, 0.2, 0.3, 0.4 * math.exp(-3)]
    adjusted = [one / sum(weights) for one in weights]
    first = -sum(p * math.log(q) for p, q in zip(adjusted, P_UNLIKE, strict=True))
    found = parts_of("undial", [UNLIKE], target=[ONE_TO_FOUR], labels=[3], kinds=[FORGET], adjust=3.0)
    assert found["forget"] == pytest.approx(first, rel=1e-5)
    weights = [0.1 * math.exp(-3), 0.2, 0.3, 0.4]
    second = -sum(p / sum(weights) * math.log(q) for p, q in zip(weights, P_UNLIKE, strict=True))
    focused = parts_of(
        "undial", [UNLIKE, UNLIKE], target=[ONE_TO_FOUR, ONE_TO_FOUR], labels=[3, 0], kinds=[FORGET, FORGET],
        adjust=3.0, focus_weight=4.0, named=(3,),
    )  # fmt: skip
    assert focused["forget"] == pytest.approx((4 * first + second) / 5, rel=1e-5)


@pytest.mark.parametrize(
    ("term", "expected"), [("kl", divergence(P_UNLIKE, P_ONE)), ("nll", -math.log(0.3)), ("none", 0.0)]
)
@pytest.mark.parametrize("method", ["undial", "ga", "npo"])
def test_the_retain_term_is_what_was_asked_for(method: str, term: str, expected: float) -> None:
    found = parts_of(
        method, [ONE_TO_FOUR, UNLIKE], target=[UNLIKE, UNLIKE], labels=[2, 0], kinds=[RETAIN, FORGET],
        retain_term=term, retain_weight=3.0,
    )  # fmt: skip
    assert found["retain"] == pytest.approx(3 * expected, rel=1e-5)
    assert found["loss"] == pytest.approx(found["forget"] + found["retain"])


@pytest.mark.parametrize("method", ["undial", "ga", "npo", "offset"])
def test_wrong_answers_are_kept_as_they_are_and_never_learnt(method: str) -> None:
    tokens = {
        "target": [UNLIKE, UNLIKE],
        "teacher": [UNLIKE, UNLIKE],
        "labels": [2, 3],
        "kinds": [RETAIN, DETOUR],
    }
    given = {"retain_weight": 1.0, "strength": 1.0, "retain_term": "nll", **tokens}
    found, other = (parts_of(method, [ONE_TO_FOUR, wrong], **given) for wrong in (ONE_TO_FOUR, UNLIKE))  # type: ignore[arg-type]
    assert found["retain"] == other["retain"] > 0
    given["retain_term"] = "kl"
    found, other = (parts_of(method, [ONE_TO_FOUR, wrong], **given) for wrong in (ONE_TO_FOUR, UNLIKE))  # type: ignore[arg-type]
    assert found["retain"] > other["retain"]


def test_gradient_ascent_goes_up_where_training_goes_down() -> None:
    found = parts_of("ga", [ONE_TO_FOUR, UNLIKE], labels=[2, 0], kinds=[FORGET, FORGET])
    assert found["forget"] == pytest.approx((math.log(0.3) + math.log(0.6)) / 2)


def test_npo_compares_whole_answers_with_the_target() -> None:
    """Two answers, of two tokens and of one."""
    found = parts_of(
        "npo", [ONE_TO_FOUR, ONE_TO_FOUR, UNLIKE], target=[UNLIKE, UNLIKE, ONE_TO_FOUR], labels=[0, 1, 0],
        kinds=[FORGET] * 3, examples=[0, 0, 1], npo_beta=0.5,
    )  # fmt: skip

    def loss(ratio: float) -> float:
        return 2 / 0.5 * math.log(1 + math.exp(0.5 * ratio))

    first, second = math.log(0.1 / 0.6) + math.log(0.2 / 0.2), math.log(0.6 / 0.1)
    assert found["forget"] == pytest.approx((loss(first) + loss(second)) / 2, rel=1e-5)


def test_npo_leaves_kept_answers_out() -> None:
    alone = parts_of("npo", [ONE_TO_FOUR], target=[UNLIKE], labels=[0], kinds=[FORGET])
    beside = parts_of(
        "npo", [UNLIKE, ONE_TO_FOUR], target=[ONE_TO_FOUR, UNLIKE], labels=[3, 0], kinds=[RETAIN, FORGET]
    )
    assert beside["forget"] == pytest.approx(alone["forget"], rel=1e-6)
    assert alone["retain"] == 0


def test_a_divergence_pair_is_tuned_on_one_side_each() -> None:
    rows = {"labels": [2, 0, 1], "kinds": [FORGET, RETAIN, DETOUR]}
    logits = [ONE_TO_FOUR, UNLIKE, UNLIKE]
    forget = parts_of("divergence", logits, lesson=0, **rows)  # type: ignore[arg-type]
    retain = parts_of("divergence", logits, lesson=1, **rows)  # type: ignore[arg-type]
    assert forget["loss"] == forget["forget"] == pytest.approx(-math.log(0.3))
    assert retain["loss"] == retain["retain"] == pytest.approx((-math.log(0.6) - math.log(0.2)) / 2)


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_offset_learns_through_the_sum(strength: float) -> None:
    """b + alpha (log q - log p) with q = P_UNLIKE, p = (.25, .25, .25, .25)."""
    weights = [b * (4 * q) ** strength for b, q in zip(P_ONE, P_UNLIKE, strict=True)]
    fused = [one / sum(weights) for one in weights]
    found = parts_of(
        "offset", [UNLIKE + 3, UNLIKE], target=[ONE_TO_FOUR, ONE_TO_FOUR], teacher=[torch.zeros(4)] * 2,
        labels=[0, 0], kinds=[FORGET, RETAIN], strength=strength, npo_beta=0.5, retain_weight=2.0,
    )  # fmt: skip
    ratio = math.log(fused[0] / 0.1)
    assert found["forget"] == pytest.approx(4 * math.log(1 + math.exp(0.5 * ratio)), rel=1e-4)
    assert found["retain"] == pytest.approx(2 * divergence(P_ONE, fused), rel=1e-4)
