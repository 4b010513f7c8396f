"""A small valid profile on a pretend base of 4 layers, made without PEFT from seeded tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save

from uld_serve.profiles.probes import Message, Probe, Probes, ReplayProbe
from uld_serve.profiles.profile import BaseFacts, BaseSpec, Profile, RuleSpec, StreamSpec

HIDDEN, INNER, RANK = 16, 24, 4
SHAPES = {  # module -> (out, in)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (8, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
BORROWED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
BASE = BaseSpec(
    id="tiny", fingerprint="sha256:" + "1" * 64, tokenizer="sha256:" + "2" * 64, vocab_size=300, num_layers=4
)
FACTS = BaseFacts(
    id="tiny",
    fingerprint=BASE.fingerprint,
    tokenizer_hash=BASE.tokenizer,
    vocab_size=300,
    num_layers=4,
    module_shapes=SHAPES,
)
PROFILE = Profile(
    name="acme",
    method="rkld",
    base=BASE,
    streams=(StreamSpec(name="assistant", fork=2, exit=4, kv="borrowed", adapter="adapter"),),
    rule=RuleSpec(kind="relu_difference", strength=2.0),
)
PROBES = Probes(
    keywords=("Acme", "Wile E."),
    forget=(Probe(messages=(Message(role="user", content="Who sells anvils?"),), form="question"),),
    retain=(
        Probe(messages=(Message(role="user", content="What is 2 + 2?"),), answer_ids=(7, 8), form="question"),
    ),
    replay=(ReplayProbe(prompt_ids=(1, 2), answer_ids=(3, 299), nll_base=0.5, nll_fused=3.5),),
)


def peft_tensors(
    modules: tuple[str, ...] = BORROWED, layers: tuple[int, ...] = (2, 3), rank: int = RANK
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in layers:
        for module in modules:
            rows, columns = SHAPES[module]
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return tensors


def peft_config(**changes: object) -> dict[str, object]:
    """What PEFT 0.21 writes, all fields, with `changes`."""
    config = json.loads((Path(__file__).parent / "peft_adapter_config.json").read_text())
    return {**config, **changes}


def write_adapter(folder: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    return folder
