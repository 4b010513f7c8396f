"""Fixtures that several packages' tests share: a tiny base, profiles on it for every rule, an engine, an oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from oracle import Oracle
from tiny_base import write_base, write_tiny_profile

from uld_serve.config import EngineSettings
from uld_serve.engine.engine import Engine
from uld_serve.model.loading import Base, load_base
from uld_serve.profiles.profile import ProfileVersion

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


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Two threads collapse on a busy machine: steps of 20 ms then take seconds.
    torch.set_num_threads(1)


@dataclass
class Tiny:
    """A base on disk, loaded in fp32, and a profile for every rule."""

    folder: Path
    base: Base
    profiles: dict[str, tuple[Path, ProfileVersion]]

    def version(self, name: str) -> ProfileVersion:
        return self.profiles[name][1]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    folder = write_base(root / "tiny-llama")
    base = load_base(str(folder), dtype="float32", device="cpu")
    profiles = {}
    for seed, (name, (rule, streams)) in enumerate(RULES.items()):
        path = root / "profiles" / name
        version = write_tiny_profile(path, base, folder, rule=rule, streams=streams, seed=10 * seed)
        profiles[name] = (path, version)
    return Tiny(folder, base, profiles)


@pytest.fixture(scope="session")
def oracle(tiny: Tiny) -> Oracle:
    return Oracle(tiny.folder, tiny.profiles, vocab_size=tiny.base.vocab_size, control_ids=[256, 257, 258])


@pytest.fixture
def make_engine(tiny: Tiny) -> Callable[..., Engine]:
    """make_engine(max_step_rows=…, …) -> an engine on a freshly loaded tiny base."""

    def make(**settings: int) -> Engine:
        base = load_base(str(tiny.folder), dtype="float32", device="cpu")
        return Engine.of(base, EngineSettings(**settings))

    return make
