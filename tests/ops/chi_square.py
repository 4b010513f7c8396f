"""Whether counts fit a distribution: Pearson's chi-square with small bins pooled. Used by the frequency tests of both
samplers."""

from __future__ import annotations

from math import sqrt

import torch

SMALLEST_EXPECTED = 5.0
"""Bins below it are pooled, as the approximation wants."""
# Quantile 99.9 % of the standard normal distribution: of a thousand right samplers one would fail, and seeds are fixed.
_NORMAL_QUANTILE = 3.0902


def excess(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The statistic over its limit: above 1 the counts do not fit. Infinite if something impossible was drawn."""
    counts, expected = counts.double().flatten(), probabilities.double().flatten() * counts.sum()
    if (counts[expected == 0.0] > 0.0).any():
        return float("inf")
    is_large = expected >= SMALLEST_EXPECTED
    counts = torch.cat([counts[is_large], counts[~is_large].sum().view(1)])
    expected = torch.cat([expected[is_large], expected[~is_large].sum().view(1)])
    counts, expected = counts[expected > 0.0], expected[expected > 0.0]
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return statistic / _limit(expected.shape[0] - 1)


def _limit(degrees: int) -> float:
    """Wilson and Hilferty's quantile of chi-square."""
    assert degrees > 0, "one bin fits anything"
    return float(degrees * (1 - 2 / (9 * degrees) + _NORMAL_QUANTILE * sqrt(2 / (9 * degrees))) ** 3)
