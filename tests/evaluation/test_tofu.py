"""TOFU's metrics against arithmetic done by hand, and against what is published of real logs where these lie."""

from __future__ import annotations

import json
import os
from math import exp
from pathlib import Path

import numpy as np
import pytest

from uld_serve.evaluation import tofu
from uld_serve.evaluation.eval_log import read_log
from uld_serve.evaluation.tofu_report import TofuReport

LOGS = os.environ.get("ULD_SERVE_TOFU_LOGS")


def samples(
    loss: list[float],
    paraphrased: list[float],
    perturbed: list[list[float]],
    rouge: list[float] | None = None,
) -> tofu.Samples:
    return tofu.Samples(
        loss_N=np.array(loss),
        paraphrased_loss_N=np.array(paraphrased),
        perturbed_loss_NJ=np.array(perturbed),
        rougeL_recall_N=np.array(rouge or [1.0] * len(loss)),
    )


TWO = samples([0.1, 2.0], [1.0, 3.0], [[2.0, 4.0], [1.0, 2.0]], [0.5, 1.0])


def test_the_geometric_truth_ratio_averages_losses_and_the_arithmetic_one_probabilities() -> None:
    np.testing.assert_allclose(tofu.truth_ratios(TWO, "geometric"), [exp(2.0), exp(-1.5)])
    first = exp(-1.0) / ((exp(-2.0) + exp(-4.0)) / 2)
    second = exp(-3.0) / ((exp(-1.0) + exp(-2.0)) / 2)
    np.testing.assert_allclose(tofu.truth_ratios(TWO, "arithmetic"), [first, second])


def test_what_is_kept_counts_disbelief_in_wrong_answers_and_what_is_forgotten_indifference() -> None:
    assert tofu.truth_ratio_of_kept(TWO, "geometric") == pytest.approx((1 - exp(-2.0) + 0.0) / 2)
    assert tofu.truth_ratio_of_forgotten(TWO, "geometric") == pytest.approx((exp(-2.0) + exp(-1.5)) / 2)


def test_probability_alone_and_as_a_choice_among_the_wrong_answers() -> None:
    assert tofu.probability(TWO) == pytest.approx((exp(-0.1) + exp(-2.0)) / 2)
    first = exp(-0.1) / (exp(-0.1) + exp(-2.0) + exp(-4.0))
    second = exp(-2.0) / (exp(-2.0) + exp(-1.0) + exp(-2.0))
    assert tofu.normalised_probability(TWO) == pytest.approx((first + second) / 2)


def test_an_answer_of_probability_zero_counts_as_zero() -> None:
    gone = samples([np.inf, 0.0], [1.0, 1.0], [[1.0], [1.0]])
    assert tofu.probability(gone) == 0.5
    assert tofu.normalised_probability(gone) == pytest.approx(1.0 / (1.0 + exp(-1.0)) / 2)


def test_model_utility_is_the_harmonic_mean_of_nine() -> None:
    nine = [tofu.probability(TWO), tofu.normalised_probability(TWO), tofu.normalised_probability(TWO)]
    nine += 3 * [0.75, tofu.truth_ratio_of_kept(TWO, "geometric")]
    utility = tofu.model_utility(retain=TWO, real_authors=TWO, world_facts=TWO, variant="geometric")
    assert utility == pytest.approx(9 / sum(1 / figure for figure in nine))


def test_model_utility_is_zero_where_one_of_the_nine_is() -> None:
    silent = samples([0.1], [1.0], [[2.0]], [0.0])
    assert tofu.model_utility(retain=silent, real_authors=TWO, world_facts=TWO, variant="geometric") == 0.0


def test_forget_quality_compares_distributions_and_not_means() -> None:
    spread = samples([1.0] * 6, [0.0] * 6, [[value] for value in (-3.0, -2.0, -1.0, 1.0, 2.0, 3.0)])
    same = tofu.forget_quality(spread, spread, "geometric")
    assert (same.p, same.d, same.n) == (1.0, 0.0, 6)
    apart = samples([1.0] * 6, [0.0] * 6, [[value] for value in (10.0, 11.0, 12.0, 13.0, 14.0, 15.0)])
    quality = tofu.forget_quality(apart, spread, "geometric")
    # Of the 924 ways to share 12 values out, two keep the sides apart.
    assert (quality.p, quality.d) == (pytest.approx(2 / 924), 1.0)


def test_p_moves_in_the_steps_that_forty_samples_set() -> None:
    grid = np.arange(40.0)[:, None]
    reference = samples([1.0] * 40, [0.0] * 40, (grid / 100).tolist())
    found = []
    for shift in (4, 5, 6, 7):
        moved = samples([1.0] * 40, [0.0] * 40, ((grid + shift + 0.5) / 100).tolist())
        quality = tofu.forget_quality(moved, reference, "geometric")
        assert quality.d == pytest.approx((shift + 1) / 40)
        found.append(round(quality.p, 3))
    assert found == [0.919, 0.766, 0.579, 0.405]


@pytest.mark.skipif(LOGS is None, reason="ULD_SERVE_TOFU_LOGS names no folder of published logs")
def test_published_logs_give_the_published_figures() -> None:
    folder = Path(LOGS or "")
    expected = json.loads((folder / "expected.json").read_text())
    for name, figures in expected["logs"].items():
        log = read_log(folder / f"{name}.json")
        for variant in ("geometric", "arithmetic"):
            report = TofuReport.of(log, None, variant=variant)
            assert report.model_utility == pytest.approx(figures[f"model_utility_{variant}"], abs=1e-12)
            for section, values in report.sections.items():
                assert values.n == figures[section]["n"]
                assert values.truth_ratio == pytest.approx(
                    figures[section][f"truth_ratio_{variant}"], abs=1e-12
                )
                assert values.rougeL_recall == pytest.approx(figures[section]["rougeL_recall"], abs=1e-12)
    for pair, qualities in expected["forget_quality"].items():
        ours, reference = (read_log(folder / f"{name}.json").section("forget") for name in pair.split(" vs "))
        for variant, quality in qualities.items():
            found = tofu.forget_quality(ours, reference, variant)
            assert found.p == pytest.approx(quality["p"], rel=1e-12)
            assert found.d == pytest.approx(quality["D"], abs=1e-12)
