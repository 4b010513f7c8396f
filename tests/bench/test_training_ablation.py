"""The ablations: one thing changed a run, lines that later calls go on from, a table of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_base import NUM_LAYERS, Tiny

from uld_serve.training.options import Chosen

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training_ablation.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_ablation", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_ablation"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    for name, who in (("forget", "ann"), ("retain", "sky")):
        rows = [{"question": f"{who} {number}?", "answer": f"{who} said {number}"} for number in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "keywords.txt").write_text("Zz\n")
    files = {"forget": "forget.jsonl", "retain": "retain.jsonl", "keywords": "keywords.txt"}
    return [text for name, file in files.items() for text in (f"--{name}", str(tmp_path / file))]


@pytest.mark.parametrize("method", ["margin", "uld"])
def test_every_run_of_both_tables_is_one_that_the_command_takes(script: ModuleType, method: str) -> None:
    runs = list(script.RUNS[method](30))
    assert len({json.dumps(run, sort_keys=True) for run in runs}) == len(runs) > 10
    for run in runs:
        given = [text for name, value in run.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        options = script._options(["--method", method, *given, "--preset", "demo"])
        made = Chosen.of(options).settings(30, has_keywords=True)
        assert all(getattr(made, name) == value for name, value in run.items())


def test_a_stopped_ablation_goes_on_and_ends_in_a_table(
    script: ModuleType, tiny: Tiny, tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    runs = [{}, {"goal": 7.0}, {"fork": NUM_LAYERS - 1}]
    monkeypatch.setitem(script.RUNS, "margin", lambda _num_layers: iter(runs))
    out = tmp_path / "margin.jsonl"
    given = [
        "margin",
        "--out",
        str(out),
        *data,
        "--base",
        str(tiny.folder),
        "--device",
        "cpu",
        "--steps",
        "2",
    ]
    assert script.main([*given, "--examples", "3", "--first", "1"]) == 0
    out.write_text(out.read_text() + '{"method": "mar')
    assert script.main([*given, "--examples", "3"]) == 0
    capsys.readouterr()
    lines = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]
    assert [line["changed"] for line in lines] == runs
    for line in lines:
        assert [point["share"] for point in line["measured"]] == list(script.SHARES)
        assert all({"filter", "strength", "forget", "retain"} <= set(point) for point in line["measured"])
    assert lines[0]["measured"] != lines[1]["measured"] or lines[0]["loss"] != lines[1]["loss"]
    assert script.main([*given, "--examples", "3"]) == 0
    assert capsys.readouterr().out == ""
    assert script.main(["margin", "--out", str(out), "--table"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(runs)
    assert table[3].startswith("| goal 7 | fused | ")


def test_runs_are_compared_where_they_cost_alike(script: ModuleType) -> None:
    def point(strength: float, forget: float, retain: float) -> dict[str, object]:
        return {"strength": strength, "forget": {"rise": forget}, "retain": {"rise": retain}}

    curve = [point(1.0, 2.0, 0.02), point(2.0, 4.0, 0.08)]
    assert script._within(curve) == ("1.50", "+3.00")
    assert script._within(curve[1:]) == ("1.25", "+2.50")  # from the base, which loses and forgets nothing
    assert script._within(curve[:1]) == ("> 1.00", "> +2.00")


def test_uld_is_trained_once_for_all_its_filters(
    script: ModuleType, tiny: Tiny, tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.RUNS, "uld", lambda _num_layers: iter([{"exit": 2}]))
    out = tmp_path / "uld.jsonl"
    given = ["uld", "--out", str(out), *data, "--base", str(tiny.folder), "--device", "cpu", "--steps", "2"]
    assert script.main([*given, "--examples", "3"]) == 0
    (line,) = map(json.loads, out.read_text().splitlines())
    points = [(point["filter"], point["share"]) for point in line["measured"]]
    assert points == [(one.mode, share) for one in script.FILTERS["uld"] for share in script.SHARES]
    open_, closed = (
        next(point for point in line["measured"] if (point["filter"], point["share"]) == (mode, 1.0))
        for mode in ("plausibility", "fused")
    )
    assert open_["forget"]["removed"] != closed["forget"]["removed"]


def test_other_data_comes_whole_or_not_at_all(
    script: ModuleType, tiny: Tiny, tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["margin", "--out", str(tmp_path / "x.jsonl"), *data[:2], "--base", str(tiny.folder)]
    assert script.main(given) == 2
    assert "go together" in capsys.readouterr().err
