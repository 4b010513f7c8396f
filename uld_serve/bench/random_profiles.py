"""Profiles with random adapters of a given shape, made in memory. They forget nothing; they cost what real ones
cost. Called by subjects."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

from uld_serve.errors import InvalidRequest
from uld_serve.model.borrowed import decoder_parts
from uld_serve.model.loading import Base
from uld_serve.profiles.adapter import KEY_VALUE_MODULES, MODULES, LoraAdapter
from uld_serve.profiles.probes import Probes
from uld_serve.profiles.profile import BaseSpec, Profile, ProfileVersion, RuleSpec, StreamSpec

Rule = Literal["relu_difference", "subtract"]
STRENGTHS: dict[Rule, float] = {"relu_difference": 2.0, "subtract": 0.75}
STREAM = "assistant"
# Small enough that a random adapter leaves scores finite, large enough that its product is not zeros.
STANDARD_DEVIATION = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShape:
    """One assistant over layers fork..exit-1 with LoRA of `rank` on every linear layer that its kv lets it use."""

    fork: int
    exit: int
    rank: int
    kv: Literal["borrowed", "own"] = "borrowed"
    rule: Rule = "relu_difference"

    @property
    def modules(self) -> tuple[str, ...]:
        dropped = KEY_VALUE_MODULES if self.kv == "borrowed" else frozenset()
        return tuple(module for module in MODULES.values() if module not in dropped)


def random_profile(base: Base, shape: AdapterShape, number: int) -> ProfileVersion:
    """The same profile for the same number. Raises InvalidRequest when the base has not the layers."""
    if not 0 <= shape.fork < shape.exit <= base.num_layers or shape.rank < 1:
        raise InvalidRequest(
            f"an assistant over layers {shape.fork} to {shape.exit - 1} of rank {shape.rank} does not fit a base of "
            f"{base.num_layers} layers"
        )
    name = f"random-{number}"
    profile = Profile(
        name=name,
        method="random",
        base=BaseSpec(
            id=base.id,
            fingerprint=base.fingerprint,
            tokenizer=base.tokenizer_hash,
            vocab_size=base.vocab_size,
            num_layers=base.num_layers,
        ),
        streams=(StreamSpec(name=STREAM, fork=shape.fork, exit=shape.exit, kv=shape.kv, adapter=STREAM),),
        rule=RuleSpec.model_validate({"kind": shape.rule, "strength": STRENGTHS[shape.rule]}),
    )
    adapter = LoraAdapter(
        rank=shape.rank, alpha=2.0 * shape.rank, tensors=_random_tensors(base, shape, number)
    )
    digest = f"sha256:{hashlib.sha256(f'{name} {shape}'.encode()).hexdigest()}"
    return ProfileVersion(profile=profile, digest=digest, adapters={STREAM: adapter}, probes=Probes())


def _random_tensors(base: Base, shape: AdapterShape, number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator(base.device).manual_seed(number)
    layers = decoder_parts(base.model).layers
    tensors = {}
    for index in range(shape.fork, shape.exit):
        for module in shape.modules:
            weight_OI = layers[index].get_submodule(module).weight
            rows, columns = weight_OI.shape  # type: ignore[misc]
            for part, size in (("lora_A", (shape.rank, columns)), ("lora_B", (rows, shape.rank))):
                noise = torch.randn(size, generator=generator, device=base.device)
                tensors[f"layers.{index}.{module}.{part}"] = (noise * STANDARD_DEVIATION).to(base.dtype)
    return tensors
