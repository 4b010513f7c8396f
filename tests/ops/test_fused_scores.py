"""Whole rows of fused scores, for engines with a sampler of their own: the very scores that fused_sample draws from."""

from __future__ import annotations

import dense_oracle
import pytest
import torch
from uld_kernels import LateRows, SampleRow, Term, fused_sample, fused_score, fused_scores, rules

VOCAB_SIZE, WIDTH, DIM = 700, 768, 24
PROTECTED = torch.tensor([0, 17])
TERMS = {
    "none": (),
    "relu": (Term(rules.RELU_DIFFERENCE, 1.5, 1, row_a=4, filter_mode=rules.FUSED, tau=0.02),),
    "subtract": (
        Term(
            rules.SUBTRACT, 0.7, 2, row_a=5, filter_mode=rules.PLAUSIBILITY, tau=0.01, min_keep=64, protect=True
        ),
    ),
    "unfiltered": (Term(rules.RELU_DIFFERENCE, 3.0, 3, row_a=4),),
    "pair": (Term(rules.PAIR_LINEAR, 1.0, 4, row_q=4, row_p=5, filter_mode=rules.FUSED, tau=0.02),),
    "ranked": (Term(rules.PAIR_RANK, 1.0, 5, row_q=4, row_p=5, rank_k=20),),
}  # fmt: skip
TERMS["composed"] = TERMS["relu"] + TERMS["subtract"]


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return 3 * torch.randn(8, WIDTH, generator=generator)


@pytest.mark.parametrize("name", TERMS)
def test_rows_are_what_the_definition_gives(logits: torch.Tensor, name: str) -> None:
    rows = [SampleRow(row_b=b, terms=TERMS[name]) for b in range(4)]
    out = fused_scores(logits, rows, vocab_size=VOCAB_SIZE, protected_ids=PROTECTED)
    expected = torch.stack(
        [dense_oracle.fused_scores(logits[:, :VOCAB_SIZE], row, PROTECTED) for row in rows]
    )
    assert out.status_B.tolist() == [rules.OK] * 4
    assert torch.equal(out.scores_BV.isinf(), expected.isinf())
    torch.testing.assert_close(out.scores_BV, expected.float(), rtol=0, atol=1e-4)
    assert out.digests == [tuple(term.digest for term in rows[0].distinct_terms)] * 4


@pytest.mark.parametrize("name", TERMS)
def test_the_best_score_is_what_greedy_sampling_draws(logits: torch.Tensor, name: str) -> None:
    rows = [SampleRow(row_b=b, terms=TERMS[name], temperature=0.0) for b in range(4)]
    how = {"vocab_size": VOCAB_SIZE, "protected_ids": PROTECTED}
    best = fused_scores(logits, rows, **how).scores_BV.argmax(-1)
    assert torch.equal(best, fused_sample(logits, rows, **how).token_ids_B)


def test_log_probabilities_are_those_of_scoring(logits: torch.Tensor) -> None:
    rows = [SampleRow(row_b=b, terms=TERMS["composed"]) for b in range(4)]
    how = {"vocab_size": VOCAB_SIZE, "protected_ids": PROTECTED}
    scores_BV = fused_scores(logits, rows, **how).scores_BV
    tokens = scores_BV.argsort(-1)[:, -2]
    expected = fused_score(logits, rows, tokens, **how).logprob_B
    found = scores_BV.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_late_assistants_give_what_whole_ones_give() -> None:
    generator = torch.Generator().manual_seed(5)
    weight_WD = torch.randn(WIDTH, DIM, generator=generator)
    hidden_RD = torch.randn(8, DIM, generator=generator)
    whole = hidden_RD @ weight_WD.T
    rows = [SampleRow(row_b=b, terms=TERMS["relu"]) for b in range(4)]
    how = {"vocab_size": VOCAB_SIZE, "protected_ids": PROTECTED}
    late = LateRows(hidden_RD[4:], weight_WD)
    found = fused_scores(whole[:4], rows, late=late, **how).scores_BV
    torch.testing.assert_close(found, fused_scores(whole, rows, **how).scores_BV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in TERMS if name != "none"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_stream_that_is_not_finite_leaves_no_score_in_its_row(
    logits: torch.Tensor, name: str, value: float
) -> None:
    bad = logits.clone()
    bad[4:6] = value
    rows = [SampleRow(row_b=0, terms=TERMS[name]), SampleRow(row_b=1)]
    out = fused_scores(bad, rows, vocab_size=VOCAB_SIZE, protected_ids=PROTECTED)
    assert out.status_B.tolist() == [rules.NUMERICAL, rules.OK]
    assert out.scores_BV[0].eq(-torch.inf).all()
    assert torch.equal(out.scores_BV[1], logits[1, :VOCAB_SIZE])
