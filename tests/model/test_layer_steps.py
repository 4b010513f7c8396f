"""Which steps a layer has between its products: what is chosen, what is refused and why, and that both kinds give one
outcome."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from test_architectures import SERVED, tiny_model
from test_fused_layer import FUSED
from uld_kernels import layer

from uld_serve.model import decoder, layer_steps
from uld_serve.model.decoder import Decoder
from uld_serve.model.fused_layer import FusedLayer
from uld_serve.model.layer_steps import KERNELS, TORCH, choose_steps

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a CUDA device; trials run on the CPU, where a kernel's definition stands in for it."""
    trial = layer_steps._gap
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(layer_steps, "_gap", lambda device, dtype: trial(CPU, dtype))


def test_a_cpu_has_torchs_operations() -> None:
    assert choose_steps(CPU, torch.float32) is TORCH


@pytest.mark.parametrize("dtype", layer.HALF_OR_SINGLE)
def test_a_gpu_has_one_launch_a_step(on_a_gpu: None, dtype: torch.dtype) -> None:
    assert choose_steps(CUDA, dtype) is KERNELS


def raises(*given: object, **options: object) -> None:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize("name", ["rms_norm", "rotate", "silu_mul"])
@pytest.mark.parametrize("wrong", [None, raises])
def test_a_kernel_that_fails_its_trial_is_not_used(
    on_a_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    wrong: Callable[..., None] | None,
) -> None:
    honest = getattr(layer, name)

    def slightly_wrong(x: torch.Tensor, *rest: torch.Tensor, **options: object) -> torch.Tensor | None:
        honest(x, *rest, **options)
        return x.mul_(1.1) if name == "rotate" else honest(x, *rest, **options) * 1.1

    changed = wrong or slightly_wrong
    monkeypatch.setattr(layer, name, changed)
    if name == "silu_mul":
        steps = layer_steps.LayerSteps(KERNELS.norm_of, KERNELS.rotate_of, changed)
        monkeypatch.setattr(layer_steps, "KERNELS", steps)
    assert choose_steps(CUDA, torch.bfloat16) is TORCH
    assert "trial" in caplog.text


def test_a_missing_package_and_a_wide_dtype_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_steps(CUDA, torch.float32) is TORCH
    assert "triton is not installed" in caplog.text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_steps(CUDA, torch.float64) is TORCH
    assert "float64" in caplog.text


@pytest.mark.parametrize("kind", sorted(FUSED & set(SERVED)))
def test_layers_whose_steps_are_one_launch_each_reproduce_the_models(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer is compared with Hugging Face's before it is put in."""
    monkeypatch.setattr(decoder, "choose_steps", lambda device, dtype: KERNELS)
    layers = Decoder.of(tiny_model(kind, SERVED[kind])).layers
    assert all(isinstance(one, FusedLayer) for one in layers)
    assert all(one._gate is layer.silu_mul for one in layers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer.rms_norm(torch.zeros(2, 4), torch.zeros(5), eps=0.1), "do not fit"),
        (lambda: layer.rms_norm(torch.zeros(2, 4), torch.zeros(4).double(), eps=0.1), "do not fit"),
        (lambda: layer.rotate(torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.zeros(2, 2)), "do not fit"),
        (lambda: layer.rotate(torch.zeros(2, 3, 5), torch.zeros(2, 5), torch.zeros(2, 5)), "do not fit"),
        (lambda: layer.silu_mul(torch.zeros(2, 5)), "even width"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
