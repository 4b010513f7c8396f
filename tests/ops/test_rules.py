"""Combine rules, composition and the uld-official preset, against float64 vectors and by property."""

from __future__ import annotations

import itertools
import json
from math import log
from pathlib import Path

import dense_oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from uld_kernels import SampleRow, Term, fused_sample, fused_score, reference, rules

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
NONE = torch.tensor([], dtype=torch.int64)


def tensor(values: list[float | None]) -> torch.Tensor:
    return torch.tensor([float("-inf") if v is None else v for v in values], dtype=torch.float64)


def vector_rows(rule: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, object]]]:
    found = [
        (tensor(case["base"]), tensor(case["aux"]), tensor(case["neg"]), row)
        for case in VECTORS["cases"]
        for row in case["rows"]
        if row["rule"] == rule
    ]
    assert found
    return found


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-9)


def test_relu_difference_equals_vectors() -> None:
    for b, a, _, row in vector_rows("relu_difference"):
        s = reference.relu_difference(b, a, strength=row["alpha"])
        assert_close(s, tensor(row["scores"]))
        assert s.argmax() == row["argmax"]


def test_relu_difference_counts_nothing_up_to_its_dead_zone() -> None:
    b, a = tensor([0.0, 1.0, 2.0, 3.0]), tensor([5.0, 3.0, 3.0, -9.0])
    s = reference.relu_difference(b, a, strength=2.0, dead_zone=2.0)
    assert s.tolist() == [0.0 - 2 * (5 - 2), 1.0, 2.0, 3.0]
    penalty = reference.relu_difference_penalty(b, a, strength=2.0, dead_zone=1.5)
    assert penalty.tolist() == [7.0, 1.0, 0.0, 0.0]


def test_terms_that_differ_in_their_dead_zone_are_two_profiles() -> None:
    one = Term(rules.RELU_DIFFERENCE, 2.0, digest=1, row_a=1, dead_zone=1.0)
    other = Term(rules.RELU_DIFFERENCE, 2.0, digest=1, row_a=1)
    assert len(SampleRow(0, (one, other)).distinct_terms) == 2


def test_pair_linear_on_log_softmax_equals_offset_vectors() -> None:
    for b, q, p, row in vector_rows("pair_linear"):
        s = reference.pair_linear(b, q.log_softmax(-1), p.log_softmax(-1), strength=row["alpha"])
        assert_close(s.log_softmax(-1), tensor(row["logprobs"]))


def test_pair_linear_differs_from_raw_logits_by_a_constant_only() -> None:
    for b, q, p, row in vector_rows("pair_linear_raw"):
        s = reference.pair_linear(b, q.log_softmax(-1), p.log_softmax(-1), strength=row["alpha"])
        assert_close(s.log_softmax(-1), tensor(row["scores"]).log_softmax(-1))


def test_pair_rank_equals_vectors() -> None:
    for b, q, p, row in vector_rows("pair_rank"):
        s = reference.pair_rank(b, q, p, rank_k=row["k"])
        assert_close(s, tensor(row["scores"]))
        assert s.argmax() == row["argmax"]


def test_pair_rank_removes_ties_at_the_edge() -> None:
    removed = reference.pair_rank_removed(torch.zeros(4), torch.tensor([1.0, 3.0, 1.0, 0.0]), rank_k=2)
    assert removed.tolist() == [True, True, True, False]


def test_official_preset_equals_both_published_distributions() -> None:
    for b, a, _, row in vector_rows("official_sampling"):
        # At tau * V < 1 the published code leaves everything in; the vectors say so too.
        assert reference.official_keep(b, tau=row["tau"]).tolist() == [bool(k) for k in row["keep"]]
        s = reference.official_sampling_scores(b, a, strength=row["alpha"], tau=row["tau"])
        assert_close(s, tensor(row["scores"]))
    for b, a, _, row in vector_rows("official_scoring"):
        s = reference.official_scoring_scores(b, a, strength=row["alpha"], tau=row["tau"])
        assert_close(s, tensor(row["scores"]))


