"""The GPU benchmark runs on a CPU with a tiny shape: what it checks, times and reports, with recorded steps too."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from recorded_run import RecordedRun

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SMALL = [
    "--shape",
    "tiny",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--assistant-layers",
    "2",
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_one_run_checks_and_times_everything(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [*SMALL, "--batch", "1", "3", "--context", "20", "--steps", "2"]
    assert gpu.main([*arguments, "--out", str(tmp_path / "gpu.json")], record=RecordedRun) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    assert report["ok"]
    assert len(report["checks"]) == 11
    steps = {(step["mode"], step["batch"], step["graphs"], step["replayed"]) for step in report["decode"]}
    modes = ("plain", "naive", "unlearned")
    assert steps == {
        (mode, batch, graphs, graphs) for mode in modes for batch in (1, 3) for graphs in (False, True)
    }
    assert set(report["ratios"]["20/3/on"]) == {"unlearned/plain", "naive/plain", "plain/plain"}
    assert {(prompt["mode"], prompt["tokens"]) for prompt in report["prefill"]} == {
        ("plain", 20),
        ("unlearned", 20),
    }
    assert set(report["lora_share"]) == {"20/1", "20/3"}
    assert all(step["over_floor"] > 0 for step in report["decode"])


def test_without_graphs_only_eager_steps_are_timed(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--batch", "2", "--context", "8", "--steps", "1", "--parts", "decode"]
    assert gpu.main([*arguments, "--modes", "plain"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(step["mode"], step["graphs"], step["turn"]) for step in report["decode"]] == [
        ("plain", False, 0),
        ("plain", False, 1),
    ]
    assert report["checks"] == report["prefill"] == []


def test_a_wrong_kernel_fails_the_run(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = importlib.import_module("gpu_kernels")
    honest = kernels.attention.decode_attention
    monkeypatch.setattr(kernels.attention, "decode_attention", lambda *a, **k: honest(*a, **k) * 1.1)
    arguments = [*SMALL, "--batch", "1", "--context", "8", "--steps", "1", "--parts", "kernels"]
    assert gpu.main(arguments) == 1
    assert not json.loads(capsys.readouterr().out.splitlines()[-1])["ok"]


def test_timing_needs_no_server_package() -> None:
    """A GPU machine has torch, triton and transformers; nobody installs a web framework there."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('fastapi', 'starlette', 'uvicorn', 'openai')); "
        "import gpu, uld_serve.bench.decode, uld_serve.bench.prefill"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join([str(BENCHMARKS), str(ROOT), str(ROOT / "kernels")]), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
