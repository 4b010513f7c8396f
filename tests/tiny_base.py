"""A tiny seeded Llama with a byte tokenizer, and random-adapter profiles on it, written as real directories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from uld_serve.model.loading import Base
from uld_serve.profiles.probes import Probes
from uld_serve.profiles.profile import BaseSpec, Profile, ProfileVersion, RuleSpec, StreamSpec
from uld_serve.profiles.store import write_profile

NUM_LAYERS = 4
VOCAB_SIZE = 259
EOS_ID = 257
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
BORROWED_MODULES = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_MODULES = ["k_proj", "v_proj", *BORROWED_MODULES]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then <|start|> 256, <|end|> 257 (end of text) and <|pad|> 258."""
    vocab = {char: byte for byte, char in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>", "<|pad|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )


def tiny_config(**changes: object) -> dict[str, object]:
    """Grouped-query attention, and a head padded from 259 to 264 rows as many real models have."""
    return {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "eos_token_id": EOS_ID,
        "pad_token_id": 258,
        "bos_token_id": 256,
        **changes,
    }


def write_base(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """A model directory as `save_pretrained` leaves it. Weights are large enough for peaked distributions."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**tiny_config(initializer_range=0.25, **changes)))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_profile(
    folder: Path,
    base: Base,
    base_dir: Path,
    *,
    rule: dict[str, object],
    streams: list[tuple[str, int, int]],
    seed: int,
    rank: int = 4,
) -> ProfileVersion:
    """A profile with random PEFT adapters, one a stream; `streams` lists (name, fork, exit)."""
    adapters = {
        name: random_adapter(
            folder.parent / f".peft-{folder.name}-{name}", base_dir, fork, exit, seed=seed + i, rank=rank
        )
        for i, (name, fork, exit) in enumerate(streams)
    }
    profile = Profile(
        name=folder.name,
        method="rkld",
        base=base_spec(base),
        streams=tuple(
            StreamSpec(name=name, fork=fork, exit=exit, kv="borrowed", adapter=name)
            for name, fork, exit in streams
        ),
        rule=RuleSpec(**rule),
    )
    return write_profile(folder, profile, adapters=adapters, probes=Probes(), training={"seed": seed})


def base_spec(base: Base) -> BaseSpec:
    return BaseSpec(
        id=base.id,
        fingerprint=base.fingerprint,
        tokenizer=base.tokenizer_hash,
        vocab_size=base.vocab_size,
        num_layers=base.num_layers,
    )


def random_adapter(
    folder: Path,
    base_dir: Path,
    fork: int,
    exit: int,
    *,
    seed: int,
    rank: int = 4,
    modules: list[str] = BORROWED_MODULES,
) -> Path:
    """A PEFT adapter on layers fork..exit-1 with both factors random, as save_pretrained writes it."""
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=modules,
        layers_to_transform=list(range(fork, exit)),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(model, config).save_pretrained(folder)
    return folder


# One profile a rule, with forks at both ends and in between; thresholds wide enough for a 259-token vocabulary.
RULES: dict[str, tuple[dict[str, object], list[tuple[str, int, int]]]] = {
    "late-fork": ({"kind": "relu_difference", "strength": 2.0}, [("assistant", 2, 4)]),
    "truncated": (
        {
            "kind": "subtract",
            "strength": 0.7,
            "filter": {"mode": "plausibility", "tau": 0.01, "min_keep": 64},
        },
        [("assistant", 0, 2)],
    ),
    "pair": (
        {"kind": "pair_linear", "strength": 1.5, "roles": {"q": "retain", "p": "forget"}},
        [("retain", 1, 4), ("forget", 2, 4)],
    ),
    "ranked": (
        {"kind": "pair_rank", "rank_k": 20, "roles": {"q": "retain", "p": "forget"}},
        [("retain", 3, 4), ("forget", 0, 3)],
    ),
    "all-layers": ({"kind": "relu_difference", "strength": 4.0, "protect": True}, [("assistant", 0, 4)]),
}


@dataclass
class Tiny:
    """A base on disk, loaded in fp32, and a profile for every rule."""

    folder: Path
    base: Base
    profiles: dict[str, tuple[Path, ProfileVersion]]

    def version(self, name: str) -> ProfileVersion:
        return self.profiles[name][1]
