"""Puts base, engine and profiles together. Called by LLM and by the server's start; everything that can be
wrong with them is refused here, before the first request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uld_serve.config import EngineSettings
from uld_serve.engine.engine import Engine
from uld_serve.engine.scoring import admit
from uld_serve.model.loading import Base, DType, load_base
from uld_serve.profiles.profile import BaseFacts
from uld_serve.profiles.registry import BUILTIN, Registry, check_base


@dataclass(frozen=True, slots=True)
class Assembly:
    base: Base
    engine: Engine
    registry: Registry


def assemble(
    model: str | None = None,
    *,
    profiles: Sequence[Path] | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    settings: EngineSettings | None = None,
) -> Assembly:
    """Load a base (None: the embedded one) and its profiles (None: the built-in ones, for the embedded base).

    Each profile is verified from its files, checked against the base and replayed. Raises ModelUnsupported or
    ProfileError.
    """
    roots = profiles if profiles is not None else ([BUILTIN] if model is None else [])
    registry = Registry.load_all(roots)
    base = load_base(model, dtype=dtype, device=device)
    engine = Engine.of(base, settings)
    facts = facts_of(base)
    for version in registry:
        check_base(version, facts)
        admit(engine, version)
    return Assembly(base, engine, registry)


def facts_of(base: Base) -> BaseFacts:
    """What a profile's base section is compared with."""
    return BaseFacts(
        id=base.id,
        fingerprint=base.fingerprint,
        tokenizer_hash=base.tokenizer_hash,
        vocab_size=base.vocab_size,
        num_layers=base.num_layers,
    )
