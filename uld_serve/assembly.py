"""Puts base, engine and profiles together. Called by LLM and by the server's start; everything that can be
wrong with them is refused here, before the first request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from uld_serve.config import EngineSettings
from uld_serve.engine.engine import Engine
from uld_serve.engine.ranks import Ranks
from uld_serve.engine.scoring import admit
from uld_serve.errors import ProfileMismatch
from uld_serve.model.loading import Base, DType, Weights, load_base
from uld_serve.profiles.profile import BaseFacts, ProfileVersion
from uld_serve.profiles.registry import BUILTIN, Registry, check_base


@dataclass(frozen=True, slots=True)
class Assembly:
    base: Base
    engine: Engine
    registry: Registry
    roots: tuple[Path, ...]


def assemble(
    model: str | None = None,
    *,
    profiles: Sequence[Path] | None = None,
    more_profiles: Sequence[Path] = (),
    dtype: DType = "auto",
    device: str = "auto",
    settings: EngineSettings | None = None,
    weights: Weights = "stored",
    registry: Registry | None = None,
    ranks: Ranks | None = None,
) -> Assembly:
    """Load a base (None: the embedded one) and its profiles (None: the built-in ones, for the embedded base), and
    `more_profiles` beside them.

    Each profile is verified from its files, checked against the base and replayed; separate models that profiles name
    are loaded too. With a `registry` its versions are served and no others, whatever lies in the roots. With `ranks`,
    this is rank 0 of those who share the base. Raises ModelUnsupported or ProfileError.
    """
    roots = profile_roots(model, profiles)
    registry = Registry.load_all([*roots, *more_profiles]) if registry is None else registry
    part = None if ranks is None else ranks.part
    base = load_base(model, dtype=dtype, device=device, weights=weights, part=part)
    engine = Engine.of(base, settings, ranks)
    facts = facts_of(base)
    for version in registry:
        check_base(version, facts)
    engine.prepare(list(registry), load_models(registry, base))
    for version in registry:
        admit(engine, version)
    return Assembly(base, engine, registry, tuple(roots))


def profile_roots(model: str | None, profiles: Sequence[Path] | None) -> Sequence[Path]:
    """Where a server with these settings looks for profiles."""
    return profiles if profiles is not None else ([BUILTIN] if model is None else [])


def load_models(versions: Iterable[ProfileVersion], base: Base) -> dict[str, Base]:
    """The separate models that profiles name, by fingerprint; each is loaded once, in the base's dtype and on its
    device. Raises ModelUnsupported, or ProfileMismatch when a model is not the one that its profile records."""
    models: dict[str, Base] = {}
    for version in versions:
        for fingerprint, spec in version.models.items():
            if fingerprint in models:
                continue
            dtype: DType = "float32" if base.dtype == torch.float32 else "bfloat16"
            model = load_base(version.locate(spec), dtype=dtype, device=str(base.device))
            if model.fingerprint != fingerprint:
                raise ProfileMismatch(
                    f"profile '{version.name}' was made with model {spec.id} of fingerprint {fingerprint}, but there "
                    f"it is {model.fingerprint}; restore that model or make the profile again"
                )
            models[fingerprint] = model
    return models


def facts_of(base: Base) -> BaseFacts:
    """What a profile's base section is compared with."""
    return BaseFacts(
        id=base.id,
        fingerprint=base.fingerprint,
        tokenizer_hash=base.tokenizer_hash,
        vocab_size=base.vocab_size,
        num_layers=base.num_layers,
    )
