"""The Triton deltas against plain torch in fp64: any mix of adapters, widths that fill no tile."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from uld_kernels import lora, lora_triton

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if not IS_INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """Target rows without an adapter, then one row a place; columns of y that belong to no part must stay."""

    places: tuple[int, ...]
    num_targets: int = 3
    width: int = 40
    rank: int = 4
    sizes: tuple[int, ...] = (24,)
    gap: int = 0
    dtype: torch.dtype = torch.float32
    num_places: int = 4
    seed: int = 0
    place_of: torch.Tensor | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * 0.3).to(self.dtype).to(DEVICE)

        num_rows = self.num_targets + len(self.places)
        self.x = random(num_rows, self.width)
        self.y = random(num_rows, sum(self.sizes) + self.gap * (len(self.sizes) + 1))
        self.A = random(self.num_places, self.width, self.rank * len(self.sizes))
        firsts = [self.gap + sum(self.sizes[:n]) + n * self.gap for n in range(len(self.sizes))]
        self.parts = [
            (random(self.num_places, self.rank, size), first)
            for size, first in zip(self.sizes, firsts, strict=True)
        ]
        self.rows = torch.arange(self.num_targets, num_rows, device=DEVICE)
        self.places_A = torch.tensor(self.places, device=DEVICE)

    def ours(self) -> torch.Tensor:
        y = self.y.clone()
        seats = lora.Seats(self.rows, self.places_A, self.place_of)
        if self.rows.shape[0] and self.A.shape[0]:
            lora_triton.expand(
                y, lora_triton.shrink(self.x, self.A, **seats.tables), self.parts, **seats.tables
            )
        return y

    def exact(self) -> torch.Tensor:
        y = self.y.double()
        parts = [(B.double(), first) for B, first in self.parts]
        lora.reference(y, self.x.double(), self.A.double(), parts, rows_A=self.rows, places_A=self.places_A)
        return y

    def check(self) -> None:
        limit = TOLERANCE[self.dtype]
        ours = self.ours()
        torch.testing.assert_close(ours.double(), self.exact(), rtol=limit, atol=limit)
        assert torch.equal(ours[: self.num_targets], self.y[: self.num_targets])


@pytest.mark.parametrize(
    "places",
    [
        (0,),
        (2, 2, 2),
        (0, 1, 2, 3),
        (3, 0, 3, 0),
        (-1, 1, -1),
        (-1,),
        tuple(range(4)) * 5,
        (1,) * 17 + (2,) * 16,
    ],
    ids=str,
)
def test_any_mix_of_adapters_equals_the_definition(places: tuple[int, ...]) -> None:
    Case(places).check()


@pytest.mark.parametrize("width", [1, 63, 512, 513, 1100])
@pytest.mark.parametrize("rank", [1, 16, 33])
def test_every_width_and_rank_equals_the_definition(width: int, rank: int) -> None:
    Case((0, 3), width=width, rank=rank, seed=width).check()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype_equals_the_definition(dtype: torch.dtype) -> None:
    Case((0, 1, 1), width=200, rank=8, sizes=(130,), dtype=dtype).check()


@pytest.mark.parametrize("gap", [0, 5])
def test_parts_share_one_input_and_leave_the_columns_between_them(gap: int) -> None:
    case = Case((1, 2, 2), sizes=(24, 9, 140), gap=gap)
    case.check()
    assert gap == 0 or torch.equal(case.ours()[:, :gap], case.y[:, :gap])


@pytest.mark.parametrize(("num_parts", "launches"), [(1, 2), (2, 2), (3, 2), (4, 3), (7, 4)])
def test_parts_are_expanded_in_one_launch_up_to_three(
    num_parts: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    for name in ("_shrink_kernel", "_expand_kernel"):
        kernel = getattr(lora_triton, name)

        class Counted:
            def __getitem__(self, grid: tuple[int, ...], kernel: object = kernel, name: str = name) -> object:
                counted.append(name)
                return kernel[grid]

        monkeypatch.setattr(lora_triton, name, Counted())
    Case((1, 2, -1), sizes=tuple(33 + 50 * n for n in range(num_parts)), gap=3).check()
    assert len(counted) == launches


def test_a_wide_input_has_wider_slices_and_no_more_of_them() -> None:
    assert [lora_triton.slices_of(width) for width in (40, 4096, 14336)] == [(512, 1), (512, 8), (896, 16)]
    Case((0, 1), width=9000, rank=2).check()


def test_a_row_has_the_same_bits_alone_and_beside_others() -> None:
    together = Case((0, 0, 1, 2, 2, 3), width=700, rank=8, dtype=torch.bfloat16)
    expected = together.ours()
    y = together.y.clone()
    seats = lora.Seats(together.rows[4:5].clone(), together.places_A[4:5].clone())
    lora_triton.expand(
        y, lora_triton.shrink(together.x, together.A, **seats.tables), together.parts, **seats.tables
    )
    assert torch.equal(y[7], expected[7])
    assert not torch.equal(y[7], together.y[7])


def test_nothing_is_read_of_other_adapters() -> None:
    case = Case((0, 2))
    case.A[1], case.A[3] = torch.nan, torch.nan
    for B, _ in case.parts:
        B[1], B[3] = torch.nan, torch.nan
    assert case.ours().isfinite().all()


def test_places_may_be_looked_up_by_the_number_of_an_adapter() -> None:
    """Adapter 3 has none here; 7 is nobody yet."""
    case = Case((2, 2, -1, 0, 1))
    expected = case.ours()
    case.place_of = torch.tensor([9, 1, 9, -1, 2, 0, 9], device=DEVICE)
    case.places_A = torch.tensor((4, 4, 3, 5, 1), device=DEVICE)
    assert torch.equal(case.ours(), expected)
    case.places_A = torch.tensor((4, 4, 7, 5, 1), device=DEVICE)
    assert torch.equal(case.ours(), expected)


def test_tables_of_32_bits_do_too() -> None:
    case = Case((0, 2, 2))
    expected = case.ours()
    case.rows, case.places_A = case.rows.int(), case.places_A.int()
    assert torch.equal(case.ours(), expected)
