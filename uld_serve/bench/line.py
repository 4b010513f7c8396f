"""The straight line through points by least squares, and how straight they lie. Used by growth. Knows no unit."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """y = intercept + slope * x. `r_squared` 1 is a perfect fit; `worst` is the largest distance of a point from the
    line, over the largest y."""

    slope: float
    intercept: float
    r_squared: float
    worst: float


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """Of three points or more with different x."""
    slope, intercept = statistics.linear_regression(x, y)
    residuals = [b - intercept - slope * a for a, b in zip(x, y, strict=True)]
    mean = statistics.fmean(y)
    total = sum((b - mean) ** 2 for b in y)
    unexplained = sum(one**2 for one in residuals)
    # y that never changes lies on a flat line.
    r_squared = 1.0 - unexplained / total if total else 1.0
    return Line(slope, intercept, r_squared, max(map(abs, residuals)) / max(map(abs, y)))
