"""The Triton attention of prompts against plain torch in fp64, at awkward sizes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import inf, nan

import pytest
import torch
from uld_kernels import attention, prefill_triton

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if not IS_INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """One chunk a sequence: (first position, rows, positions of assistants' rows). Blocks lie shuffled in the pool,
    and every slot past a sequence's last position is NaN."""

    chunks: tuple[tuple[int, int, tuple[int, ...]], ...]
    num_kv_heads: int = 2
    group: int = 1
    width: int = 64
    block_size: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    spare_blocks: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        positions = [[*range(first, first + rows), *own] for first, rows, own in self.chunks]
        lengths = [max(own, default=-1) + 1 for own in positions]
        counts = [-(-length // self.block_size) for length in lengths]
        order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
        width = max(max(counts), 1) + self.spare_blocks
        own = [[order.pop() for _ in range(count)] for count in counts]
        # Block 0 is nobody's: padding of the tables names it.
        self.blocks_SB = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in own], device=DEVICE)
        shape = ((sum(counts) + 1) * self.block_size, self.num_kv_heads, self.width)
        pools = torch.randn(2, *shape, generator=generator).to(self.dtype)
        is_held = torch.zeros(shape[0], dtype=torch.bool)
        for ids, length in zip(own, lengths, strict=True):
            slots = [block * self.block_size + i for block in ids for i in range(self.block_size)]
            is_held[slots[:length]] = True
        pools[:, ~is_held] = nan
        self.keys, self.values = pools.to(DEVICE)
        num_queries, num_rows = max(map(len, positions)), sum(map(len, positions))
        rows = iter(torch.randperm(num_rows, generator=generator).tolist())
        self.rows_SQ = torch.full((len(positions), num_queries), -1)
        self.positions_SQ = torch.zeros_like(self.rows_SQ)
        for s, held in enumerate(positions):
            self.positions_SQ[s, : len(held)] = torch.tensor(held)
            self.rows_SQ[s, : len(held)] = torch.tensor([next(rows) for _ in held])
        self.rows_SQ, self.positions_SQ = self.rows_SQ.to(DEVICE), self.positions_SQ.to(DEVICE)
        heads = self.num_kv_heads * self.group
        query = torch.randn(num_rows, heads, self.width, generator=generator).to(self.dtype)
        self.query = query.to(DEVICE)

    def ours(self, **changes: torch.Tensor) -> torch.Tensor:
        given = {
            "rows_SQ": self.rows_SQ,
            "positions_SQ": self.positions_SQ,
            "blocks_SB": self.blocks_SB,
            "out_NHD": torch.full_like(self.query, 7.0),
        } | changes
        prefill_triton.prefill_attention(
            self.query,
            self.keys,
            self.values,
            block_size=self.block_size,
            scale=0.3,
            window=self.window,
            **given,
        )
        return given["out_NHD"]

    def exact(self) -> torch.Tensor:
        out = torch.full_like(self.query, 7.0, dtype=torch.float64)
        attention.prefill_reference(
            *(pool.double() for pool in (self.query, self.keys, self.values)),
            rows_SQ=self.rows_SQ,
            positions_SQ=self.positions_SQ,
            blocks_SB=self.blocks_SB,
            block_size=self.block_size,
            scale=0.3,
            window=self.window,
            out_NHD=out,
        )
        return out

    def check(self) -> None:
        limit = TOLERANCE[self.dtype]
        torch.testing.assert_close(self.ours().double(), self.exact(), rtol=limit, atol=limit)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 130])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_every_length_of_a_prompt_equals_the_definition(rows: int, group: int) -> None:
    Case(((0, rows, ()),), group=group, seed=rows).check()


@pytest.mark.parametrize("first", [1, 15, 16, 31, 32, 63, 64, 127, 200])
@pytest.mark.parametrize("rows", [1, 20, 33])
def test_a_chunk_may_begin_anywhere(first: int, rows: int) -> None:
    Case(((first, rows, ()),), group=3, width=32, seed=first).check()


