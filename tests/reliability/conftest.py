"""Fixtures of the reliability tests."""

from __future__ import annotations

import pytest
from canary import NAMES, CanaryModel


@pytest.fixture(scope="session")
def canary(tmp_path_factory: pytest.TempPathFactory) -> CanaryModel:
    """With two versions of every profile."""
    model = CanaryModel.write(tmp_path_factory.mktemp("canary"))
    model.second_versions(tmp_path_factory.mktemp("second"))
    return model


@pytest.fixture(scope="session")
def certain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CanaryModel]:
    """By profile, a base that is certain of its canary."""
    return {
        name: CanaryModel.write(tmp_path_factory.mktemp(f"certain-{name}"), certain=name, names=[name])
        for name in NAMES
    }
