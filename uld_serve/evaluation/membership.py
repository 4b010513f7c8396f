"""Attacks that tell texts a model has seen from texts it has not, by its log-probabilities. Called by the evaluations.
Knows no model.

Each score is larger for texts more likely seen. Log-probabilities are natural, one a token, given all before it.

Legend: L tokens of a text."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from math import inf

import numpy as np
from scipy import stats


def loss_score(logprobs_L: Sequence[float]) -> float:
    """Mean log-probability (Yeom et al. 2018, arXiv 1709.01604)."""
    return float(np.mean(_some(logprobs_L)))


def zlib_score(logprobs_L: Sequence[float], text: str) -> float:
    """Log-probability over the bytes of the text once compressed: dull texts are likely without having been seen
    (Carlini et al. 2021, arXiv 2012.07805, section 4.2)."""
    return float(np.sum(_some(logprobs_L))) / len(zlib.compress(text.encode()))


def min_k_score(logprobs_L: Sequence[float], *, share: float = 0.2) -> float:
    """Mean of the least likely share of the tokens, at least one (Min-K%, Shi et al. 2024, arXiv 2310.16789)."""
    return _mean_of_least(_some(logprobs_L), share)


def min_k_plus_plus_score(
    logprobs_L: Sequence[float],
    means_L: Sequence[float],
    deviations_L: Sequence[float],
    *,
    share: float = 0.2,
) -> float:
    """The same of standardised log-probabilities (Min-K%++, Zhang et al. 2024, arXiv 2404.02936, Eq. 3): means and
    standard deviations are of log p over the next token drawn from p. Where only one token can come, its deviation is
    0 and it counts as 0: it tells nothing."""
    if not len(logprobs_L) == len(means_L) == len(deviations_L):
        raise ValueError("one mean and one deviation a token")
    gap_L = np.asarray(_some(logprobs_L)) - np.asarray(means_L)
    deviation_L = np.asarray(deviations_L, dtype=np.float64)
    standard_L = np.divide(gap_L, deviation_L, out=np.zeros_like(gap_L), where=deviation_L > 0)
    return _mean_of_least(standard_L.tolist(), share)


def area_under_curve(seen: Sequence[float], unseen: Sequence[float]) -> float:
    """Probability that a seen text scores above an unseen one, ties by half: 0.5 is chance. Raises ValueError where a
    side has none, or a score is NaN."""
    if not seen or not unseen or np.isnan([*seen, *unseen]).any():
        raise ValueError(f"scores of both sides, none NaN: {len(seen)} seen, {len(unseen)} unseen")
    return float(stats.mannwhitneyu(seen, unseen).statistic) / (len(seen) * len(unseen))


def privacy_leak(auc: float, auc_retrained: float) -> float:
    """MUSE's PrivLeak, in per cent (Shi et al. 2024, arXiv 2407.06460, section 3.1): how far an attack's area on the
    forget set against held-out texts is from what it is on a model that never saw either. 0 is best; below, what was
    forgotten shows (under-unlearning); above, its absence does. Areas are of texts *not* seen, as there: one minus
    area_under_curve."""
    if not 0.0 < auc_retrained <= 1.0:
        raise ValueError(f"the retrained model's area must be in (0, 1], got {auc_retrained}")
    return 100.0 * (auc - auc_retrained) / auc_retrained


def _mean_of_least(values: Sequence[float], share: float) -> float:
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}")
    count = max(1, int(len(values) * share))
    return float(np.sort(np.asarray(values))[:count].mean())


def _some(logprobs_L: Sequence[float]) -> Sequence[float]:
    if not logprobs_L or any(not -inf <= value <= 0.0 for value in logprobs_L):
        raise ValueError("log-probabilities of at least one token, none above 0")
    return logprobs_L