def test_published_greedy_defect_is_not_reproduced() -> None:
    case = VECTORS["greedy_defect"]
    b, a = tensor(case["base"]), tensor(case["aux"])
    keep = reference.official_keep(b, tau=case["tau"])
    assert keep.tolist() == case["keep"]
    s = reference.official_sampling_scores(b, a, strength=case["alpha"], tau=case["tau"])
    assert (s * keep).argmax() == case["official_argmax"]
    assert s.argmax() == case["safe_argmax"]


@pytest.mark.parametrize("rule", ["relu_difference", "pair_linear", "pair_rank", "official_sampling"])
def test_fused_score_equals_vectors_end_to_end(rule: str) -> None:
    for b, aux, neg, row in vector_rows(rule):
        kind = rules.RULE_CODES.get(rule, rules.SUBTRACT)
        filtered = {"filter_mode": rules.OFFICIAL, "tau": row["tau"]} if rule == "official_sampling" else {}
        term = Term(
            kind,
            row.get("alpha", 1.0),
            digest=1,
            row_a=1,
            row_q=1,
            row_p=2,
            rank_k=row.get("k", 0),
            **filtered,
        )
        rows = [SampleRow(0, (term,))] * b.shape[0]
        output = fused_score(
            torch.stack([b, aux, neg]),
            rows,
            torch.arange(b.shape[0]),
            vocab_size=b.shape[0],
            protected_ids=NONE,
        )
        torch.testing.assert_close(output.logprob_B, tensor(row["logprobs"]).float(), rtol=1e-6, atol=1e-6)


# --- composition ----------------------------------------------------------------------------------


VOCAB = 24


@st.composite
def logits(draw: st.DrawFn, *, num_rows: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.5, 3.0, 20.0]))
    return torch.randn(num_rows, VOCAB, generator=generator, dtype=torch.float64) * spread


@st.composite
def terms(draw: st.DrawFn) -> Term:
    filter_mode = draw(st.sampled_from(sorted(rules.FILTER_CODES.values())))
    kind = draw(st.sampled_from([rules.SUBTRACT, rules.RELU_DIFFERENCE, rules.PAIR_LINEAR, rules.PAIR_RANK]))
    return Term(
        kind=kind,
        strength=draw(st.floats(0.05, 12.0)),
        digest=draw(st.integers(0, 2**60)),
        row_a=draw(st.integers(1, 6)),
        row_q=draw(st.integers(1, 6)),
        row_p=draw(st.integers(1, 6)),
        filter_mode=filter_mode,
        tau=draw(st.sampled_from([0.001, 0.02, 0.3, 1.0])),
        min_keep=draw(st.integers(1, 10)),
        protect=draw(st.booleans()),
        rank_k=draw(st.integers(1, 5)),
        dead_zone=draw(st.sampled_from([0.0, 0.5, 4.0])) if kind == rules.RELU_DIFFERENCE else 0.0,
    )


def composed_offset(term: Term, logits_RV: torch.Tensor) -> torch.Tensor:
    """What composition adds to all scores of the plain single rule; only `subtract` has an offset to fix."""
    if term.kind != rules.SUBTRACT:
        return torch.zeros((), dtype=torch.float64)
    return term.strength * (logits_RV[term.row_a].logsumexp(-1) - log(VOCAB))


@settings(max_examples=100, deadline=None)
@given(logits(), st.lists(terms(), min_size=1, max_size=4), terms())
def test_adding_a_profile_never_raises_a_score(
    logits_RV: torch.Tensor, given_terms: list[Term], added: Term
) -> None:
    # Terms of one digest are one profile, so they would read the same streams.
    assume(len({term.digest for term in (*given_terms, added)}) == len(given_terms) + 1)
    before_row, after_row = SampleRow(0, tuple(given_terms)), SampleRow(0, (*given_terms, added))
    before, after = (dense_oracle.combined(logits_RV, row) for row in (before_row, after_row))
    if len(before_row.distinct_terms) == 1 < len(after_row.distinct_terms):
        before = before + composed_offset(before_row.distinct_terms[0], logits_RV)
    assert (after <= before + 1e-9).all()


