"""deploy/licences.py: what is on the list passes, anything else is named."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "deploy" / "licences.py"


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    spec = importlib.util.spec_from_file_location("licences", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT AND (Apache-2.0 OR GPL-3.0-only)", False),
        ("Apache-2.0 WITH LLVM-exception AND BSD-3-Clause", True),
        ("", False),
    ],
)
def test_expressions_by_their_parts(licences: ModuleType, expression: str, allowed: bool) -> None:
    assert licences.expression_is_allowed(expression) is allowed


@pytest.mark.parametrize(
    ("entries", "allowed"),
    [
        ([{"license": {"id": "MIT"}}], True),
        ([{"license": {"name": "License :: OSI Approved :: BSD License"}}], True),
        ([{"license": {"id": "MIT"}}, {"license": {"name": "Commercial"}}], False),
        ([{"expression": "MPL-2.0 AND MIT"}], True),
        ([{"license": {"name": "declared license file: LICENSE"}}], False),
        ([], False),
    ],
)
def test_components_name_a_licence_that_is_on_the_list(
    tmp_path: Path, entries: list[dict[str, object]], allowed: bool
) -> None:
    bill = tmp_path / "sbom.json"
    bill.write_text(json.dumps({"components": [{"name": "p", "version": "1", "licenses": entries}]}))
    result = subprocess.run([sys.executable, SCRIPT, bill], capture_output=True, text=True, check=False)
    assert (result.returncode == 0) is allowed
    assert ("p 1" in result.stderr) is not allowed


def test_audit_fails_on_what_could_not_be_looked_up() -> None:
    """By itself pip-audit skips it, and is content."""
    makefile = (SCRIPT.parent.parent / "Makefile").read_text("utf-8")
    audits = [line for line in makefile.splitlines() if "/pip-audit " in line]
    assert audits
    assert all("--strict" in line for line in audits)


def test_an_empty_bill_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sbom.json").write_text('{"components": []}')
    assert subprocess.run([sys.executable, SCRIPT, tmp_path / "sbom.json"], check=False).returncode == 1
