"""TOFU's metrics (Maini et al. 2024, arXiv 2401.06121, section 2.2) as pure functions of per-sample numbers. Called by
eval_log and the evaluations. Knows no model and no file.

Two truth ratios are about. The paper's Eq. 1 averages probabilities of the wrong answers; the published code averages
their losses, which is the geometric mean of the probabilities. Figures of one never stand beside those of the other.

Legend: N samples, J wrong answers of each. A loss is a mean NLL a token, in nats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
TruthRatio = Literal["geometric", "arithmetic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What was measured on one section of TOFU."""

    loss_N: Array
    """Of the right answer."""
    paraphrased_loss_N: Array
    """Of the right answer in other words; where there is none, of the right answer."""
    perturbed_loss_NJ: Array
    """Of wrong answers in the same words."""
    rougeL_recall_N: Array
    """Of the greedy answer against the right one."""


def truth_ratios(samples: Samples, variant: TruthRatio) -> Array:
    """(N,): P(paraphrase) over the mean P of the wrong answers, each to the power of 1 / its length; large where the
    model knows. The paper's R (Eq. 1) is one over the arithmetic one."""
    if variant == "geometric":
        ratios: Array = np.exp(samples.perturbed_loss_NJ.mean(axis=-1) - samples.paraphrased_loss_N)
    else:
        ratios = np.exp(-samples.paraphrased_loss_N) / np.exp(-samples.perturbed_loss_NJ).mean(axis=-1)
    return ratios


def truth_ratio_of_kept(samples: Samples, variant: TruthRatio) -> float:
    """mean max(0, 1 - 1 / ratio): 1 where no wrong answer is believed."""
    return float(np.maximum(0.0, 1.0 - 1.0 / truth_ratios(samples, variant)).mean())


def truth_ratio_of_forgotten(samples: Samples, variant: TruthRatio) -> float:
    """mean min(ratio, 1 / ratio): 1 where right and wrong are believed alike."""
    ratios_N = truth_ratios(samples, variant)
    return float(np.minimum(ratios_N, 1.0 / ratios_N).mean())


def probability(samples: Samples) -> float:
    """mean P(answer) ** (1 / length)."""
    return float(np.exp(-samples.loss_N).mean())


def normalised_probability(samples: Samples) -> float:
    """The same over its sum with the wrong answers': a choice among them."""
    right_N = np.exp(-samples.loss_N)
    return float((right_N / (right_N + np.exp(-samples.perturbed_loss_NJ).sum(axis=-1))).mean())


def rouge(samples: Samples) -> float:
    return float(samples.rougeL_recall_N.mean())


def model_utility(
    *, retain: Samples, real_authors: Samples, world_facts: Samples, variant: TruthRatio
) -> float:
    """Harmonic mean of probability, ROUGE-L recall and truth ratio on what must stay; 0 if one of the nine is."""
    nine = [probability(retain), normalised_probability(real_authors), normalised_probability(world_facts)]
    for samples in (retain, real_authors, world_facts):
        nine += [rouge(samples), truth_ratio_of_kept(samples, variant)]
    return float(stats.hmean(nine))


@dataclass(frozen=True, slots=True)
class ForgetQuality:
    """Of a two-sample Kolmogorov-Smirnov test: could both models' truth ratios be of one distribution?"""

    p: float
    """1: they could not be more alike. It moves in steps that n sets: at 40 samples .990, .919, .766, .579, ..."""
    d: float
    """The largest gap between the two distribution functions."""
    n: int
    """Samples of the model that forgot."""


def forget_quality(unlearned: Samples, reference: Samples, variant: TruthRatio) -> ForgetQuality:
    """On the forget set, against a model that never saw it. Two-sided."""
    ours_N = truth_ratios(unlearned, variant)
    result = stats.ks_2samp(ours_N, truth_ratios(reference, variant))
    return ForgetQuality(float(result.pvalue), float(result.statistic), len(ours_N))
