"""The table of an evaluation on TOFU: each profile's figures beside what that very version costs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_base import Tiny

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tofu_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tofu_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tofu_table"] = module
    spec.loader.exec_module(module)
    return module


def _figures(utility: float) -> dict[str, Any]:
    return {
        "model_utility": utility,
        "utility_share": utility / 0.5,
        "forget_quality": {"p": 0.7659, "d": 0.15, "n": 40},
        "sections": {"forget": {"n": 40, "probability": 0.082, "rougeL_recall": 0.31}},
        "extraction_strength": 0.05,
    }


def _summary(tmp_path: Path, digests: dict[str, str]) -> str:
    subjects = {"base": _figures(0.5), **{name: _figures(0.49) for name in digests}}
    file = tmp_path / "summary.json"
    file.write_text(json.dumps({"subjects": subjects, "digests": digests}))
    return str(file)


def _root(tiny: Tiny) -> str:
    [root] = {folder.parent for folder, _ in tiny.profiles.values()}
    return str(root)


def test_costs_stand_beside_the_figures_of_the_same_version(
    script: ModuleType, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = tiny.version("late-fork")
    decode = tmp_path / "decode.jsonl"
    line = {"settings": {"profile": version.ref}, "ratios": {str(n): {"unlearned/plain": n} for n in (8, 32)}}
    decode.write_text(json.dumps(line) + "\n")
    summary, out = _summary(tmp_path, {"late-fork": version.digest}), tmp_path / "table.json"
    options = ["--profiles", _root(tiny), "--decode", str(decode), "--json", str(out)]
    assert script.main([summary, *options]) == 0
    *_, base, profile = capsys.readouterr().out.splitlines()
    assert base.split(" | ")[1:] == [
        "0.766", "0.150", "0.5000", "100.0%", "0.082", "0.310", "0.050", "–", "–", "– |",
    ]  # fmt: skip
    assert "| 32.00 |" in profile
    rows = json.loads(out.read_text())["results"]
    parameters = sum(one.num_parameters for one in version.adapters.values())
    assert rows["late-fork"]["megabytes"] == 2 * parameters / 1e6
    assert "megabytes" not in rows["base"]


def test_a_profile_of_another_version_is_refused(
    script: ModuleType, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = _summary(tmp_path, {"late-fork": "0" * 64})
    assert script.main([summary, "--profiles", _root(tiny)]) == 2
    assert "has the digest 000" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", '{"subjects": {}}', '{"subjects": [], "digests": {}}'])
def test_what_is_no_summary_is_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    file = tmp_path / "summary.json"
    file.write_text(content)
    assert script.main([str(file)]) == 2
    assert "is not a summary" in capsys.readouterr().err


def test_a_line_of_something_else_is_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decode = tmp_path / "decode.jsonl"
    decode.write_text('{"ratios": {}}\n')
    assert script.main([_summary(tmp_path, {}), "--decode", str(decode)]) == 2
    assert "bench decode --json" in capsys.readouterr().err
