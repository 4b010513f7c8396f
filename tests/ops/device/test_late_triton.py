"""Logits of listed tokens against the same in fp64, and that their bits hang on nothing beside them."""

from __future__ import annotations

import os

import pytest
import torch
from uld_kernels import LateRows
from uld_kernels.late_triton import BLOCK_C, NUM_SPLITS, score_listed

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = [] if IS_INTERPRETED else [pytest.mark.gpu]

VOCAB = 400
UNTOUCHED = -77.0
LENGTHS = [0, 1, BLOCK_C - 1, BLOCK_C, BLOCK_C + 1, NUM_SPLITS * BLOCK_C + 5, VOCAB]


def late_rows(width: int, dtype: torch.dtype, *, has_bias: bool = False) -> LateRows:
    generator = torch.Generator().manual_seed(width)
    hidden_AD = torch.randn(3, width, generator=generator).to(DEVICE, dtype)
    weight_WD = torch.randn(VOCAB, width, generator=generator).to(DEVICE, dtype)
    return LateRows(
        hidden_AD, weight_WD, torch.randn(VOCAB, generator=generator).to(DEVICE) if has_bias else None
    )


def lists(lengths: list[int], *, room: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids in falling order; what lies past a list is out of any range."""
    generator = torch.Generator().manual_seed(7)
    ids_BC = torch.full((len(lengths), room), 2**31 - 1, dtype=torch.int32)
    for number, length in enumerate(lengths):
        chosen = torch.randperm(VOCAB, generator=generator)[:length]
        ids_BC[number, :length] = chosen.sort(descending=True).values.int()
    return ids_BC.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def scored(
    late: LateRows, ids_BC: torch.Tensor, counts_B: torch.Tensor, index: list[list[int]]
) -> torch.Tensor:
    index_BM = torch.tensor(index, dtype=torch.int32, device=DEVICE)
    out_BMC = torch.full((*index_BM.shape, ids_BC.shape[1]), UNTOUCHED, device=DEVICE)
    score_listed(late, ids_BC, counts_B, index_BM, out_BMC=out_BMC)
    return out_BMC


@pytest.mark.parametrize(
    ("width", "dtype", "has_bias"),
    [
        (1, torch.float32, False),
        (24, torch.float16, True),
        (300, torch.bfloat16, False),
        (576, torch.float32, True),
    ],
)
def test_listed_logits_equal_those_of_the_whole_head_in_fp64(
    width: int, dtype: torch.dtype, has_bias: bool
) -> None:
    late = late_rows(width, dtype, has_bias=has_bias)
    ids_BC, counts_B = lists(LENGTHS)
    index = [[number % 3, (number + 1) % 3] for number in range(len(LENGTHS))]
    out_BMC = scored(late, ids_BC, counts_B, index)
    exact = LateRows(
        late.hidden_AD.double(),
        late.weight_WD.double(),
        None if late.bias_W is None else late.bias_W.double(),
    )
    whole_AW = exact.hidden_AD @ exact.weight_WD.T + (0.0 if exact.bias_W is None else exact.bias_W)
    for number, length in enumerate(LENGTHS):
        ids = ids_BC[number, :length].long()
        for role, row in enumerate(index[number]):
            ours = out_BMC[number, role]
            torch.testing.assert_close(ours[:length].double(), whole_AW[row, ids], rtol=1e-5, atol=2e-5)
            by_torch = late.scores(row, ids)
            torch.testing.assert_close(ours[:length], by_torch, rtol=1e-5, atol=2e-5)
            assert (ours[length:] == UNTOUCHED).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_scores_are_the_whole_head_in_fp32(dtype: torch.dtype) -> None:
    late = late_rows(300, dtype, has_bias=True)
    exact_AW = late.hidden_AD.double() @ late.weight_WD.double().T + late.bias_W.double()
    whole_AW = late.all_scores()
    assert whole_AW.dtype == torch.float32
    torch.testing.assert_close(whole_AW.double(), exact_AW, rtol=1e-5, atol=1e-4)


def test_a_row_that_is_not_late_and_what_lies_past_a_list_are_left_alone() -> None:
    late = late_rows(24, torch.float32)
    ids_BC, counts_B = lists([5, 40])
    out_BMC = scored(late, ids_BC, counts_B, [[-1, 2], [0, -1]])
    assert (out_BMC[0, 0] == UNTOUCHED).all()
    assert (out_BMC[1, 1] == UNTOUCHED).all()
    assert (out_BMC[0, 1, :5] != UNTOUCHED).all()
    assert (out_BMC[0, 1, 5:] == UNTOUCHED).all()
    assert (out_BMC[1, 0, :40] != UNTOUCHED).all()


def test_bits_of_a_token_hang_on_neither_its_place_nor_what_is_beside_it() -> None:
    late = late_rows(300, torch.bfloat16)
    ids_BC, counts_B = lists([VOCAB, 3])
    everything_BMC = scored(late, ids_BC, counts_B, [[1], [1]])
    by_id = torch.empty(VOCAB, device=DEVICE)
    by_id[ids_BC[0].long()] = everything_BMC[0, 0]
    few = ids_BC[1, :3].long()
    assert torch.equal(everything_BMC[1, 0, :3], by_id[few])
    for place in (0, BLOCK_C - 1, BLOCK_C * NUM_SPLITS + 2):
        alone_BC = torch.zeros((1, VOCAB), dtype=torch.int32, device=DEVICE)
        alone_BC[0, place] = few[0]
        alone = torch.tensor([place + 1], dtype=torch.int32, device=DEVICE)
        assert scored(late, alone_BC, alone, [[1]])[0, 0, place] == by_id[few[0]]


def test_nan_of_one_late_row_stays_in_its_own_lists() -> None:
    late = late_rows(24, torch.float32)
    late.hidden_AD[0] = float("nan")
    ids_BC, counts_B = lists([7, 7])
    out_BMC = scored(late, ids_BC, counts_B, [[0], [1]])
    assert out_BMC[0, 0, :7].isnan().all()
    assert out_BMC[1, 0, :7].isfinite().all()


def test_rows_of_the_head_that_are_wide_apart_are_found() -> None:
    """Padded heads and views have rows further apart than they are wide."""
    late = late_rows(40, torch.float32)
    weight_WD = torch.empty(VOCAB, 64, device=DEVICE)[:, :40].copy_(late.weight_WD)
    ids_BC, counts_B = lists([9])
    ours = scored(LateRows(late.hidden_AD, weight_WD), ids_BC, counts_B, [[2]])
    assert torch.equal(ours, scored(late, ids_BC, counts_B, [[2]]))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"counts_B": torch.zeros(2, dtype=torch.int32)}, "do not go together"),
        ({"ids_BC": torch.zeros(1, 8, dtype=torch.int64)}, "int32"),
        ({"out_BMC": torch.zeros(1, 1, 9)}, "do not go together"),
        ({"out_BMC": torch.zeros(1, 1, 8, dtype=torch.float64)}, "fp32"),
        ({"ids_BC": torch.zeros(8, 1, dtype=torch.int32).T.expand(1, 8)[:, ::2].expand(1, 4)}, "do not go"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(change: dict[str, torch.Tensor], word: str) -> None:
    tensors = {
        "ids_BC": torch.zeros(1, 8, dtype=torch.int32),
        "counts_B": torch.zeros(1, dtype=torch.int32),
        "index_BM": torch.zeros(1, 1, dtype=torch.int32),
        "out_BMC": torch.zeros(1, 1, 8),
    } | change
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=word):
        score_listed(
            late_rows(8, torch.float32), tensors["ids_BC"], tensors["counts_B"], tensors["index_BM"],
            out_BMC=tensors["out_BMC"],
        )  # fmt: skip
