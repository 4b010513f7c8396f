"""Fused layers give what the Hugging Face layers give that they replace; what they cannot reproduce stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_architectures import SERVED, tiny_model
from torch import nn

from uld_serve.model.adapter_bank import AdapterBank
from uld_serve.model.borrowed import decoder_parts
from uld_serve.model.decoder import Decoder
from uld_serve.model.fused_layer import FusedLayer
from uld_serve.model.layer_steps import RootMeanSquare
from uld_serve.model.lora import LoraLinear

FUSED = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"}


@pytest.mark.parametrize("kind", SERVED)
def test_layers_of_llamas_build_are_fused(kind: str) -> None:
    decoder = Decoder.of(tiny_model(kind, SERVED[kind]))
    assert all(isinstance(layer, FusedLayer) == (kind in FUSED) for layer in decoder.layers)


def doubled_residual(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda hidden, **kwargs: 2 * forward(hidden, **kwargs)


def rotates_nothing(layer: nn.Module) -> None:
    forward = layer.forward

    def unrotated(
        hidden: torch.Tensor, *, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: object
    ) -> object:
        cos, sin = position_embeddings
        tables = torch.ones_like(cos), torch.zeros_like(sin)
        return forward(hidden, position_embeddings=tables, **kwargs)

    layer.forward = unrotated


def another_activation(layer: nn.Module) -> None:
    layer.mlp.act_fn = nn.GELU()


def norm_by_one_plus_weight(layer: nn.Module) -> None:
    norm = layer.input_layernorm
    forward = norm.forward
    norm.forward = lambda hidden: forward(hidden) * (1 + norm.weight) / norm.weight


def other_scores_far_away(layer: nn.Module) -> None:
    """As Ministral scales queries."""
    forward = layer.forward

    def scaled(hidden: torch.Tensor, *, position_ids: torch.Tensor, **kwargs: object) -> object:
        far = 1 + 0.1 * (position_ids[0, :, None] > 200)
        return forward(hidden * far, position_ids=position_ids, **kwargs)

    layer.forward = scaled


@pytest.mark.parametrize(
    "change", [doubled_residual, another_activation, norm_by_one_plus_weight, other_scores_far_away]
)
def test_a_layer_of_that_build_with_another_outcome_stays(change: Callable[[nn.Module], None]) -> None:
    base = tiny_model("llama", {})
    own = decoder_parts(base.model).layers[2]
    change(own)
    decoder = Decoder.of(base)
    assert [isinstance(layer, FusedLayer) for layer in decoder.layers] == [True, True, False, True]
    assert decoder.layers[2] is own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_computed_in_fp32(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(5, 64) * 100).to(dtype), torch.randn(64).to(dtype)
    expected = nn.functional.rms_norm(x.float(), (64,), weight.float(), 1e-5).to(dtype)
    found = RootMeanSquare(weight, 1e-5)(x)
    torch.testing.assert_close(found, expected)
    assert found.dtype == dtype
    assert torch.equal(
        RootMeanSquare(weight, 1e-5)(torch.zeros(1, 64, dtype=dtype)), torch.zeros(1, 64).to(dtype)
    )


def test_a_layer_without_rotation_is_fused_without() -> None:
    base = tiny_model("llama", {})
    rotates_nothing(decoder_parts(base.model).layers[2])
    decoder = Decoder.of(base)
    assert [layer.rotates for layer in decoder.layers if isinstance(layer, FusedLayer)] == [
        True,
        True,
        False,
        True,
    ]


class Adapter:
    """On every linear layer of layer 1."""

    scaling = 2.0

    def __init__(self, layer: nn.Module) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tensors: dict[str, torch.Tensor] = {}
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                shapes = {"lora_A": (3, module.in_features), "lora_B": (module.out_features, 3)}
                for part, shape in shapes.items():
                    self.tensors[f"layers.1.{name}.{part}"] = torch.randn(shape, generator=generator) * 0.1


def test_an_adapter_changes_a_fused_layer_as_it_changes_the_layers_it_joins() -> None:
    base = tiny_model("llama", {})
    adapter = Adapter(decoder_parts(base.model).layers[1])
    apart = copy.deepcopy(decoder_parts(base.model).layers)
    bank = AdapterBank(apart, base.device)
    slot = bank.acquire("a", lambda: adapter)
    fused = Decoder.of(base)
    joined = fused.layers[1]
    assert isinstance(joined, FusedLayer)
    fused.bank.acquire("a", lambda: adapter)
    assert fused.bank.resident_bytes == bank.resident_bytes == sum(t.nbytes for t in adapter.tensors.values())
    x_ND, wide_NI = torch.randn(6, 32), torch.randn(6, base.model.config.intermediate_size)
    for rows in (bank.rows, fused.bank.rows):
        rows.seat(4, [slot, slot], base.device)
    attention, mlp = apart[1].self_attn, apart[1].mlp
    assert isinstance(attention.q_proj, LoraLinear)

    def of(*linears: nn.Module, x: torch.Tensor = x_ND) -> torch.Tensor:
        return torch.cat([linear(x[None])[0] for linear in linears], dim=-1)

    torch.testing.assert_close(joined.qkv(x_ND), of(attention.q_proj, attention.k_proj, attention.v_proj))
    torch.testing.assert_close(joined.gate_up(x_ND), of(mlp.gate_proj, mlp.up_proj))
    torch.testing.assert_close(joined.out(x_ND, x_ND), x_ND + of(attention.o_proj))
    torch.testing.assert_close(joined.down(wide_NI, x_ND), x_ND + of(mlp.down_proj, x=wide_NI))
