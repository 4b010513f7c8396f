"""Draws over many tokens against noise computed for every one of them."""

from __future__ import annotations

import pytest
import torch
from uld_kernels.lottery import Lot, draw
from uld_kernels.noise import Stream, gumbel_noise


def whole(lot: Lot) -> int:
    noise = gumbel_noise(lot.ids_K, Stream.of([lot.seed], [lot.position]))[0]
    return int(lot.ids_K[(lot.z_K + noise).argmax()])


def random_lot(size: int, *, share: float, spread: float, number: int) -> Lot:
    generator = torch.Generator().manual_seed(number)
    ids = torch.arange(size)
    if share < 1:
        ids = ids[torch.rand(size, generator=generator) < share]
    return Lot(ids, spread * torch.randn(len(ids), generator=generator), number * 2**40 + 1, number)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("share", [1.0, 0.99, 0.2, 0.03])
def test_narrowed_draw_is_the_whole_draw(share: float, spread: float) -> None:
    lots = [
        random_lot(size, share=share, spread=spread, number=n)
        for n, size in enumerate((300, 5003, 49_152) * 4)
    ]
    assert draw(lots) == [whole(lot) for lot in lots]
    assert draw(lots[::-1]) == [whole(lot) for lot in lots[::-1]], "the other lots of a call do not matter"


def test_one_token_needs_no_luck_and_no_lot_gives_nothing() -> None:
    assert draw([Lot(torch.tensor([7]), torch.tensor([-80.0]), 1, 1)]) == [7]
    assert draw([]) == []


def test_flat_weights_are_drawn_evenly() -> None:
    ids = torch.arange(4096)
    drawn = draw([Lot(ids, torch.zeros(4096), 5, position) for position in range(4000)])
    sixteenths = torch.bincount(torch.tensor(drawn) // 256, minlength=16)
    chi_square = ((sixteenths - 250.0) ** 2 / 250.0).sum().item()
    assert chi_square < 37.7  # 15 degrees of freedom, the 0.1 % point
    assert len(set(drawn)) > 2400  # 4,000 even draws hit 2,556 of 4,096 tokens on average
