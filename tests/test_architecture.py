"""Imports point one way, packages meet where they should, and files stay short enough to read."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from uld_serve.cli import COMMANDS

ROOT = Path(__file__).parent.parent
SOURCES = {"uld_serve": ROOT / "uld_serve", "uld_kernels": ROOT / "kernels" / "uld_kernels"}
MAX_LINES = 400

# Layer -> the layers that it may import. A command (`*/command.py`, demo, generate) is a part of the command line,
# wherever it lives; `llm` is llm.py with assembly.py; errors, config and the version may be imported by all.
ALLOWED = {
    "cli": {
        "fleet",
        "server",
        "training",
        "evaluation",
        "bench",
        "llm",
        "engine",
        "model",
        "profiles",
        "data",
        "vllm_plugin",
    },
    "fleet": {"server", "llm", "engine", "model", "profiles"},
    "server": {"llm", "engine", "model", "profiles", "data"},
    "evaluation": {"llm", "engine", "profiles", "data"},
    "bench": {"server", "llm", "engine", "model", "profiles", "uld_kernels"},
    "llm": {"engine", "model", "profiles"},
    "vllm_plugin": {"engine", "model", "profiles", "uld_kernels"},
    "training": {"model", "profiles", "uld_kernels", "data"},
    "engine": {"model", "profiles", "uld_kernels"},
    "model": {"uld_kernels"},
    "profiles": set(),
    "data": set(),
    "uld_kernels": set(),
    "base": set(),
}
BASE = {"uld_serve", "uld_serve.errors", "uld_serve.config"}
LLM = {"uld_serve.llm", "uld_serve.assembly"}
ENTRY = "uld_serve.__main__"
COMMAND_LINE = {path for path, _ in COMMANDS.values()} | {"uld_serve.cli", ENTRY}


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = _modules()


def _imported(module: str, path: Path) -> Iterator[str]:
    """Every module of ours that `path` imports anywhere: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the whole name"
            origin = node.module or ""
            names = [f"{origin}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else origin for name in names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in SOURCES)


IMPORTS = {module: sorted(set(_imported(module, path))) for module, path in MODULES.items()}


def _layer(module: str) -> str:
    if module in COMMAND_LINE:
        return "cli"
    if module in BASE:
        return "base"
    if module in LLM:
        return "llm"
    parts = module.split(".")
    return "uld_kernels" if parts[0] == "uld_kernels" else parts[1]


def test_every_module_belongs_to_a_layer() -> None:
    assert {module for module in MODULES if _layer(module) not in ALLOWED} == set()


def test_every_import_of_ours_is_a_module_that_exists() -> None:
    missing = {(module, name) for module, names in IMPORTS.items() for name in names if name not in MODULES}
    assert missing == set()


def test_imports_point_one_way() -> None:
    wrong = [
        f"{module} ({_layer(module)}) imports {name} ({_layer(name)})"
        for module, names in IMPORTS.items()
        for name in names
        if _layer(name) not in ALLOWED[_layer(module)] | {"base", _layer(module)}
    ]
    assert wrong == []


def test_layers_have_no_cycle() -> None:
    order = list(graphlib.TopologicalSorter(ALLOWED).static_order())
    assert set(order) == set(ALLOWED)


def test_modules_have_no_cycle() -> None:
    graph = {module: {name for name in names if name != module} for module, names in IMPORTS.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_commands_are_imported_by_nobody() -> None:
    named = {name for module, names in IMPORTS.items() if module != ENTRY for name in names}
    assert named & COMMAND_LINE == set()


@pytest.mark.parametrize(
    ("layer", "other", "only"),
    [
        ("engine", "uld_serve.profiles", {"uld_serve.engine.plan"}),
        ("engine", "uld_kernels.ops", {"uld_serve.engine.sampler"}),
    ],
)
def test_two_layers_meet_in_one_module(layer: str, other: str, only: set[str]) -> None:
    meeting = {
        module
        for module, names in IMPORTS.items()
        if _layer(module) == layer and any(name == other or name.startswith(f"{other}.") for name in names)
    }
    assert meeting == only


def test_evaluation_knows_of_the_engine_only_its_plain_values() -> None:
    used = {
        name
        for module, names in IMPORTS.items()
        if _layer(module) == "evaluation"
        for name in names
        if _layer(name) == "engine"
    }
    assert used <= {"uld_serve.engine.request"}


def test_kernels_import_nothing_of_ours() -> None:
    imports = {name for module, names in IMPORTS.items() if _layer(module) == "uld_kernels" for name in names}
    assert {name for name in imports if not name.startswith("uld_kernels")} == set()


def test_files_are_short_enough_to_read() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: lines for module, lines in lengths.items() if lines > MAX_LINES} == {}


def test_every_module_says_what_it_is() -> None:
    bare = [m for m, path in MODULES.items() if ast.get_docstring(ast.parse(path.read_text())) is None]
    assert bare == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    names = {module.split(".")[-1] for module in MODULES}
    assert names & {"utils", "util", "common", "helpers", "misc", "manager"} == set()


def test_there_is_no_package_called_kernels() -> None:
    # `kernels` is a package on PyPI that transformers looks for; a package of ours would hide it.
    assert not (ROOT / "kernels" / "__init__.py").exists()