@settings(max_examples=50, deadline=None)
@given(logits(), terms())
def test_one_sided_rules_never_raise_a_score_of_the_target(logits_RV: torch.Tensor, term: Term) -> None:
    s = dense_oracle.combined(logits_RV, SampleRow(0, (term,)))
    if term.kind in (rules.RELU_DIFFERENCE, rules.PAIR_RANK):
        assert (s <= logits_RV[0]).all()


@settings(max_examples=40, deadline=None)
@given(logits(), st.lists(terms(), min_size=2, max_size=3))
def test_order_and_repeats_of_profiles_do_not_matter(
    logits_RV: torch.Tensor, given_terms: list[Term]
) -> None:
    orders = list(itertools.permutations(given_terms))
    rows = [SampleRow(0, chosen, num_logprobs=VOCAB) for chosen in orders]
    rows += [SampleRow(0, (*chosen, given_terms[0]), num_logprobs=VOCAB) for chosen in orders]
    output = fused_sample(logits_RV, rows, vocab_size=VOCAB, protected_ids=torch.arange(2))
    for index in range(1, len(rows)):
        assert torch.equal(output.top_ids_BN[index], output.top_ids_BN[0])
        assert torch.equal(output.top_logprobs_BN[index], output.top_logprobs_BN[0])
        assert output.digests[index] == output.digests[0]


def test_of_a_profile_given_twice_the_larger_strength_holds() -> None:
    weak, strong = (Term(rules.SUBTRACT, strength, digest=4, row_a=1) for strength in (0.5, 2.0))
    assert SampleRow(0, (strong, weak)).distinct_terms == (strong,)
    assert SampleRow(0, (weak, strong)).distinct_terms == (strong,)


def test_terms_of_one_digest_but_different_rules_both_apply() -> None:
    first = Term(rules.SUBTRACT, 1.0, digest=0, row_a=1)
    second = Term(rules.RELU_DIFFERENCE, 1.0, digest=0, row_a=2)
    assert len(SampleRow(0, (first, second)).distinct_terms) == 2


def test_compose_sum_adds_unclipped_penalties() -> None:
    b = torch.tensor([1.0, 2.0, 3.0])
    penalties = [torch.tensor([1.0, -1.0, 0.0]), torch.tensor([2.0, -1.0, 0.5])]
    assert reference.compose(b, penalties, mode=rules.COMPOSE_SUM).tolist() == [-2.0, 4.0, 2.5]
    assert reference.compose(b, penalties, mode=rules.COMPOSE_MAX).tolist() == [-1.0, 2.0, 2.5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"strength": 0.0},
        {"strength": float("nan")},
        {"kind": rules.IDENTITY},
        {"row_a": -1},
        {"kind": rules.PAIR_LINEAR},
        {"filter_mode": rules.FUSED, "tau": 0.0},
        {"filter_mode": rules.PLAUSIBILITY, "tau": 0.1, "min_keep": 0},
        {"kind": rules.PAIR_RANK, "row_q": 1, "row_p": 2, "rank_k": 0},
        {"dead_zone": 1.0},
        {"kind": rules.RELU_DIFFERENCE, "dead_zone": -1.0},
        {"kind": rules.RELU_DIFFERENCE, "dead_zone": float("nan")},
    ],
)
def test_impossible_terms_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"needs|must be|unknown"):
        Term(**{"kind": rules.SUBTRACT, "strength": 1.0, "digest": 1, "row_a": 1, **wrong})
