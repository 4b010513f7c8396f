"""What decode attention computes, against torch's own attention, and the arguments that it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from uld_kernels.attention import decode_attention

BLOCK_SIZE = 16


def case(
    *,
    num_queries: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Two sequences of 20 and 40 tokens whose blocks lie in no order."""
    generator = torch.Generator().manual_seed(0)
    query_NHD = torch.randn(2 * num_queries, heads, width, generator=generator).to(dtype)
    keys_PKD, values_PKD = torch.randn(2, 6 * BLOCK_SIZE, kv_heads, width, generator=generator).to(dtype)
    return {
        "query_NHD": query_NHD,
        "keys_PKD": keys_PKD,
        "values_PKD": values_PKD,
        "rows_SQ": torch.arange(2 * num_queries).view(2, num_queries),
        "blocks_SB": torch.tensor([[4, 1, 0], [5, 2, 3]]),
        "lengths_S": torch.tensor([20, 40]),
    }


def run(given: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    given = dict(given)
    pools = [given.pop(name) for name in ("query_NHD", "keys_PKD", "values_PKD")]
    return decode_attention(*pools, **{"block_size": BLOCK_SIZE, **given, **options})


@pytest.mark.parametrize("window", [None, 7, 100])
def test_equals_torch_attention_over_the_gathered_context(window: int | None) -> None:
    given = case(dtype=torch.float64)
    out_NHD = run(given, scale=0.2, window=window)
    for rows_Q, blocks_B, length in zip(
        given["rows_SQ"], given["blocks_SB"], given["lengths_S"].tolist(), strict=True
    ):
        slots = [int(b) * BLOCK_SIZE + i for b in blocks_B for i in range(BLOCK_SIZE)][:length]
        keys, values = (given[name][slots[-(window or length) :]] for name in ("keys_PKD", "values_PKD"))
        query = given["query_NHD"][rows_Q]
        expected = F.scaled_dot_product_attention(
            query.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), scale=0.2, enable_gqa=True
        )
        torch.testing.assert_close(out_NHD[rows_Q], expected.transpose(0, 1))


def test_the_scale_is_that_of_the_width_unless_given() -> None:
    assert torch.equal(run(case()), run(case(), scale=8**-0.5))


def test_rows_that_nobody_names_are_zero_or_left_alone() -> None:
    given = case()
    given["rows_SQ"][1, 1] = -1
    assert torch.equal(run(given)[3], torch.zeros(4, 8))
    out_NHD = torch.full((4, 4, 8), 7.0)
    assert run(given, out_NHD=out_NHD) is out_NHD
    assert torch.equal(out_NHD[3], torch.full((4, 8), 7.0))


def test_no_context_gives_zeros_and_one_beyond_the_table_nan() -> None:
    given = case()
    given["lengths_S"] = torch.tensor([0, 49])
    out_NHD = run(given)
    assert torch.equal(out_NHD[:2], torch.zeros(2, 4, 8))
    assert out_NHD[2:].isnan().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_NHD": torch.zeros(4, 3, 8)}, "do not fit keys"),
        ({"query_NHD": torch.zeros(4, 4, 8, dtype=torch.bfloat16)}, "one dtype"),
        ({"keys_PKD": torch.zeros(96, 2, 4)}, "do not fit keys"),
        ({"lengths_S": torch.tensor([1])}, "different numbers of sequences"),
        ({"block_size": 20}, "block_size 20"),
        ({"window": 0}, "window 0"),
        ({"blocks_SB": torch.zeros(3, 2, dtype=torch.long).T}, "contiguous"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run({**case(), **changes})


def test_heads_too_wide_for_a_program_are_refused() -> None:
    with pytest.raises(ValueError, match="up to 256"):
        run(case(width=264))
