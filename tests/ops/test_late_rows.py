"""Streams scored on the tokens that need them, against the same streams scored whole."""

from __future__ import annotations

import pytest
import torch
from uld_kernels import (
    LateRows,
    SampleRow,
    SampleShape,
    StaticSampler,
    Term,
    fused_sample,
    fused_score,
    rules,
)

VOCAB, WIDTH, DIM = 700, 704, 24
CODES = {"subtract": rules.SUBTRACT, "relu_difference": rules.RELU_DIFFERENCE}
MODES = {
    "plausibility": rules.PLAUSIBILITY,
    "official": rules.OFFICIAL,
    "fused": rules.FUSED,
    "none": rules.NO_FILTER,
}


def streams(seed: int) -> tuple[torch.Tensor, LateRows]:
    """Four targets and four assistants near them, each far off on some tokens."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(WIDTH, DIM, generator=generator)
    hidden = torch.randn(8, DIM, generator=generator)
    hidden[4:] = hidden[:4] + 0.3 * hidden[4:]
    bias = torch.randn(WIDTH, generator=generator)
    late = LateRows(hidden[4:].bfloat16(), weight.bfloat16(), bias)
    return hidden[:4] @ weight.T + bias, late


def term(rule: str, mode: str, row: int, *, digest: int = 1, protect: bool = False) -> Term:
    tau = 0.0 if mode == "none" else 0.02
    return Term(
        kind=CODES[rule], strength=1.5, digest=digest, row_a=row, filter_mode=MODES[mode], tau=tau, min_keep=40,
        protect=protect,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("rule", list(CODES))
def test_late_rows_give_what_whole_rows_give(rule: str, mode: str, seed: int) -> None:
    logits, late = streams(seed)
    protected = torch.tensor([3, 650])
    rows = [
        SampleRow(row_b=0, terms=(term(rule, mode, 4),), temperature=0.0, num_logprobs=5),
        SampleRow(row_b=1, terms=(term(rule, mode, 5, protect=True),), seed=7, position=2, num_logprobs=2),
        SampleRow(row_b=2, terms=(term(rule, mode, 6), term(rule, mode, 7, digest=2)), seed=1, position=9),
        SampleRow(row_b=3, terms=(term(rule, mode, 7),), seed=1, banned_ids=torch.arange(0, VOCAB, 3)),
        SampleRow(row_b=3, seed=4, position=1),
    ]
    whole = torch.cat([logits, late.all_scores()])
    options = {"vocab_size": VOCAB, "protected_ids": protected}
    got, expected = fused_sample(logits, rows, **options, late=late), fused_sample(whole, rows, **options)
    assert torch.equal(got.token_ids_B, expected.token_ids_B)
    assert torch.equal(got.num_kept_B, expected.num_kept_B)
    assert torch.equal(got.top_ids_BN, expected.top_ids_BN)
    assert got.digests == expected.digests
    torch.testing.assert_close(got.logprob_B, expected.logprob_B, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.kl_B, expected.kl_B, atol=1e-5, rtol=1e-4)
    targets = torch.tensor([0, 5, 650, 9, 1])
    scored = fused_score(logits, rows, targets, **options, late=late)
    scored_whole = fused_score(whole, rows, targets, **options)
    torch.testing.assert_close(scored.logprob_B, scored_whole.logprob_B, atol=1e-5, rtol=1e-5)
    assert torch.equal(scored.rank_B, scored_whole.rank_B)


def test_a_target_cannot_be_late_and_a_nan_assistant_ends_its_row_alone() -> None:
    logits, late = streams(0)
    with pytest.raises(ValueError, match="late"):
        fused_sample(
            logits, [SampleRow(row_b=4)], vocab_size=VOCAB, protected_ids=torch.tensor([]), late=late
        )
    rows = [SampleRow(row_b=0, terms=(term("subtract", "none", 8),))]
    with pytest.raises(ValueError, match="outside"):
        fused_sample(logits, rows, vocab_size=VOCAB, protected_ids=torch.tensor([]), late=late)
    late.hidden_AD[1] = float("nan")
    rows = [SampleRow(row_b=n, terms=(term("relu_difference", "fused", 4 + n),), seed=n) for n in range(4)]
    out = fused_sample(
        logits, rows, vocab_size=VOCAB, protected_ids=torch.tensor([], dtype=torch.int64), late=late
    )
    assert out.status_B.tolist() == [rules.OK, rules.NUMERICAL, rules.OK, rules.OK]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_of", ["head", "bias"])
def test_a_head_that_lacks_tokens_is_refused_before_anything_behind_it_is_read(
    dtype: torch.dtype, rows_of: str
) -> None:
    """A sparse product reads past the end of a matrix without a word."""
    logits, late = streams(0)
    weight = late.weight_WD.to(dtype)
    short = LateRows(late.hidden_AD, weight, torch.zeros(200))
    if rows_of == "head":
        short = LateRows(late.hidden_AD, weight[:200])
    rows = [SampleRow(row_b=0, terms=(term("relu_difference", "fused", 4),), temperature=0.0)]
    ids = torch.tensor([], dtype=torch.int64)
    with pytest.raises(ValueError, match="late rows of 700 tokens"):
        fused_sample(logits, rows, vocab_size=VOCAB, protected_ids=ids, late=short)
    with pytest.raises(ValueError, match="late rows of 700 tokens"):
        fused_score(logits, rows, torch.tensor([1]), vocab_size=VOCAB, protected_ids=ids, late=short)
    shape = SampleShape.of(rows, num_rows=1, first_late=4)
    static = StaticSampler(shape, vocab_size=VOCAB, protected_ids=ids, device=torch.device("cpu"))
    static.fill(rows)
    with pytest.raises(ValueError, match="late rows of 700 tokens"):
        static.run(logits, short)
