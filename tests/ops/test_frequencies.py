"""The torch sampler draws what it should draw: every rule, filter and truncation against the exact distribution, and
independence of neighbouring positions and of seeds. The Triton one: device/test_frequencies_triton.py.

Draws of one kind are rows of few calls, at positions of their own. 10^5 of each kind take minutes, in `make test-slow`;
the fast suite draws as many as seconds allow."""

from __future__ import annotations

from dataclasses import replace

import chi_square
import dense_oracle
import pytest
import torch
from uld_kernels import SampleRow, Term, fused_sample, rules

VOCAB = 300
ALL, MANY, SOME, FEW = 100_000, 10_000, 2_000, 500
ROWS_A_CALL = 4000
PROTECTED = torch.tensor([0, 299])
PLAUSIBLE = {"filter_mode": rules.PLAUSIBILITY, "tau": 0.01, "min_keep": 40}
FUSED = {"filter_mode": rules.FUSED, "tau": 0.02}
SUBTRACT = Term(rules.SUBTRACT, 0.75, 1, row_a=1, protect=True, **PLAUSIBLE)
RELU = Term(rules.RELU_DIFFERENCE, 2.0, 2, row_a=2, **FUSED)
PAIR = Term(rules.PAIR_LINEAR, 0.6, 3, row_q=1, row_p=2, **FUSED)
RANK = Term(rules.PAIR_RANK, 1.0, 4, row_q=1, row_p=2, rank_k=60)
OFFICIAL = Term(rules.SUBTRACT, 0.8, 5, row_a=2, filter_mode=rules.OFFICIAL, tau=0.1)
LINEAR_ALL = replace(PAIR, filter_mode=rules.NO_FILTER, digest=6)
RELU_ALL = replace(RELU, filter_mode=rules.NO_FILTER, digest=7)

DRAW = SampleRow(0, seed=77, is_measured=False)
HISTORY = torch.arange(0, VOCAB, 3)
# Those of which the fast suite draws MANY, and the others.
QUICK = {
    "relu_difference": replace(DRAW, terms=(RELU,)),
    "relu_difference top-p": replace(DRAW, terms=(RELU,), top_p=0.9, temperature=1.3),
}
OTHERS = {
    "warm": replace(DRAW, temperature=1.7),
    "free, measured": replace(DRAW, is_measured=True),
    "relu_difference, measured": replace(DRAW, terms=(RELU,), is_measured=True),
    "relu_difference, no filter": replace(DRAW, terms=(RELU_ALL,)),
    "subtract, plausibility, protect": replace(DRAW, terms=(SUBTRACT,)),
    "subtract, official": replace(DRAW, terms=(OFFICIAL,)),
    "pair_linear, fused": replace(DRAW, terms=(PAIR,)),
    "pair_linear, no filter": replace(DRAW, terms=(LINEAR_ALL,)),
    "pair_rank": replace(DRAW, terms=(RANK,)),
    "two composed": replace(DRAW, terms=(SUBTRACT, RELU)),
    "four summed": replace(DRAW, terms=(SUBTRACT, RELU, PAIR, RANK), compose=rules.COMPOSE_SUM),
    "top-k": replace(DRAW, top_k=20),
    "top-p": replace(DRAW, top_p=0.8),
    "min-p": replace(DRAW, min_p=0.05),
    "all truncations, subtract": replace(
        DRAW, terms=(OFFICIAL,), top_k=25, top_p=0.95, min_p=0.02, temperature=0.8
    ),
    "penalties": replace(
        DRAW,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        output_ids=HISTORY,
        prompt_ids=HISTORY + 1,
    ),
    "bans and bias": replace(
        DRAW, banned_ids=HISTORY, logit_bias=(torch.tensor([1, 5, 6]), torch.tensor([3.0, -2.0, 1.0]))
    ),
    "grammar": replace(DRAW, allowed_mask=torch.arange(VOCAB) % 2 == 0),
}  # fmt: skip
# They read the whole vocabulary more than once: 1 to 3.5 ms a row.
SLOWEST = ("relu_difference, no filter", "pair_linear, no filter", "pair_rank", "four summed")


def logits() -> torch.Tensor:
    return torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(13)) * 1.5


def drawn(rows: list[SampleRow]) -> torch.Tensor:
    found = []
    for start in range(0, len(rows), ROWS_A_CALL):
        part = rows[start : start + ROWS_A_CALL]
        output = fused_sample(logits(), part, vocab_size=VOCAB, protected_ids=PROTECTED)
        assert (output.status_B == rules.OK).all()
        found.append(output.token_ids_B)
    return torch.cat(found)


def tokens_of(row: SampleRow, num_draws: int) -> torch.Tensor:
    """At neighbouring positions of one seed."""
    return drawn([replace(row, position=position) for position in range(num_draws)])


@pytest.fixture(scope="module")
def free() -> torch.Tensor:
    """Draws of one seed without rule or filter."""
    return tokens_of(DRAW, 2 * MANY)


