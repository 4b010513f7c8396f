"""The container's files, as far as they can be checked without a container engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from uld_serve.cli import main

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(instruction, its text) of the Dockerfile, continuation lines joined, comments dropped."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    logical = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in logical if line.strip()]


@pytest.fixture(scope="module")
def final_stage(instructions: list[tuple[str, str]]) -> dict[str, str]:
    last = max(i for i, (name, _) in enumerate(instructions) if name == "FROM")
    return dict(instructions[last:])


def test_image_runs_as_a_user_without_rights(final_stage: dict[str, str]) -> None:
    user, _, group = final_stage["USER"].partition(":")
    assert int(user) >= 10000
    assert int(group) >= 10000


def test_final_stage_builds_nothing(instructions: list[tuple[str, str]], final_stage: dict[str, str]) -> None:
    assert sum(name == "FROM" for name, _ in instructions) == 2
    assert "pip" not in final_stage["RUN"]
    assert "apt-get" not in final_stage["RUN"]
    last = max(i for i, (name, _) in enumerate(instructions) if name == "FROM")
    copied = [text for name, text in instructions[last:] if name == "COPY"]
    assert copied
    assert all(text.startswith("--from=build ") for text in copied)


def test_pip_installs_nothing_without_a_hash_but_the_wheel_that_it_built(
    instructions: list[tuple[str, str]],
) -> None:
    settings = " ".join(text for name, text in instructions if name == "ENV")
    assert "PIP_REQUIRE_HASHES=1" in settings
    assert "PIP_ONLY_BINARY=:all:" in settings
    installs = [
        part
        for name, text in instructions
        if name == "RUN"
        for part in text.split("&&")
        if "pip install" in part
    ]
    without = [part.strip() for part in installs if "PIP_REQUIRE_HASHES=0" in part]
    assert without == [
        "PIP_REQUIRE_HASHES=0 /opt/uld-serve/bin/pip install --no-deps --no-index /wheels/*.whl"
    ]
    assert all("-r " in part for part in installs if part.strip() not in without)


def test_health_is_readiness(final_stage: dict[str, str]) -> None:
    assert "http://127.0.0.1:8000/ready" in final_stage["HEALTHCHECK"]


def test_everything_that_is_copied_exists_and_is_not_ignored(instructions: list[tuple[str, str]]) -> None:
    kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for name, text in instructions:
        if name == "COPY" and "--from" not in text:
            for source in text.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in kept


def test_image_has_the_python_that_the_package_allows(instructions: list[tuple[str, str]]) -> None:
    (base,) = [text.partition("=")[2] for name, text in instructions if text.startswith("BASE=")]
    version = re.fullmatch(r"python:(\d+)\.(\d+)-slim-\w+", base)
    assert version is not None
    assert (int(version[1]), int(version[2])) == (3, 11)  # for which the locks have wheels


def test_default_command_is_understood(
    final_stage: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ULD_SERVE_API_KEY", raising=False)
    arguments = re.findall(r'"([^"]*)"', final_stage["CMD"])
    assert main(arguments) == 2
    assert "refusing to listen on 0.0.0.0 without keys" in capsys.readouterr().err
