"""The table of methods: each report beside the record of the very profile that it is of."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_base import Tiny

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "methods_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["methods_table"] = module
    spec.loader.exec_module(module)
    return module


def _report(tiny: Tiny, name: str, **changes: object) -> dict[str, Any]:
    version = tiny.version(name)
    nll = {"nll_base": 0.5, "agreement": 0.97}
    return {
        "profile": name,
        "digest": version.digest,
        "forget": {**nll, "nll_fused": 5.75},
        "retain": {**nll, "nll_fused": 0.53},
        "recall": {"base": 0.75, "fused": 0.0, "base_t1": 0.5, "fused_t1": 0.125},
        "fluency": {"ratio": 1.5},
        "gates": [{"name": "forget NLL rise", "ok": True}, {"name": "retain agreement", "ok": False}],
        "ok": False,
        **changes,
    }


def _written(tmp_path: Path, name: str, content: dict[str, Any]) -> str:
    file = tmp_path / name
    file.write_text("a line before\n" + json.dumps(content) + "\n")
    return str(file)


def test_rows_have_the_figures_of_report_and_record(
    script: ModuleType, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [root] = {folder.parent for folder, _ in tiny.profiles.values()}
    one = _written(tmp_path, "one.json", _report(tiny, "late-fork", ok=True, gates=[]))
    several = _written(tmp_path, "several.json", {"profiles": [_report(tiny, "pair")], "ok": False})
    out = tmp_path / "methods.json"
    assert script.main([one, several, "--profiles", str(root), "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "| +5.25 | +0.030 | 0.970 | 75 to 0 % | 50 to 12 % | 1.50 | ok |" in lines[2]
    assert lines[3].endswith("| misses retain agreement |")
    rows = json.loads(out.read_text())["results"]
    assert [row["profile"] for row in rows] == ["late-fork", "pair"]
    for row in rows:
        adapters = tiny.version(row["profile"]).adapters.values()
        assert row["adapter_bytes"] == 2 * sum(adapter.num_parameters for adapter in adapters) > 0


def test_a_report_of_another_version_is_refused(
    script: ModuleType, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [root] = {folder.parent for folder, _ in tiny.profiles.values()}
    file = _written(tmp_path, "one.json", _report(tiny, "pair", digest="sha256:" + "0" * 64))
    assert script.main([file, "--profiles", str(root)]) == 2
    assert "'pair'" in capsys.readouterr().err


def test_a_file_that_is_no_report_is_refused(
    script: ModuleType, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.json").write_text("")
    assert script.main([str(tmp_path / "empty.json"), "--profiles", str(tmp_path)]) == 2
    assert "empty.json" in capsys.readouterr().err
