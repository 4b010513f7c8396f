"""What the documents say exists: files, make targets, subcommands, links, and JSON that parses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from uld_serve.cli import COMMANDS

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*.md")])

pytestmark = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", document.read_text(), re.MULTILINE))
    assert named - targets == set()


def test_subcommands_exist(document: Path) -> None:
    named = set(re.findall(r"\buld-serve ([a-z]+)\b", document.read_text()))
    assert named - set(COMMANDS) == set()


def test_code_paths_exist(document: Path) -> None:
    packages = "server|engine|model|profiles|training|evaluation|uld_kernels"
    paths = set(re.findall(rf"`((?:{packages})/[a-z_/.]*)`", document.read_text()))
    roots = (ROOT / "uld_serve", ROOT / "kernels")
    assert [path for path in sorted(paths) if not any((root / path).exists() for root in roots)] == []


def test_blocks_of_json_are_json(document: Path) -> None:
    for block in re.findall(r"```json\n(.*?)```", document.read_text(), re.DOTALL):
        assert isinstance(json.loads(block), dict)


def test_tests_that_are_named_exist(document: Path) -> None:
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", document.read_text()):
        source = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        assert source, path
        assert not name or f"def {name}(" in source, f"{path}::{name}"
