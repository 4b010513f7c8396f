"""Shapes are those of the models that they are named for, and what is made of them is the same every time."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from uld_serve.bench.random_profiles import AdapterShape, random_profile
from uld_serve.bench.shapes import SHAPES, random_base
from uld_serve.errors import InvalidRequest

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "parameters"), [("llama-3.1-8b", 8_030_261_248), ("smollm2-135m", 134_515_008)]
)
def test_shape_has_the_parameters_of_its_model(shape: str, parameters: int) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    assert sum(tensor.numel() for tensor in model.parameters()) == parameters


def test_two_bases_of_one_shape_are_equal() -> None:
    first, second = (random_base("tiny", dtype="auto", device=CPU) for _ in range(2))
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert first.fingerprint == second.fingerprint
    assert {tensor.dtype for tensor in first.model.parameters()} == {torch.bfloat16}
    assert len(first.tokenizer) == first.vocab_size == 512


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"llama-3\.1-8b"):
        random_base("gpt-5", dtype="auto", device=CPU)


def test_random_profiles_differ_by_number_only() -> None:
    base = random_base("tiny", dtype="float32", device=CPU)
    shape = AdapterShape(fork=1, exit=3, rank=2)
    first, again, other = (random_profile(base, shape, number) for number in (0, 0, 1))
    key = "layers.2.mlp.down_proj.lora_B"
    assert first.digest == again.digest != other.digest
    assert torch.equal(first.adapters["assistant"].tensors[key], again.adapters["assistant"].tensors[key])
    assert not torch.equal(first.adapters["assistant"].tensors[key], other.adapters["assistant"].tensors[key])


def test_only_an_assistant_with_its_own_kv_adapts_keys_and_values() -> None:
    borrowed = AdapterShape(fork=0, exit=1, rank=2)
    own = AdapterShape(fork=0, exit=1, rank=2, kv="own")
    assert set(own.modules) - set(borrowed.modules) == {"self_attn.k_proj", "self_attn.v_proj"}
