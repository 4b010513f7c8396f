"""Filters, protection, penalties and truncation: what each keeps, and that none of them fails open."""

from __future__ import annotations

import json
from math import inf, log
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uld_kernels import SampleRow, Term, fused_sample, reference, rules

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())


def random_logits(seed: int, size: int = 50, *, spread: float = 4.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def test_plausibility_without_min_keep_equals_vectors() -> None:
    checked = 0
    for case in VECTORS["cases"]:
        b = torch.tensor(case["base"], dtype=torch.float64)
        for row in case["rows"]:
            if row["rule"] == "keep_plausibility":
                keep = reference.plausibility_keep(b, tau=row["tau"], min_keep=1)
                assert keep.tolist() == [bool(k) for k in row["keep"]]
                checked += 1
    assert checked == 12


@pytest.mark.parametrize("min_keep", [1, 2, 32, 49, 50, 500])
def test_plausibility_keeps_min_keep_best_and_everything_above_tau(min_keep: int) -> None:
    b = random_logits(1)
    keep = reference.plausibility_keep(b, tau=0.1, min_keep=min_keep)
    p = b.softmax(-1)
    by_probability = p >= 0.1 * p.max()
    best = torch.zeros(50, dtype=torch.bool).index_fill(0, b.topk(min(min_keep, 50)).indices, True)
    assert torch.equal(keep, by_probability | best)


def test_filters_on_the_target_keep_ties_and_never_banned_tokens() -> None:
    b = torch.tensor([3.0, 1.0, 1.0, 1.0, -inf])
    assert reference.plausibility_keep(b, tau=0.9, min_keep=2).tolist() == [True, True, True, True, False]
    assert reference.plausibility_keep(b, tau=0.9, min_keep=5).tolist() == [True, True, True, True, False]
    assert not reference.official_keep(b, tau=0.1)[4]


def test_filters_on_the_target_are_nested() -> None:
    b = random_logits(2)
    kept = [
        reference.plausibility_keep(b, tau=tau, min_keep=min_keep)
        for tau in (0.001, 0.1, 0.9)
        for min_keep in (1, 8, 40)
    ] + [reference.official_keep(b, tau=tau) for tau in (0.05, 0.5)]
    for first in kept:
        for second in kept:
            assert (first & second).equal(first) or (first & second).equal(second)


def test_fused_filter_is_min_p_on_scores() -> None:
    s = random_logits(3)
    p = s.softmax(-1)
    assert torch.equal(reference.fused_keep(s, tau=0.02), p >= 0.02 * p.max())


# --- a filter never fails open -----------------------------------------------------------------------


def certain_logits(vocab_size: int = 2000) -> torch.Tensor:
    """Row 0 gives token 5 more than .999; row 1 is an assistant that knows it too; row 2 does not."""
    rows = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(4))
    rows[0, 5], rows[1, 5], rows[2, 5] = 20.0, 26.0, 0.0
    assert rows[0].softmax(-1)[5] > 0.999
    return rows


@pytest.mark.parametrize(
    "term",
    [
        Term(rules.SUBTRACT, 1.0, 1, row_a=1, filter_mode=rules.PLAUSIBILITY, tau=0.01, min_keep=256),
        Term(
            rules.SUBTRACT,
            1.0,
            1,
            row_a=1,
            filter_mode=rules.PLAUSIBILITY,
            tau=1.0,
            min_keep=32,
            protect=True,
        ),
        Term(rules.SUBTRACT, 1.0, 1, row_a=1, filter_mode=rules.OFFICIAL, tau=0.1),
        Term(rules.SUBTRACT, 1.0, 1, row_a=1, filter_mode=rules.FUSED, tau=0.02),
        Term(rules.RELU_DIFFERENCE, 8.0, 1, row_a=1, filter_mode=rules.FUSED, tau=0.02),
        Term(rules.RELU_DIFFERENCE, 8.0, 1, row_a=1, filter_mode=rules.PLAUSIBILITY, tau=0.5, min_keep=32),
        Term(rules.PAIR_LINEAR, 2.0, 1, row_q=2, row_p=1, filter_mode=rules.FUSED, tau=0.02),
        Term(rules.PAIR_RANK, 1.0, 1, row_q=2, row_p=1, rank_k=5, filter_mode=rules.FUSED, tau=0.5),
    ],
)
def test_secret_of_a_certain_target_is_suppressed(term: Term) -> None:
    rows = [SampleRow(0, (term,), temperature=0.0)]
    rows += [SampleRow(0, (term,), seed=seed, position=1) for seed in range(30)]
    output = fused_sample(certain_logits(), rows, vocab_size=2000, protected_ids=torch.tensor([0, 1]))
    assert (output.status_B == rules.OK).all()
    assert (output.token_ids_B != 5).all()
    assert output.argmax_changed_B.all()


def test_min_keep_of_one_fails_open_which_is_why_profiles_are_refused_below_32() -> None:
    term = Term(rules.SUBTRACT, 9.0, 1, row_a=1, filter_mode=rules.PLAUSIBILITY, tau=0.01, min_keep=1)
    output = fused_sample(
        certain_logits(), [SampleRow(0, (term,))], vocab_size=2000, protected_ids=torch.tensor([0])
    )
    assert output.token_ids_B.tolist() == [5]


