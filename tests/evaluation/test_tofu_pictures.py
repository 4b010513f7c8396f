"""The axis of forget quality, and the density of truth ratios: pure functions behind the pictures."""

from __future__ import annotations

import numpy as np
import pytest

from uld_serve.evaluation.tofu_pictures import LEAST_P, THRESHOLD, folded, smoothed, unfolded


def test_the_axis_is_linear_above_the_threshold_and_logarithmic_below() -> None:
    heights = folded(np.array([1.0, (1 + THRESHOLD) / 2, THRESHOLD, 1e-3, 1e-4, 1e-5]), least=1e-12)
    assert heights[:3] == pytest.approx([1.0, 0.5, 0.0])
    assert np.diff(heights[3:]) == pytest.approx([heights[4] - heights[3]] * 2)
    assert folded(np.array([1e-12]), least=1e-12) == pytest.approx([-1.0])


def test_the_axis_rises_everywhere_and_turns_back() -> None:
    p = np.concatenate([np.logspace(-25, -1.5, 60), np.linspace(0.04, 1, 60)])
    heights = folded(np.sort(p), least=1e-25)
    assert (np.diff(heights) > 0).all()
    assert unfolded(heights, least=1e-25) == pytest.approx(np.sort(p), rel=1e-9)


def test_a_p_of_zero_has_a_place() -> None:
    assert np.isfinite(folded(np.array([0.0, LEAST_P / 10]), least=1e-31)).all()


@pytest.mark.parametrize("values", [[0.0, 0.1, 0.3, 1.0], [0.5, 0.5, 0.5]], ids=["spread", "equal"])
def test_a_density_holds_all_of_the_samples(values: list[float]) -> None:
    at = np.linspace(-5, 6, 20001)
    density = smoothed(np.array(values), at)
    assert (density * (at[1] - at[0])).sum() == pytest.approx(1.0, abs=1e-3)
    assert at[density.argmax()] == pytest.approx(np.median(values), abs=0.2)
