"""Any decoder-only model built of layers, norm, rotary embedding and head runs in our loop as in its own; what our
loop cannot reproduce is refused at load, never served wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_base import byte_tokenizer, tiny_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from uld_serve.config import EngineSettings
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import ModelUnsupported
from uld_serve.model.decoder import Decoder
from uld_serve.model.loading import Base

SLIDING = {"sliding_window": 6}
QWEN_SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
SERVED: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": SLIDING,
    "qwen2": QWEN_SLIDING,
    "qwen3": QWEN_SLIDING,
    "qwen3_moe": {},
    "mixtral": {},
    "phi3": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "smollm3": {},
    "granite": {},
    "gemma": {},
    "gemma3_text": SLIDING,
    "glm4": {},
    "starcoder2": {},
    "exaone4": {},
}
REFUSED: dict[str, dict[str, object]] = {
    "gpt2": {},  # no rotary embedding
    "gemma2": {},  # soft-capped attention
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},  # attention sinks
    "cohere": {},  # scales its logits after the head
    "stablelm": {},  # drops keyword arguments on the way to attention
    "granite": {"embedding_multiplier": 12.0},  # scales its embeddings outside the layers
}


def tiny_model(kind: str, changes: dict[str, object]) -> Base:
    config = CONFIG_MAPPING[kind](**{**tiny_config(initializer_range=0.25), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms are made of ones, biases of zeros: these would hide much
        if parameter.dim() == 1:
            parameter += torch.randn(parameter.shape) * 0.2
    return Base(
        id=kind,
        served_name=kind,
        model=model,
        tokenizer=byte_tokenizer(),
        fingerprint="sha256:" + "0" * 64,
        tokenizer_hash="sha256:" + "0" * 64,
        vocab_size=259,
        head_width=264,
        num_layers=4,
        eos_ids=(257,),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("kind", SERVED)
def test_greedy_tokens_equal_the_models_own_forward(kind: str) -> None:
    base = tiny_model(kind, SERVED[kind])
    own = copy.deepcopy(base.model)
    engine = Engine.of(base, EngineSettings(max_step_rows=7, block_size=4))
    prompt = list(b"a prompt longer than the window")
    engine.add("r", prompt, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True), Decision.base())
    got: list[int] = []
    while engine.has_work:
        got += [token_id for delta in engine.step() for token_id in delta.token_ids]
    own.set_attn_implementation("eager")
    ids = list(prompt)
    for _ in range(6):
        logits = own(torch.tensor([ids]), use_cache=False).logits[0, -1, :259]
        ids.append(int(logits.argmax()))
    assert got == ids[len(prompt) :]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_loop_would_get_wrong_is_refused(kind: str) -> None:
    base = tiny_model(kind, REFUSED[kind])
    with pytest.raises(ModelUnsupported) as refusal:
        Decoder.of(base)
    assert (
        type(base.model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        in refusal.value.message
    )