def test_two_certain_profiles_leave_something_to_say() -> None:
    logits_RV = certain_logits()
    logits_RV[2, 9] = 30.0
    terms = tuple(
        Term(rules.RELU_DIFFERENCE, 8.0, digest, row_a=digest, filter_mode=rules.FUSED, tau=tau)
        for digest, tau in ((1, 0.9), (2, 1.0))
    )
    output = fused_sample(logits_RV, [SampleRow(0, terms)], vocab_size=2000, protected_ids=torch.tensor([0]))
    assert output.status_B.tolist() == [rules.OK]
    assert output.token_ids_B.item() not in (5, 9)


# --- protection --------------------------------------------------------------------------------------


def test_protected_tokens_keep_their_probability_and_the_rest_its_proportions() -> None:
    b, s, protected = random_logits(5), random_logits(6) - 30.0, torch.tensor([0, 7, 49])
    s[10:20] = -inf
    result = reference.protect(s, b, protected).log_softmax(-1)
    torch.testing.assert_close(result[protected], b.log_softmax(-1)[protected])
    others = torch.ones(50, dtype=torch.bool).index_fill(0, protected, False)
    torch.testing.assert_close(result[others].log_softmax(-1), s[others].log_softmax(-1))
    assert (result[10:20] == -inf).all()


def test_protection_is_exact_where_the_target_is_certain_of_the_end() -> None:
    b = torch.zeros(50, dtype=torch.float32)
    b[0] = 60.0
    s = b - torch.arange(50.0)
    result = reference.protect(s, b, torch.tensor([0])).log_softmax(-1)
    assert result[0] == 0.0
    expected = log(49.0) - 60.0 + s[1:].log_softmax(-1)
    torch.testing.assert_close(result[1:], expected, rtol=1e-6, atol=1e-5)


def test_banned_protected_tokens_stay_banned() -> None:
    b = random_logits(7)
    b[3] = -inf
    assert reference.protect(random_logits(8), b, torch.tensor([3, 4]))[3] == -inf


def test_protected_tokens_remain_where_all_others_were_filtered() -> None:
    s = torch.full((50,), -inf, dtype=torch.float64)
    result = reference.protect(s, random_logits(9), torch.tensor([3, 4]))
    assert (result > -inf).nonzero().flatten().tolist() == [3, 4]


# --- penalties and truncation ------------------------------------------------------------------------


def test_repetition_penalty_lowers_seen_scores_of_either_sign() -> None:
    s, seen = torch.tensor([2.0, -2.0, 2.0]), torch.tensor([True, True, False])
    assert reference.repetition_penalty(s, seen, penalty=2.0).tolist() == [1.0, -4.0, 2.0]


def test_presence_and_frequency_penalties_follow_openai() -> None:
    s, counts = torch.zeros(3), torch.tensor([0, 1, 3])
    assert reference.presence_penalty(s, counts, penalty=0.5).tolist() == [0.0, -0.5, -0.5]
    assert reference.frequency_penalty(s, counts, penalty=0.5).tolist() == [0.0, -0.5, -1.5]


def test_top_k_keeps_exactly_k_with_ties_by_lowest_id() -> None:
    z = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert reference.top_k_keep(z, 2).tolist() == [False, True, True, False, False]
    assert reference.top_k_keep(z, 0).all()
    assert reference.largest(z, 3).tolist() == [1, 2, 3]
    assert reference.largest(z, 9).tolist() == [1, 2, 3, 0, 4]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.999))
def test_top_p_is_the_smallest_sufficient_set(seed: int, p: float) -> None:
    z = random_logits(seed)
    keep = reference.top_p_keep(z, p)
    probability = z.softmax(-1)
    assert probability[keep].sum() >= p - 1e-12
    assert probability[keep].sum() - probability[keep].min() < p + 1e-12
    assert probability[keep].min() >= probability[~keep].max() if (~keep).any() else True


def test_min_p_is_relative_to_the_most_likely() -> None:
    z = torch.tensor([0.25, 0.5, 0.125, 0.0625]).log()
    assert reference.min_p_keep(z, 0.3).tolist() == [True, True, False, False]
    assert reference.min_p_keep(z, 0.0).all()


def test_formulas_work_on_batches() -> None:
    batch = torch.stack([random_logits(seed) for seed in range(3)])
    for function in (
        lambda x: reference.plausibility_keep(x, tau=0.1, min_keep=4),
        lambda x: reference.official_keep(x, tau=0.1),
        lambda x: reference.fused_keep(x, tau=0.1),
        lambda x: reference.top_k_keep(x, 5),
        lambda x: reference.top_p_keep(x, 0.7),
        lambda x: reference.min_p_keep(x, 0.1),
        lambda x: reference.protect(x - 1.0, x, torch.tensor([1, 2])),
        lambda x: reference.pair_rank(x, x.flip(-1), x, rank_k=3),
    ):
        torch.testing.assert_close(function(batch), torch.stack([function(row) for row in batch]))
