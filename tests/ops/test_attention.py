"""What attention of decode steps and of prompts computes, against torch's own, and the arguments that it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from uld_kernels.attention import decode_attention, prefill_attention

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


def prompts(**changes: object) -> torch.Tensor:
    """Two sequences: a chunk at positions 3 to 8 with an assistant's row at 5, and one row at position 39."""
    generator = torch.Generator().manual_seed(1)
    given = case(dtype=torch.float64)
    given["query_NHD"] = torch.randn(9, 4, 8, generator=generator).double()
    given["rows_SQ"] = torch.tensor([[3, 1, 0, 2, 7, 5, 6], [8, -1, -1, -1, -1, -1, -1]])
    given["positions_SQ"] = torch.tensor([[3, 4, 5, 6, 7, 8, 5], [39, 0, 0, 0, 0, 0, 0]])
    del given["lengths_S"]
    given |= changes
    pools = [given.pop(name) for name in ("query_NHD", "keys_PKD", "values_PKD")]
    return prefill_attention(*pools, **{"block_size": BLOCK_SIZE, **given})


@pytest.mark.parametrize("window", [None, 4, 100])
def test_a_prompts_row_sees_its_context_up_to_its_own_position(window: int | None) -> None:
    """As if each were the only row of a decode step."""
    given = case(dtype=torch.float64)
    out_NHD = prompts(scale=0.2, window=window)
    generator = torch.Generator().manual_seed(1)
    query_NHD = torch.randn(9, 4, 8, generator=generator).double()
    seats = [(0, 3, 3), (0, 1, 4), (0, 0, 5), (0, 2, 6), (0, 7, 7), (0, 5, 8), (0, 6, 5), (1, 8, 39)]
    for sequence, row, position in seats:
        alone = decode_attention(
            query_NHD,
            given["keys_PKD"],
            given["values_PKD"],
            rows_SQ=torch.tensor([[row]]),
            blocks_SB=given["blocks_SB"][sequence : sequence + 1],
            lengths_S=torch.tensor([position + 1]),
            block_size=BLOCK_SIZE,
            scale=0.2,
            window=window,
        )
        torch.testing.assert_close(out_NHD[row], alone[row])
    assert torch.equal(out_NHD[4], torch.zeros(4, 8).double())


def test_what_lies_past_a_prompts_last_row_is_not_read() -> None:
    given = case(dtype=torch.float64)
    pools = {name: given[name].clone() for name in ("keys_PKD", "values_PKD")}
    for pool_PKD in pools.values():
        pool_PKD[4 * BLOCK_SIZE + 9 : 5 * BLOCK_SIZE] = torch.nan
        pool_PKD[BLOCK_SIZE : 2 * BLOCK_SIZE] = torch.nan
    assert torch.equal(prompts(**pools), prompts())


def test_a_prompts_row_without_context_is_zero_and_one_beyond_the_table_nan() -> None:
    positions_SQ = torch.tensor([[3, -1, 5, 6, 7, 48, 5], [39, 0, 0, 0, 0, 0, 0]])
    out_NHD = prompts(positions_SQ=positions_SQ)
    assert torch.equal(out_NHD[1], torch.zeros(4, 8).double())
    assert out_NHD[5].isnan().all()
    assert out_NHD[[0, 2, 3, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions_SQ": torch.zeros(2, 6).long()}, "are not those of rows"),
        ({"positions_SQ": torch.zeros(7, 2).long().T}, "are not those of rows"),
        ({"blocks_SB": torch.zeros(3, 3).long()}, "different numbers of sequences"),
        ({"window": 0}, "window 0"),
    ],
)
def test_tables_of_prompts_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompts(**changes)
