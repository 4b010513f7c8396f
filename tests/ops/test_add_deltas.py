"""What an adapter adds, in plain torch, and the arguments that are refused."""

from __future__ import annotations

import pytest
import torch
from uld_kernels.lora import add_deltas


def case() -> dict[str, object]:
    """Two parts over one input: columns 0 to 4 and 5 to 7 of y."""
    generator = torch.Generator().manual_seed(0)
    return {
        "y_NO": torch.randn(4, 8, generator=generator),
        "x_NI": torch.randn(4, 6, generator=generator),
        "A_PIX": torch.randn(3, 6, 4, generator=generator),
        "parts": [
            (torch.randn(3, 2, 5, generator=generator), 0),
            (torch.randn(3, 2, 3, generator=generator), 5),
        ],
        "rows_A": torch.tensor([3, 1, 2]),
        "places_A": torch.tensor([2, 0, -1]),
    }


def test_every_row_gets_its_own_adapters_delta() -> None:
    given = case()
    before = given["y_NO"].clone()
    add_deltas(**given)
    changed = given["y_NO"] - before
    (B_0, _), (B_1, _) = given["parts"]
    for row, place in ((3, 2), (1, 0)):
        shrunk_X = given["x_NI"][row] @ given["A_PIX"][place]
        expected = torch.cat([shrunk_X[:2] @ B_0[place], shrunk_X[2:] @ B_1[place]])
        torch.testing.assert_close(changed[row], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(changed[[0, 2]], torch.zeros(2, 8))


def test_no_rows_and_no_adapters_change_nothing() -> None:
    for changes in (
        {"rows_A": torch.empty(0).long(), "places_A": torch.empty(0).long()},
        {"A_PIX": torch.zeros(0, 6, 4), "parts": [(torch.zeros(0, 2, 5), 0), (torch.zeros(0, 2, 3), 5)]},
    ):
        given = case() | changes
        before = given["y_NO"].clone()
        add_deltas(**given)
        assert torch.equal(given["y_NO"], before)


def test_places_may_be_looked_up_by_the_number_of_an_adapter() -> None:
    given, looked_up = case(), case()
    add_deltas(**given)
    looked_up["places_A"] = torch.tensor([4, 1, 3])
    add_deltas(**looked_up, place_of_Z=torch.tensor([9, 0, 9, -1, 2]))
    assert torch.equal(looked_up["y_NO"], given["y_NO"])
    looked_up = case()
    looked_up["places_A"] = torch.tensor([4, 1, 5])
    add_deltas(**looked_up, place_of_Z=torch.tensor([9, 0, 9, -1, 2]))
    assert torch.equal(looked_up["y_NO"], given["y_NO"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_NI": torch.zeros(4, 5)}, "do not fit"),
        ({"x_NI": torch.zeros(3, 6)}, "do not fit"),
        ({"places_A": torch.tensor([0])}, "do not fit"),
        ({"A_PIX": torch.zeros(3, 6, 5)}, "A shrinks to 5"),
        ({"parts": [(torch.zeros(3, 4, 9), 0)]}, "at column 0"),
        ({"parts": [(torch.zeros(2, 4, 5), 0)]}, "3 places"),
        ({"parts": [(torch.zeros(3, 4, 5), 4)]}, "at column 4"),
        ({"y_NO": torch.zeros(4, 8, dtype=torch.bfloat16)}, "one dtype"),
        ({"y_NO": torch.zeros(8, 4).T}, "contiguous"),
        ({"place_of_Z": torch.zeros(8)[::2]}, "contiguous"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_deltas(**{**case(), **changes})
