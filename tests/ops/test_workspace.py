"""Device memory that samplers of several shapes share: it is lent, never allocated anew, and never too little."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from uld_kernels import SampleShape, Workspace, WorkspaceTooSmall

CPU = torch.device("cpu")
VOCAB_SIZE = 1271
LARGE = SampleShape(8, max_terms=2, num_special=8, needs_normalizers=True, needs_ranks=True, first_late=3)
SMALL = SampleShape(3, max_terms=4, num_special=1)


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("shape", [LARGE, SMALL, SampleShape(1)])
def test_buffers_of_a_shape_lie_apart_aligned_and_inside(shape: SampleShape) -> None:
    workspace = Workspace.of(LARGE, vocab_size=VOCAB_SIZE, device=CPU)
    first = workspace.lend(LARGE, VOCAB_SIZE)["touched"].data_ptr()
    extents = sorted(map(extent, workspace.lend(shape, VOCAB_SIZE).values()))
    assert extents[0][0] == first
    assert extents[-1][1] <= first + workspace.num_bytes
    assert all(end <= begin for (_, end), (begin, _) in pairwise(extents))
    assert all((begin - first) % 512 == 0 for begin, _ in extents)


def test_a_shape_that_needs_one_byte_more_is_refused() -> None:
    needed = Workspace.bytes_for(LARGE, VOCAB_SIZE)
    assert Workspace(needed, CPU).lend(LARGE, VOCAB_SIZE)["listed_ids"].shape == (8, VOCAB_SIZE)
    with pytest.raises(WorkspaceTooSmall, match=f"needs {needed} bytes of workspace, and {needed - 1} were"):
        Workspace(needed - 1, CPU).lend(LARGE, VOCAB_SIZE)


@pytest.mark.parametrize(
    "more",
    [
        {"num_rows": 9},
        {"num_special": 3},
        {"needs_normalizers": True},
        {"needs_ranks": True},
        {"first_late": 2},
    ],
)
def test_what_asks_for_more_needs_more(more: dict[str, int]) -> None:
    assert Workspace.bytes_for(replace(SMALL, **more), VOCAB_SIZE) > Workspace.bytes_for(SMALL, VOCAB_SIZE)
