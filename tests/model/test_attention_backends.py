"""Which attention is chosen, what is refused and why, and that both give the same on a step's real geometry."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from flash_stand_in import StandIn
from torch.nn.attention import varlen

from uld_serve.errors import InvalidRequest
from uld_serve.model import attention_backends
from uld_serve.model.attention import Heads, attend
from uld_serve.model.attention_backends import choose, paged_decode, paged_prefill
from uld_serve.model.attention_trial import Trial
from uld_serve.model.geometry import Geometry, SequenceGroup
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.varlen_prefill import varlen_prefill

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class OnCPU(Trial):
    """As if the CPU were the device that is asked for."""

    @classmethod
    def decode(cls, device: torch.device, dtype: torch.dtype, **shape: int) -> Trial:
        return Trial.decode(CPU, dtype, **shape)

    @classmethod
    def prefill(cls, device: torch.device, dtype: torch.dtype, **shape: int) -> Trial:
        return Trial.prefill(CPU, dtype, **shape)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a CUDA device of this kind; trials run in plain torch on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention_backends, "Trial", OnCPU)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    return stand_in


def test_a_cpu_has_torchs_attention() -> None:
    backend = choose(CPU, torch.float32, block_size=16, head_dim=64)
    assert (backend.name, backend.decode, backend.prefill) == ("torch-sdpa", None, None)


def test_a_gpu_has_ours(on_a_gpu: None) -> None:
    backend = choose(CUDA, torch.bfloat16, block_size=16, head_dim=128)
    assert (backend.name, backend.decode, backend.prefill) == ("triton", paged_decode, paged_prefill)
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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"block_size": 16}, "multiple of 256 tokens, not 16"),
        ({"head_dim": 100}, "not 100"),
        ({"device": CPU}, "CUDA device"),
    ],
)
def test_what_torchs_flash_attention_cannot_do_is_refused_by_name(
    on_a_gpu: None, flash: StandIn, changes: dict[str, object], reason: str
) -> None:
    given = {"device": CUDA, "dtype": torch.bfloat16, "block_size": 256, "head_dim": 128} | changes
    device, dtype = given.pop("device"), given.pop("dtype")
    with pytest.raises(InvalidRequest, match=reason):
        choose(device, dtype, name="torch-varlen", **given)
    assert flash.num_calls == 0


def test_a_torch_without_block_tables_is_told_of(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value: None)
    with pytest.raises(InvalidRequest, match=r"2\.13 has"):
        choose(CUDA, torch.bfloat16, block_size=256, head_dim=64, name="torch-varlen")


@pytest.mark.parametrize(("slow", "name"), [("triton", "torch-varlen"), ("torch-varlen", "triton")])
def test_of_two_that_are_right_the_faster_is_taken(
    on_a_gpu: None, flash: StandIn, monkeypatch: pytest.MonkeyPatch, slow: str, name: str
) -> None:
    monkeypatch.setattr(attention_backends, "TIMED_TOKENS", 8)
    seconds = {paged_prefill: 1.0 + (slow == "triton"), varlen_prefill: 1.0 + (slow == "torch-varlen")}
    monkeypatch.setattr(Trial, "seconds", lambda self, attend: seconds[attend])
    backend = choose(CUDA, torch.bfloat16, block_size=256, head_dim=64)
    assert (backend.name, backend.decode) == (name, paged_decode)


def test_an_old_gpu_and_a_missing_package_are_told_apart(
    on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InvalidRequest, match=r"8\.0"):
        choose(CUDA, torch.bfloat16, block_size=16, head_dim=128, name="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="not installed"):
        choose(CUDA, torch.bfloat16, block_size=16, head_dim=128, name="triton")


@pytest.mark.parametrize("kernel", ["decode_attention", "prefill_attention"])
@pytest.mark.parametrize("error", [None, RuntimeError("no kernel image")])
def test_a_kernel_that_fails_its_trial_is_not_used(
    on_a_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception | None,
    kernel: str,
) -> None:
    honest = getattr(attention_backends, kernel)

    def wrong(*pools: torch.Tensor, out_NHD: torch.Tensor, **tables: object) -> torch.Tensor:
        if error is not None:
            raise error
        return honest(*pools, out_NHD=out_NHD, **tables).mul_(1.1)

    monkeypatch.setattr(attention_backends, kernel, wrong)
    assert choose(CUDA, torch.float32, block_size=16, head_dim=64).name == "torch-sdpa"
    assert "trial" in caplog.text
    with pytest.raises(InvalidRequest, match="trial"):
        choose(CUDA, torch.float32, block_size=16, head_dim=64, name="triton")


def test_a_trial_measures_time() -> None:
    trial = Trial.prefill(CPU, torch.float32, block_size=16, head_dim=8)
    assert 0 < trial.seconds(paged_prefill) < 10


def test_a_name_that_nobody_has_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="known: auto, torch-sdpa, triton, torch-varlen"):
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


CHUNKS = [[*range(5, 24), 23, 9], [0, 1, 2, 3, 4, 4], list(range(31, 36))]
"""Positions of three prompts' rows: 19, 5 and 5 target rows; two assistants' rows, one, and none."""


def prompts(
    block_size: int, window: int | None, first_layer: int
) -> tuple[torch.Tensor, SequenceGroup, Heads]:
    heads = Heads(4, 2, 8, 0.4, window)
    cache = KVCache.allocate(
        2, 12, block_size=block_size, num_kv_heads=2, head_dim=8, dtype=torch.float32, device=CPU
    )
    torch.manual_seed(0)
    for pool_YSD in cache.pools_YSD:
        pool_YSD.normal_()
    num_rows, width = sum(map(len, CHUNKS)), max(map(len, CHUNKS))
    order = iter(torch.randperm(num_rows).tolist())
    group = SequenceGroup(
        cache=cache,
        first_layer=first_layer,
        rows_SQ=torch.tensor([[next(order) for _ in own] + [-1] * (width - len(own)) for own in CHUNKS]),
        positions_SQ=torch.tensor([own + [7] * (width - len(own)) for own in CHUNKS]),
        blocks_SB=torch.randperm(12).view(3, 4)[:, : -(-36 // block_size)].contiguous(),
        moves=None,
        first=0,
        same_position=False,
        num_targets=(19, 5, 5),
    )
    return torch.randn(num_rows, heads.num_joint * 8), group, heads


def one_by_one(layer: int, qkv_NX: torch.Tensor, group: SequenceGroup, heads: Heads) -> torch.Tensor:
    """Torch's attention, as prompts have it where no backend takes them."""
    out_NX = qkv_NX.new_empty(qkv_NX.shape[0], heads.num_heads * 8)
    for s, own in enumerate(CHUNKS):
        single = dataclasses.replace(
            group,
            rows_SQ=group.rows_SQ[s : s + 1, : len(own)],
            positions_SQ=group.positions_SQ[s : s + 1, : len(own)],
            blocks_SB=group.blocks_SB[s : s + 1],
            moves=(torch.arange(len(own)), group.rows_SQ[s, : len(own)]),
            masks={},
            tables={},
            _seats={},
            _context_rows=None,
        )
        rows = group.rows_SQ[s, : len(own)].sort().values
        out_NX[rows] = attend(layer, qkv_NX, Geometry((), (single,)), heads)
    return out_NX


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("first_layer", [0, 3])
def test_ours_equals_torchs_attention_on_prompts(window: int | None, first_layer: int) -> None:
    qkv_NX, group, heads = prompts(16, window, first_layer)
    expected = one_by_one(first_layer + 1, qkv_NX, group, heads)
    found = attend(first_layer + 1, qkv_NX, Geometry((), (group,), prefill=paged_prefill), heads)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5, 100])
def test_torchs_flash_attention_is_called_as_it_documents(flash: StandIn, window: int | None) -> None:
    qkv_NX, group, heads = prompts(256, window, 0)
    expected = one_by_one(1, qkv_NX, group, heads)
    found = attend(1, qkv_NX, Geometry((), (group,), prefill=varlen_prefill), heads)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    # The pools themselves, not copies; 6 runs: three chunks and three rows of assistants.
    assert flash.key_pointer == group.cache.pools_YSD[1].data_ptr()
    assert flash.cu_seq_q == [0, 19, 20, 21, 26, 27, 32]
    assert flash.seqused_k == [24, 24, 10, 5, 5, 36]