@pytest.mark.parametrize("width", [8, 64, 96, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_width_and_dtype_equals_the_definition(width: int, dtype: torch.dtype) -> None:
    """In half precision tiles are 128 rows by 64 tokens."""
    Case(((50, 90, (139,)),), group=4, width=width, dtype=dtype, seed=width).check()


def test_several_sequences_run_in_one_launch() -> None:
    Case(((0, 70, ()), (64, 1, ()), (33, 40, (72, 72)), (0, 5, (2, 4))), group=3, spare_blocks=2).check()


@pytest.mark.parametrize("own", [(7,), (46, 46, 46), (0, 20, 46), tuple(range(47))], ids=len)
def test_rows_of_assistants_see_up_to_their_own_position(own: tuple[int, ...]) -> None:
    """At the last position, at earlier ones, and one at each."""
    Case(((0, 47, own),), group=4, width=32).check()


@pytest.mark.parametrize("window", [1, 16, 33, 65, 1000])
@pytest.mark.parametrize("first", [0, 150])
def test_a_sliding_window_hides_what_lies_before_it(window: int, first: int) -> None:
    Case(((first, 70, (first, first + 69)), (0, 3, ())), group=3, window=window, seed=window).check()


@pytest.mark.parametrize("block_size", [16, 32, 256])
def test_blocks_of_any_size(block_size: int) -> None:
    Case(((40, 230, ()), (0, 33, ())), group=2, width=32, block_size=block_size).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40])
def test_a_row_has_the_same_bits_however_its_prompt_is_cut(dtype: torch.dtype, window: int | None) -> None:
    case = Case(((0, 150, ()), (0, 20, ())), group=3, width=32, dtype=dtype, window=window)
    whole = case.ours()
    for first, end in ((0, 37), (37, 101), (101, 150)):
        rows_SQ = case.rows_SQ[:1, first:end].contiguous()
        positions_SQ = case.positions_SQ[:1, first:end].contiguous()
        cut = case.ours(rows_SQ=rows_SQ, positions_SQ=positions_SQ, blocks_SB=case.blocks_SB[:1])
        assert torch.equal(cut[rows_SQ[0]], whole[rows_SQ[0]])


def test_rows_that_are_not_there_are_neither_read_nor_written() -> None:
    case = Case(((0, 40, ()), (10, 40, ())), group=3, width=32)
    exact = case.exact()
    missing = int(case.rows_SQ[0, 11])
    case.rows_SQ[0, 11] = -1
    case.query[missing] = nan
    ours = case.ours()
    assert torch.equal(ours[missing], torch.full_like(ours[missing], 7.0))
    others = [row for row in range(80) if row != missing]
    torch.testing.assert_close(ours[others].double(), exact[others], rtol=1e-5, atol=1e-5)


def test_a_row_named_twice_has_one_result() -> None:
    """As groups of rows are filled up."""
    case = Case(((0, 33, ()),), group=2, width=32)
    padded = [
        torch.cat([table, table[:, :1].expand(-1, 3)], 1) for table in (case.rows_SQ, case.positions_SQ)
    ]
    assert torch.equal(case.ours(rows_SQ=padded[0], positions_SQ=padded[1]), case.ours())


def test_a_row_without_context_is_zero_and_one_beyond_the_table_nan() -> None:
    case = Case(((0, 32, ()),), group=2, width=32)
    case.positions_SQ[0, 3], case.positions_SQ[0, 5] = -1, 32
    ours, exact = case.ours(), case.exact()
    assert torch.equal(ours[case.rows_SQ[0, 3]], torch.zeros_like(ours[0]))
    assert ours[case.rows_SQ[0, 5]].isnan().all()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("poison", [nan, inf])
def test_nan_and_inf_in_a_context_show_in_its_rows_and_in_no_others(poison: float) -> None:
    case = Case(((0, 40, ()), (0, 40, ())), group=2, width=32)
    case.query.abs_()
    case.keys[int(case.blocks_SB[0, 1]) * 16, :, 0] = poison
    ours = case.ours()
    assert ours[case.rows_SQ[0, 16:]].isnan().any(dim=(1, 2)).all()
    assert ours[case.rows_SQ[1]].isfinite().all()


def test_a_row_whose_scores_are_all_minus_infinity_is_nan() -> None:
    case = Case(((0, 3, ()),), width=32)
    case.keys[int(case.blocks_SB[0, 0]) * 16, :] = -inf
    case.query.abs_()
    assert case.ours()[case.rows_SQ[0, 0]].isnan().all()


def test_tables_of_32_bits_do_too() -> None:
    case = Case(((5, 40, (44,)),), group=2, width=32)
    tables = {name: getattr(case, name).int() for name in ("rows_SQ", "positions_SQ", "blocks_SB")}
    assert torch.equal(case.ours(**tables), case.ours())


def test_pools_and_queries_may_lie_head_by_head() -> None:
    case = Case(((5, 40, (44,)),), group=2, width=32)
    expected = case.ours()
    for name in ("keys", "values", "query"):
        tensor = getattr(case, name).transpose(0, 1).contiguous().transpose(0, 1)
        assert not tensor.is_contiguous()
        setattr(case, name, tensor)
    assert torch.equal(case.ours(out_NHD=torch.empty(expected.shape, device=DEVICE)), expected)
