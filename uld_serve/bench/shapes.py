"""Bases of a known shape with random weights, made on the device itself: no checkpoint is read. For timing only;
what such a model says means nothing. Called by subjects."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from uld_serve.errors import InvalidRequest
from uld_serve.model.loading import Base, DType

# Llama's own config files, and two small ones with the same layers.
SHAPES: dict[str, dict[str, object]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}
SEED = 0


def random_base(shape: str, *, dtype: DType, device: torch.device) -> Base:
    """Raises InvalidRequest for a shape that has no name here."""
    if shape not in SHAPES:
        raise InvalidRequest(f"there is no shape '{shape}'; known: {', '.join(SHAPES)}")
    config = LlamaConfig(**SHAPES[shape], bos_token_id=0, eos_token_id=1, pad_token_id=None)
    torch_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
    tokenizer = _numbered_tokens(config.vocab_size)
    return Base(
        id=f"random/{shape}",
        served_name=shape,
        model=_random_model(config, torch_dtype, device),
        tokenizer=tokenizer,
        fingerprint=_digest(f"{shape} seed {SEED}"),
        tokenizer_hash=_digest(f"{config.vocab_size} numbered tokens"),
        vocab_size=config.vocab_size,
        head_width=config.vocab_size,
        num_layers=config.num_hidden_layers,
        eos_ids=(1,),
        dtype=torch_dtype,
        device=device,
    )


def _random_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def _numbered_tokens(vocab_size: int) -> PreTrainedTokenizerFast:
    """A vocabulary of the right size: "<0>", "<1>", …"""
    vocab = {f"<{number}>": number for number in range(vocab_size)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<0>"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
        return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<1>")


def _digest(what: str) -> str:
    return f"sha256:{hashlib.sha256(what.encode()).hexdigest()}"
