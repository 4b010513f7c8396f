"""The Triton steps of a layer against plain torch in fp64, at awkward sizes."""

from __future__ import annotations

import os

import pytest
import torch
from uld_kernels import layer, layer_triton

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if not IS_INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def assert_close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    limit = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.double(), exact, rtol=limit, atol=limit)


@pytest.mark.parametrize("width", [1, 41, 512, 576, 1271, 4096])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_norm_equals_the_definition(width: int, dtype: torch.dtype) -> None:
    x, weight = random(5, width, dtype=dtype), random(width, seed=1)
    exact = layer.rms_norm_reference(x.double(), weight.double(), eps=1e-5)
    assert_close(layer_triton.rms_norm(x, weight, eps=1e-5), exact)


def test_a_norm_reads_rows_and_columns_that_lie_apart() -> None:
    x, weight = random(41, 6).T[::2], random(41, seed=1)
    exact = layer.rms_norm_reference(x.double(), weight.double(), eps=1e-5)
    assert_close(layer_triton.rms_norm(x, weight, eps=1e-5), exact)


def test_rows_of_zeros_and_of_nan_stay_so() -> None:
    x = random(3, 41)
    x[0], x[2] = 0, torch.nan
    out = layer_triton.rms_norm(x, random(41), eps=1e-5)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].isfinite().all()
    assert out[2].isnan().all()


@pytest.mark.parametrize("width", [2, 16, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_norm", [False, True])
def test_a_rotation_equals_the_definition_and_touches_its_heads_only(
    width: int, dtype: torch.dtype, has_norm: bool
) -> None:
    """As a layer has them: queries and keys of a row, then values that are not rotated; 1 to 9 heads."""
    for num_heads in (1, 4, 9):
        joint = random(3, num_heads + 2, width, dtype=dtype)
        cos, sin = random(2, 3, 1, width, dtype=dtype, seed=1)[:, :, 0]
        weight = random(num_heads, width, seed=2) if has_norm else None
        exact = joint.double()
        layer.rotate_reference(exact[:, :num_heads], cos.double(), sin.double(), weight_HW=weight, eps=1e-6)
        ours = joint.clone()
        layer_triton.rotate(ours[:, :num_heads], cos, sin, weight_HW=weight, eps=1e-6)
        assert_close(ours, exact)
        assert torch.equal(ours[:, num_heads:], joint[:, num_heads:])


@pytest.mark.parametrize("width", [1, 41, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_gate_equals_the_definition(width: int, dtype: torch.dtype) -> None:
    joint = random(4, 2 * width, dtype=dtype) * 4
    assert_close(layer_triton.silu_mul(joint), layer.silu_mul_reference(joint.double()))


def test_large_gates_are_open_or_shut() -> None:
    joint = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    torch.testing.assert_close(
        layer_triton.silu_mul(joint), torch.tensor([[0.0, 0, 200, 2e4]], device=DEVICE)
    )


def test_no_rows_are_no_work() -> None:
    assert layer_triton.rms_norm(random(0, 8), random(8), eps=1e-5).shape == (0, 8)
    assert layer_triton.silu_mul(random(0, 8)).shape == (0, 4)
    layer_triton.rotate(random(0, 2, 8), random(0, 8), random(0, 8), weight_HW=None, eps=0.0)
