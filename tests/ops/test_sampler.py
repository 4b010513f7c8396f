"""fused_sample and fused_score against the dense oracle, by property, and by frequency."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import dense_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scale import scaled
from uld_kernels import SampleOutput, SampleRow, Term, fused_sample, fused_score, rules

VOCAB = 41
NUM_SAMPLED = scaled(fast=200, gate=20_000, aim=1_000_000)
PROTECTED = torch.tensor([0, 40])
SUBTRACT = Term(
    rules.SUBTRACT, 0.75, 1, row_a=1, filter_mode=rules.PLAUSIBILITY, tau=0.01, min_keep=12, protect=True
)
RELU = Term(rules.RELU_DIFFERENCE, 2.0, 2, row_a=2, filter_mode=rules.FUSED, tau=0.02)
PAIR = Term(rules.PAIR_LINEAR, 1.5, 3, row_q=1, row_p=2, filter_mode=rules.FUSED, tau=0.02)
RANK = Term(rules.PAIR_RANK, 1.0, 4, row_q=1, row_p=2, rank_k=4)
BEYOND = replace(RELU, dead_zone=1.5, digest=5)
COMPOSITIONS = [
    (),
    (SUBTRACT,),
    (RELU,),
    (BEYOND,),
    (PAIR,),
    (RANK,),
    (SUBTRACT, BEYOND),
    (SUBTRACT, RELU, PAIR, RANK),
]


def random_logits(seed: int, num_rows: int = 3, *, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, VOCAB, generator=generator, dtype=torch.float64) * spread


def sample(logits_RV: torch.Tensor, *rows: SampleRow) -> SampleOutput:
    return fused_sample(logits_RV, rows, vocab_size=VOCAB, protected_ids=PROTECTED)


@st.composite
def sample_rows(draw: st.DrawFn) -> SampleRow:
    ids = st.lists(st.integers(0, VOCAB - 1), max_size=12).map(lambda xs: torch.tensor(xs, dtype=torch.int64))
    biased = draw(st.lists(st.integers(0, VOCAB - 1), max_size=4, unique=True))
    bias = (torch.tensor(biased, dtype=torch.int64), torch.linspace(-50.0, 50.0, len(biased)))
    mask = torch.rand(VOCAB, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.7
    return SampleRow(
        row_b=0,
        terms=draw(st.sampled_from(COMPOSITIONS)),
        compose=draw(st.sampled_from([rules.COMPOSE_MAX, rules.COMPOSE_SUM])),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 5, 200])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.3])),
        min_p=draw(st.sampled_from([0.0, 0.05, 1.0])),
        seed=draw(st.integers(0, 2**64 - 1)),
        position=draw(st.integers(0, 2**20)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
        presence_penalty=draw(st.sampled_from([0.0, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.4])),
        prompt_ids=draw(st.none() | ids),
        output_ids=draw(st.none() | ids),
        logit_bias=bias if biased and draw(st.booleans()) else None,
        banned_ids=draw(st.none() | ids),
        allowed_mask=mask if draw(st.booleans()) else None,
    )


@pytest.mark.row("sampler properties: drawn token always in the kept set", count=NUM_SAMPLED)
@pytest.mark.timeout(36000)
@settings(max_examples=NUM_SAMPLED, deadline=None)
@given(st.integers(0, 10**6), sample_rows())
def test_token_and_scores_equal_the_dense_oracle_for_any_parameters(seed: int, row: SampleRow) -> None:
    logits_RV = random_logits(seed)
    output = sample(logits_RV, row)
    expected = dense_oracle.fused_scores(logits_RV, row, PROTECTED)
    if output.status_B.item() == rules.NOTHING_KEPT:
        assert (expected == -inf).all()
        return
    token = output.token_ids_B.item()
    assert token == dense_oracle.token(logits_RV, row, PROTECTED)
    assert expected[token] > -inf
    assert output.num_kept_B.item() == (expected > -inf).sum()
    logprobs = expected.log_softmax(-1)
    torch.testing.assert_close(output.logprob_B[0].double(), logprobs[token], rtol=1e-6, atol=1e-6)
    target = dense_oracle.banned_target(logits_RV, row).log_softmax(-1)
    kept = expected > -inf
    kl = (logprobs.exp() * (logprobs - target))[kept].sum()
    torch.testing.assert_close(output.kl_B[0].double(), kl, rtol=1e-5, atol=1e-6)
    assert output.argmax_changed_B.item() == (expected.argmax() != target.argmax())


@pytest.mark.parametrize("terms", COMPOSITIONS)
def test_same_seed_and_position_give_the_same_token_in_any_batch(terms: tuple[Term, ...]) -> None:
    logits_RV = random_logits(1)
    wanted = SampleRow(0, terms, seed=12345, position=9, top_p=0.95)
    others = [SampleRow(2, seed=seed) for seed in range(4)]
    alone = sample(logits_RV, wanted)
    shuffled = torch.cat([random_logits(2), logits_RV])
    moved_terms = tuple(
        Term(
            **{name: getattr(term, name) for name in Term.__slots__ if not name.startswith("row_")},
            **{
                name: getattr(term, name) + 3
                for name in ("row_a", "row_q", "row_p")
                if getattr(term, name) >= 0
            },
        )
        for term in terms
    )
    moved = SampleRow(3, moved_terms, seed=12345, position=9, top_p=0.95)
    for index in range(5):
        batch = [*others[:index], moved, *others[index:]]
        output = sample(shuffled, *batch)
        assert output.token_ids_B[index] == alone.token_ids_B[0]
        assert output.logprob_B[index] == alone.logprob_B[0]


def test_temperature_zero_takes_the_lowest_id_of_ties() -> None:
    logits_RV = torch.zeros(3, VOCAB)
    logits_RV[0, [7, 3, 20]] = 2.0
    assert sample(logits_RV, SampleRow(0, temperature=0.0)).token_ids_B.tolist() == [3]
    output = sample(logits_RV, SampleRow(0, temperature=0.0, banned_ids=torch.tensor([3]), num_logprobs=3))
    assert output.token_ids_B.tolist() == [7]
    assert output.top_ids_BN.tolist() == [[7, 20, 0]]


def test_bias_changes_the_draw_but_never_revives_a_filtered_token() -> None:
    logits_RV = random_logits(3)
    scores = dense_oracle.fused_scores(logits_RV, SampleRow(0, (RELU,)), PROTECTED)
    filtered = (scores == -inf).nonzero().flatten()[:3]
    bias = (filtered, torch.tensor([100.0, 90.0, 80.0]))
    biased = sample(logits_RV, SampleRow(0, (RELU,), logit_bias=bias))
    assert scores[biased.token_ids_B[0]] > -inf
    assert sample(logits_RV, SampleRow(0, logit_bias=bias)).token_ids_B.tolist() == filtered[:1].tolist()


def test_log_probabilities_are_those_before_penalties_and_temperature() -> None:
    logits_RV = random_logits(4)
    history = torch.arange(VOCAB)
    row = SampleRow(0, temperature=0.2, repetition_penalty=1.5, output_ids=history, num_logprobs=VOCAB)
    output = sample(logits_RV, row)
    expected, ids = logits_RV[0].log_softmax(-1).sort(descending=True)
    assert output.top_ids_BN[0].tolist() == ids.tolist()
    torch.testing.assert_close(output.top_logprobs_BN[0], expected.float())
    assert output.logprob_B[0] == output.top_logprobs_BN[0][ids == output.token_ids_B[0]]


def test_listed_log_probabilities_are_padded_where_fewer_are_kept() -> None:
    row = SampleRow(0, banned_ids=torch.arange(2, VOCAB), num_logprobs=5)
    output = sample(random_logits(5), row, SampleRow(1))
    assert output.top_ids_BN[0, 2:].tolist() == [-1, -1, -1]
    assert (output.top_logprobs_BN[0, 2:] == -inf).all()
    assert (output.top_ids_BN[1] == -1).all()


@pytest.mark.parametrize("bad", [float("nan"), inf])
@pytest.mark.parametrize("terms", COMPOSITIONS)
def test_a_numerical_error_in_any_stream_ends_that_row_only(terms: tuple[Term, ...], bad: float) -> None:
    clean = random_logits(6)
    logits_RV = clean.clone()
    best = int(clean[0].argmax())
    streams = {0, *(row for term in terms for row in (term.row_a, term.row_q, term.row_p) if row >= 0)}
    for stream in streams:
        logits_RV[:] = clean
        logits_RV[stream, best] = bad
        healthy = torch.cat([logits_RV, clean])
        output = sample(healthy, SampleRow(3), SampleRow(0, terms), SampleRow(4))
        assert output.status_B.tolist() == [rules.OK, rules.NUMERICAL, rules.OK]
        assert output.token_ids_B[1] == -1
        assert torch.equal(output.token_ids_B[::2], sample(clean, SampleRow(0), SampleRow(1)).token_ids_B)


def test_an_assistant_of_minus_infinity_is_a_numerical_error_not_a_certain_token() -> None:
    logits_RV = random_logits(7)
    logits_RV[1, int(logits_RV[0].argmax())] = -inf
    output = sample(logits_RV, SampleRow(0, (SUBTRACT,)))
    assert output.status_B.tolist() == [rules.NUMERICAL]


def test_nan_among_filtered_tokens_of_an_assistant_is_not_read() -> None:
    logits_RV = random_logits(8)
    logits_RV[1, int(logits_RV[0].argmin())] = float("nan")
    assert sample(logits_RV, SampleRow(0, (SUBTRACT,))).status_B.tolist() == [rules.OK]


def test_nothing_kept_is_reported_not_sampled() -> None:
    row = SampleRow(0, banned_ids=torch.arange(VOCAB))
    output = sample(random_logits(9), row, SampleRow(0, allowed_mask=torch.zeros(VOCAB, dtype=torch.bool)))
    assert output.status_B.tolist() == [rules.NOTHING_KEPT, rules.NOTHING_KEPT]
    assert output.token_ids_B.tolist() == [-1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padded_head_columns_count_nowhere(dtype: torch.dtype) -> None:
    logits_RV = random_logits(10).to(dtype)
    padded = torch.cat([logits_RV, torch.full((3, 23), 60.0, dtype=dtype)], dim=1)
    rows = [SampleRow(0, terms, seed=seed, position=3) for terms in COMPOSITIONS for seed in range(4)]
    without, with_padding = sample(logits_RV, *rows), sample(padded, *rows)
    assert torch.equal(without.token_ids_B, with_padding.token_ids_B)
    assert torch.equal(without.logprob_B, with_padding.logprob_B)
    assert torch.equal(without.token_ids_B, sample(logits_RV.float(), *rows).token_ids_B)


def test_digests_say_which_terms_were_applied() -> None:
    output = sample(random_logits(11), SampleRow(0), SampleRow(0, (RELU, SUBTRACT, RELU)))
    assert output.digests == [(), (1, 2)]


@pytest.mark.parametrize("terms", COMPOSITIONS)
def test_score_gives_the_distribution_that_is_sampled_from(terms: tuple[Term, ...]) -> None:
    logits_RV, ids = random_logits(12), torch.arange(VOCAB)
    output = fused_score(
        logits_RV, [SampleRow(0, terms)] * VOCAB, ids, vocab_size=VOCAB, protected_ids=PROTECTED
    )
    expected = dense_oracle.fused_scores(logits_RV, SampleRow(0, terms), PROTECTED)
    torch.testing.assert_close(output.logprob_B, expected.log_softmax(-1).float(), rtol=1e-6, atol=1e-6)
    assert output.logprob_B.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert output.rank_B.tolist() == [1 + int((expected > expected[i]).sum()) for i in range(VOCAB)]


def test_top_p_of_a_flat_distribution_looks_beyond_its_first_candidates() -> None:
    size = 5000
    logits_RV = torch.randn(1, size, generator=torch.Generator().manual_seed(14)) * 0.01
    for seed in range(5):
        row = SampleRow(0, top_p=0.9, seed=seed, position=1)
        none = torch.tensor([], dtype=torch.int64)
        output = fused_sample(logits_RV, [row], vocab_size=size, protected_ids=none)
        assert output.token_ids_B.item() == dense_oracle.token(logits_RV, row, none)


def test_rows_outside_the_logits_and_wrong_sizes_are_refused() -> None:
    logits_RV = random_logits(15)
    with pytest.raises(ValueError, match="outside the 3 rows"):
        sample(logits_RV, SampleRow(3))
    with pytest.raises(ValueError, match="outside the 3 rows"):
        sample(logits_RV, SampleRow(0, (Term(rules.SUBTRACT, 1.0, 1, row_a=5),)))
    with pytest.raises(ValueError, match="does not fit"):
        fused_sample(logits_RV, [], vocab_size=VOCAB + 1, protected_ids=PROTECTED)
    with pytest.raises(ValueError, match="one target id a row"):
        fused_score(logits_RV, [SampleRow(0)], torch.arange(2), vocab_size=VOCAB, protected_ids=PROTECTED)
    for target in (-1, VOCAB):
        with pytest.raises(ValueError, match="target ids must be"):
            fused_score(
                logits_RV,
                [SampleRow(0)],
                torch.tensor([target]),
                vocab_size=VOCAB,
                protected_ids=PROTECTED,
            )


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"position": 2**32},
        {"num_logprobs": -1},
    ],
)
def test_impossible_parameters_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SampleRow(0, **wrong)
