"""Which attention is chosen, what is refused and why, and that both give the same on a step's real geometry."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from uld_serve.errors import InvalidRequest
from uld_serve.model import attention_backends
from uld_serve.model.attention import Heads, attend
from uld_serve.model.attention_backends import choose, paged_decode
from uld_serve.model.geometry import Geometry, SequenceGroup
from uld_serve.model.kv_cache import KVCache

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a CUDA device of this kind; the trial runs in plain torch on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    trial = attention_backends._gap
    monkeypatch.setattr(attention_backends, "_gap", lambda device, *shape: trial(CPU, *shape))


def test_a_cpu_has_torchs_attention() -> None:
    backend = choose(CPU, torch.float32, block_size=16, head_dim=64)
    assert (backend.name, backend.decode) == ("torch-sdpa", None)


def test_a_gpu_has_ours(on_a_gpu: None) -> None:
    backend = choose(CUDA, torch.bfloat16, block_size=16, head_dim=128)
    assert (backend.name, backend.decode) == ("triton", paged_decode)
    assert choose(CUDA, torch.bfloat16, block_size=16, head_dim=128, name="torch-sdpa").decode is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"block_size": 8}, "not 8"),
        ({"block_size": 48}, "not 48"),
        ({"head_dim": 512}, "not 512"),
        ({"device": CPU}, "CUDA device"),
    ],
)
def test_what_ours_cannot_do_is_refused_by_name_and_left_to_torch_by_auto(
    on_a_gpu: None, changes: dict[str, object], reason: str
) -> None:
    given = {"device": CUDA, "dtype": torch.bfloat16, "block_size": 16, "head_dim": 128} | changes
    device, dtype = given.pop("device"), given.pop("dtype")
    with pytest.raises(InvalidRequest, match=reason):
        choose(device, dtype, name="triton", **given)
    assert choose(device, dtype, **given).name == "torch-sdpa"


def test_an_old_gpu_and_a_missing_package_are_told_apart(
    on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InvalidRequest, match=r"8\.0"):
        choose(CUDA, torch.bfloat16, block_size=16, head_dim=128, name="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="not installed"):
        choose(CUDA, torch.bfloat16, block_size=16, head_dim=128, name="triton")


@pytest.mark.parametrize("error", [None, RuntimeError("no kernel image")])
def test_a_kernel_that_fails_its_trial_is_not_used(
    on_a_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception | None,
) -> None:
    honest = attention_backends.decode_attention

    def wrong(*pools: torch.Tensor, **tables: object) -> torch.Tensor:
        if error is not None:
            raise error
        return honest(*pools, **tables) * 1.1

    monkeypatch.setattr(attention_backends, "decode_attention", wrong)
    assert choose(CUDA, torch.float32, block_size=16, head_dim=64).name == "torch-sdpa"
    assert "trial" in caplog.text
    with pytest.raises(InvalidRequest, match="trial"):
        choose(CUDA, torch.float32, block_size=16, head_dim=64, name="triton")


def test_a_name_that_nobody_has_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="known: auto, torch-sdpa, triton"):
        choose(CPU, torch.float32, block_size=16, head_dim=64, name="flashinfer")


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("first_layer", [0, 3])
def test_ours_equals_torchs_attention_on_a_step(window: int | None, first_layer: int) -> None:
    """Two sequences, the first with an assistant beside its target; the second's rows repeat to fill up."""
    heads = Heads(4, 2, 8, 0.4, window)
    cache = KVCache.allocate(2, 6, block_size=16, num_kv_heads=2, head_dim=8, dtype=torch.float32, device=CPU)
    torch.manual_seed(0)
    for pool in (*cache.keys_SHD, *cache.values_SHD):
        pool.normal_()
    qkv_NX = torch.randn(3, heads.num_joint * 8)
    group = SequenceGroup(
        cache=cache,
        first_layer=first_layer,
        rows_SQ=torch.tensor([[0, 2], [1, 1]]),
        positions_SQ=torch.tensor([[20, 20], [7, 7]]),
        blocks_SB=torch.tensor([[3, 1], [4, 4]]),
        moves=(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 1])),
        first=0,
        same_position=True,
    )
    expected = attend(first_layer + 1, qkv_NX, Geometry((), (group,)), heads)
    out_NX = torch.full_like(expected, 9.0)
    paged_decode(first_layer + 1, qkv_NX, group, heads, out_NX)
    torch.testing.assert_close(out_NX, expected, atol=1e-6, rtol=1e-5)