def exact(row: SampleRow) -> torch.Tensor:
    return dense_oracle.sampling_scores(logits(), row, PROTECTED).softmax(-1)


def excess(row: SampleRow, num_draws: int) -> float:
    return chi_square.excess(torch.bincount(tokens_of(row, num_draws), minlength=VOCAB), exact(row))


def test_frequencies_without_rule_and_filter_are_exact(free: torch.Tensor) -> None:
    assert chi_square.excess(torch.bincount(free, minlength=VOCAB), exact(DRAW)) < 1.0


@pytest.mark.parametrize("kind", list(QUICK))
def test_frequencies_of_kinds_that_are_drawn_together_are_exact(kind: str) -> None:
    assert excess(QUICK[kind], MANY) < 1.0


@pytest.mark.parametrize("kind", list(OTHERS))
def test_frequencies_of_every_other_kind_are_exact(kind: str) -> None:
    assert excess(OTHERS[kind], FEW if kind in SLOWEST else SOME) < 1.0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["free", *QUICK, *OTHERS])
def test_frequencies_of_all_kinds_are_exact_in_a_hundred_thousand_draws(kind: str) -> None:
    assert excess({"free": DRAW, **QUICK, **OTHERS}[kind], ALL) < 1.0


def test_a_distribution_that_is_off_by_little_is_told_from_the_right_one(free: torch.Tensor) -> None:
    """What the tests above could miss: so many draws tell a temperature of 1.08 from 1."""
    counts = torch.bincount(free, minlength=VOCAB)
    assert chi_square.excess(counts, exact(replace(DRAW, temperature=1.08))) > 1.0
    assert chi_square.excess(counts, exact(replace(DRAW, top_k=200))) == float("inf")


def classes(tokens: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Every token in one of six classes of about the same probability: pairs of tokens would be too many to count."""
    return _class_of(probabilities)[tokens]


def _class_of(probabilities: torch.Tensor) -> torch.Tensor:
    # Neighbouring ids fall into different classes, so that a tie between neighbours shows as well.
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(5))
    before = probabilities[order].cumsum(0) - probabilities[order]
    return torch.empty(VOCAB, dtype=torch.int64).scatter(0, order, (before * 6).long().clamp(max=5))


def pair_excess(first: torch.Tensor, second: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of pairs of draws against the product of the exact distribution with itself."""
    class_of = _class_of(probabilities)
    weights = torch.zeros(6, dtype=torch.float64).index_add(0, class_of, probabilities.double())
    pairs = classes(first, probabilities) * 6 + classes(second, probabilities)
    return chi_square.excess(torch.bincount(pairs, minlength=36), weights[:, None] * weights)


@pytest.mark.parametrize("distance", [1, 2, 256])
def test_draws_at_neighbouring_positions_are_independent(free: torch.Tensor, distance: int) -> None:
    assert pair_excess(free[:-distance], free[distance:], exact(DRAW)) < 1.0


def test_draws_of_a_rule_at_neighbouring_positions_are_independent() -> None:
    row = QUICK["relu_difference"]
    tokens = tokens_of(row, MANY)
    assert pair_excess(tokens[:-1], tokens[1:], exact(row)) < 1.0


@pytest.fixture(scope="module")
def by_seed() -> torch.Tensor:
    """Draws of neighbouring seeds at one position."""
    return drawn([replace(DRAW, seed=seed, position=9) for seed in range(MANY)])


def test_draws_of_neighbouring_seeds_are_independent(by_seed: torch.Tensor) -> None:
    assert chi_square.excess(torch.bincount(by_seed, minlength=VOCAB), exact(DRAW)) < 1.0
    assert pair_excess(by_seed[:-1], by_seed[1:], exact(DRAW)) < 1.0


@pytest.mark.parametrize(
    "difference", [2**32, *(pytest.param(2**n, marks=pytest.mark.slow) for n in (31, 63))]
)
def test_draws_of_far_seeds_are_independent(by_seed: torch.Tensor, difference: int) -> None:
    """Seeds that are equal in one of their two words."""
    other = drawn([replace(DRAW, seed=difference + seed, position=9) for seed in range(MANY)])
    assert not torch.equal(other, by_seed)
    assert pair_excess(by_seed, other, exact(DRAW)) < 1.0


def test_seed_and_position_cannot_stand_for_each_other(by_seed: torch.Tensor) -> None:
    swapped = drawn([replace(DRAW, seed=9, position=number) for number in range(MANY)])
    assert pair_excess(by_seed, swapped, exact(DRAW)) < 1.0


def test_pairs_that_hang_together_are_told_from_independent_ones(free: torch.Tensor) -> None:
    """What the tests above could miss: one pair in twenty that is twice the same draw."""
    first, second = free[:MANY], free[MANY:].clone()
    second[::20] = first[::20]
    assert pair_excess(first, second, exact(DRAW)) > 1.0
