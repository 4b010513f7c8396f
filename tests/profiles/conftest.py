"""Fixtures of the profile tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_profile import PROBES, PROFILE, peft_config, peft_tensors, write_adapter

from uld_serve.profiles.profile import ProfileVersion, RuleSpec
from uld_serve.profiles.store import write_profile


@pytest.fixture
def make_profile(tmp_path: Path) -> Callable[..., tuple[Path, ProfileVersion]]:
    """make_profile("acme", strength=...) -> (directory, version as written)."""

    def make(
        name: str = "acme", *, root: Path | None = None, strength: float = 2.0
    ) -> tuple[Path, ProfileVersion]:
        adapter = tmp_path / f"peft-{name}-{strength}"
        if not adapter.exists():
            write_adapter(adapter, peft_config(), peft_tensors())
        profile = PROFILE.model_copy(
            update={"name": name, "rule": RuleSpec(kind="relu_difference", strength=strength)}
        )
        directory = (root or tmp_path / "profiles") / name
        version = write_profile(
            directory,
            profile,
            adapters={"adapter": adapter},
            probes=PROBES,
            training={"seed": 1},
            readme="# acme\n",
        )
        return directory, version

    return make
