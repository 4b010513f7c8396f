"""SampleShape and StaticSampler on a CPU: a shape covers what it says, a static sampler draws as fused_sample does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from uld_kernels import SampleRow, SampleShape, StaticSampler, Term, fused_sample, rules

HUSH = Term(rules.SUBTRACT, 0.75, 1, row_a=1, filter_mode=rules.PLAUSIBILITY, tau=0.01, min_keep=12)
RANK = Term(rules.PAIR_RANK, 1.0, 2, row_q=1, row_p=2, rank_k=3)
PLAIN = SampleRow(0, seed=3, position=1)
ROWS = [
    PLAIN,
    SampleRow(0, (HUSH,), temperature=0.0, num_logprobs=3),
    SampleRow(0, (HUSH, RANK), seed=4, position=9),
    SampleRow(0, banned_ids=torch.tensor([1, 2]), frequency_penalty=0.5, output_ids=torch.tensor([3, 3])),
]


def sampler(shape: SampleShape) -> StaticSampler:
    ids = torch.tensor([0, 40])
    return StaticSampler(shape, vocab_size=41, protected_ids=ids, device=torch.device("cpu"))


def test_static_sampler_draws_what_fused_sample_draws() -> None:
    shape = SampleShape.of(ROWS, num_rows=8)
    static = sampler(shape)
    for step in range(3):
        logits_RV = torch.randn(3, 41, generator=torch.Generator().manual_seed(step)) * 3
        rows = [replace(row, position=row.position + step) for row in ROWS[: 4 - step]]
        static.fill(rows)
        static.run(logits_RV)
        output = static.output()
        expected = fused_sample(logits_RV, rows, vocab_size=41, protected_ids=torch.tensor([0, 40]))
        assert output.token_ids_B.tolist() == expected.token_ids_B.tolist()
        assert output.status_B.tolist() == expected.status_B.tolist()
        assert output.digests == expected.digests


@pytest.mark.parametrize(
    "row",
    [
        ROWS[1],
        ROWS[2],
        ROWS[3],
        replace(PLAIN, allowed_mask=torch.ones(41, dtype=torch.bool)),
        replace(PLAIN, terms=(RANK,)),
        replace(PLAIN, logit_bias=(torch.tensor([1]), torch.tensor([2.0]))),
    ],
)
def test_a_shape_covers_its_own_rows_and_no_more(row: SampleRow) -> None:
    plain = SampleShape.of([PLAIN], num_rows=4)
    assert SampleShape.of([row], num_rows=4).covers([row, PLAIN])
    assert not SampleShape.of([row], num_rows=4).covers([row] * 5)
    assert plain.covers([PLAIN] * 4)
    if row.terms != (HUSH,):
        assert not plain.covers([row])
    with pytest.raises(ValueError, match="does not cover"):
        sampler(plain).fill([row, replace(row, num_logprobs=9)])


def test_growing_rows_meet_few_shapes() -> None:
    def row(length: int) -> SampleRow:
        return replace(PLAIN, presence_penalty=0.1, output_ids=torch.zeros(length, dtype=torch.int64))

    shapes = {
        SampleShape.of([row(length)] * number, num_rows=8) for length in (1, 200) for number in (5, 6, 8)
    }
    assert len(shapes) == 2
