"""The Triton decode attention against plain torch in fp64, at awkward sizes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import inf, nan

import pytest
import torch
from uld_kernels import attention, attention_triton

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if not IS_INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """Sequences of these lengths, each with `num_queries` rows; blocks lie shuffled in the pool, and every slot that
    no context holds is NaN."""

    lengths: tuple[int, ...]
    num_queries: int = 1
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
        counts = [-(-length // self.block_size) for length in self.lengths]
        num_blocks = sum(counts) + 1
        order = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        width = max(max(counts), 1) + self.spare_blocks
        own = [[order.pop() for _ in range(count)] for count in counts]
        # Block 0 is nobody's: padding of the tables names it.
        self.blocks_SB = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in own], device=DEVICE)
        shape = (num_blocks * self.block_size, self.num_kv_heads, self.width)
        pools = torch.randn(2, *shape, generator=generator).to(self.dtype)
        is_held = torch.zeros(shape[0], dtype=torch.bool)
        for ids, length in zip(own, self.lengths, strict=True):
            slots = [block * self.block_size + i for block in ids for i in range(self.block_size)]
            is_held[slots[:length]] = True
        pools[:, ~is_held] = nan
        self.keys, self.values = pools.to(DEVICE)
        self.lengths_S = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        num_rows = len(self.lengths) * self.num_queries
        # Rows lie as in a step: the targets first, then their assistants.
        self.rows_SQ = torch.arange(num_rows, device=DEVICE).view(self.num_queries, -1).T.contiguous()
        heads = self.num_kv_heads * self.group
        query = torch.randn(num_rows, heads, self.width, generator=generator).to(self.dtype)
        self.query = query.to(DEVICE)

    def ours(self, **changes: torch.Tensor | None) -> torch.Tensor:
        given = {
            "rows_SQ": self.rows_SQ,
            "blocks_SB": self.blocks_SB,
            "lengths_S": self.lengths_S,
            "out_NHD": torch.full_like(self.query, 7.0),
        } | changes
        attention_triton.decode_attention(
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
        out = torch.empty_like(self.query, dtype=torch.float64)
        attention.reference(
            *(pool.double() for pool in (self.query, self.keys, self.values)),
            rows_SQ=self.rows_SQ,
            blocks_SB=self.blocks_SB,
            lengths_S=self.lengths_S,
            block_size=self.block_size,
            scale=0.3,
            window=self.window,
            out_NHD=out,
        )
        return out

    def check(self) -> None:
        limit = TOLERANCE[self.dtype]
        torch.testing.assert_close(self.ours().double(), self.exact(), rtol=limit, atol=limit)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 300])
@pytest.mark.parametrize(("num_queries", "group"), [(1, 1), (2, 3), (1, 8), (5, 4)])
def test_every_length_equals_the_definition(length: int, num_queries: int, group: int) -> None:
    Case((length, 1), num_queries=num_queries, group=group, seed=length).check()


@pytest.mark.parametrize("width", [8, 64, 96, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_width_and_dtype_equals_the_definition(width: int, dtype: torch.dtype) -> None:
    Case((17, 150), num_queries=2, group=4, width=width, dtype=dtype, seed=width).check()


@pytest.mark.parametrize("window", [1, 16, 65, 200, 1000])
def test_a_sliding_window_hides_what_lies_before_it(window: int) -> None:
    Case((300, 5, 64), group=3, window=window, seed=window).check()


@pytest.mark.parametrize("block_size", [16, 32, 256])
def test_blocks_of_any_size(block_size: int) -> None:
    Case((33, 270), group=2, block_size=block_size).check()


def test_long_contexts_have_longer_chunks_and_no_more_of_them() -> None:
    """5,000 tokens are more than 32 chunks of 128."""
    case = Case((5000, 4097), num_kv_heads=1, width=16, spare_blocks=3)
    assert attention_triton.chunks_of(case.blocks_SB.shape[1] * 16, None, 64) == 32
    case.check()


def test_a_row_has_the_same_bits_alone_and_beside_others() -> None:
    """Beside longer sequences (more chunks launched, a second pass) and with more rows a sequence."""
    together = Case((100, 700, 1), num_queries=3, group=4, dtype=torch.bfloat16)
    alone = together.ours(
        rows_SQ=together.rows_SQ[:1, :1].contiguous(),
        blocks_SB=together.blocks_SB[:1, :8].contiguous(),
        lengths_S=together.lengths_S[:1],
        out_NHD=torch.zeros_like(together.query),
    )
    assert torch.equal(alone[0], together.ours()[0])
    assert alone[0].abs().max() > 0


def test_rows_that_are_not_there_are_neither_read_nor_written() -> None:
    case = Case((20, 300), num_queries=2, group=3)
    exact = case.exact()
    missing = int(case.rows_SQ[0, 1])
    case.rows_SQ[0, 1] = -1
    case.query[missing] = nan
    ours = case.ours()
    assert torch.equal(ours[missing], torch.full_like(ours[missing], 7.0))
    others = [row for row in range(4) if row != missing]
    torch.testing.assert_close(ours[others].double(), exact[others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spare_blocks", [0, 20])
def test_a_sequence_without_context_gives_zeros(spare_blocks: int) -> None:
    """Padding of a batch; with one chunk, and with several."""
    case = Case((0, 9), group=2, spare_blocks=spare_blocks)
    assert torch.equal(case.ours()[0], torch.zeros_like(case.query[0]))
    case.check()


@pytest.mark.parametrize("spare_blocks", [0, 20])
@pytest.mark.parametrize("poison", [nan, inf])
def test_nan_and_inf_in_a_context_show_in_its_rows_and_in_no_others(poison: float, spare_blocks: int) -> None:
    case = Case((30, 30), group=2, spare_blocks=spare_blocks)
    case.keys[int(case.blocks_SB[0, 1]) * 16, :, 0] = poison
    ours = case.ours()
    assert ours[0].isnan().any()
    assert ours[1].isfinite().all()


@pytest.mark.parametrize("spare_blocks", [0, 20])
def test_a_length_beyond_the_table_gives_nan(spare_blocks: int) -> None:
    case = Case((32, 32), spare_blocks=spare_blocks)
    case.lengths_S[0] = (2 + spare_blocks) * 16 + 1
    case.keys.nan_to_num_(), case.values.nan_to_num_()
    ours = case.ours()
    assert ours[0].isnan().all()
    assert ours[1].isfinite().all()


def test_tables_of_32_bits_do_too() -> None:
    case = Case((40, 140), num_queries=2, group=2)
    ours = case.ours(
        rows_SQ=case.rows_SQ.int(), blocks_SB=case.blocks_SB.int(), lengths_S=case.lengths_S.long()
    )
    assert torch.equal(ours, case.ours())


def test_pools_may_lie_head_by_head() -> None:
    case = Case((40, 140), num_queries=2, group=2)
    expected = case.ours()
    case.keys, case.values = (
        pool.transpose(0, 1).contiguous().transpose(0, 1) for pool in (case.keys, case.values)
    )
    assert not case.keys.is_contiguous()
    assert torch.equal(case.ours(), expected)


def test_queries_may_lie_as_a_model_leaves_them() -> None:
    """Head by head, as (H, N, D)."""
    case = Case((40, 140), group=2)
    expected = case.ours()
    case.query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert not case.query.is_contiguous()
    assert torch.equal(case.ours(out_NHD=torch.empty(expected.shape, device=DEVICE)), expected)
