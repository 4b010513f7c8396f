"""The GPU benchmark runs on a CPU with a tiny shape: what it checks, times and reports, with recorded steps too."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from recorded_run import RecordedRun
from uld_kernels import SampleOutput

from uld_serve.bench.sampler import DrawTime
from uld_serve.bench.timing import Quartiles

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
    arguments = [*SMALL, "--batch", "1", "3", "--context", "20", "--steps", "2", "--sampler-batch", "1", "2"]
    assert gpu.main([*arguments, "--out", str(tmp_path / "gpu.json")], record=RecordedRun) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    assert report["ok"]
    # Of attention and adapters, of prompts and a layer's steps; three for each kind of rows; one for each rule.
    assert len(report["checks"]) == 11 + 7 + 3 * 8 + 4
    assert {(one["rows"], one["batch"]) for one in report["sampler"]["heads"]} == {
        (rows, batch) for rows in ("subtract", "relu_difference") for batch in (1, 2)
    }
    assert len(report["sampler"]["times"]) == 8 * 2 * 3
    assert report["sampler"]["goals"] == []
    assert [one["batch"] for one in report["sampler"]["late"]] == [1, 2]
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


def test_a_sampler_that_draws_something_else_fails_the_run(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = importlib.import_module("gpu_sampler")
    honest = sampler.fused_sample

    def shifted(logits_RV: torch.Tensor, *arguments: object, **options: object) -> SampleOutput:
        # Of batches only, as a kernel that mixes up its rows would.
        output = honest(logits_RV, *arguments, **options)
        return replace(output, token_ids_B=output.token_ids_B.roll(1))

    monkeypatch.setattr(sampler, "fused_sample", shifted)
    arguments = [*SMALL, "--sampler-batch", "1", "--parts", "sampler"]
    assert gpu.main(arguments) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    wrong = {one["what"] for one in report["checks"] if not one["ok"]}
    assert "mixed: alone as beside others, to the bit" in wrong
    assert "subtract: the static sampler, to the bit" in wrong


def test_goals_are_of_the_static_sampler_at_their_vocabulary(gpu: ModuleType) -> None:
    sampler, head = importlib.import_module("gpu_sampler"), importlib.import_module("gpu_head")

    def time(variant: str, us: float, *, vocab: int = 128256, rows: str = "subtract") -> DrawTime:
        return DrawTime(rows, vocab, 32, variant, Quartiles(us / 1e3, us / 1e3, us / 1e3), us, 11.0, True)

    times = [time("static", 14.0), time("chain", 100.0), time("flashinfer", 13.0), time("fused", 500.0)]
    others = [time("static", 999.0, vocab=32000), time("static", 999.0, rows="greedy")]
    heads = [
        head.HeadTime("subtract", 8, 400.0, 390.0, 10.0),
        head.HeadTime("subtract", 256, 9e9, 1.0, 9e9),
    ]
    found = {goal.what: goal.met for goal in sampler.goals([*times, *others], heads)}
    assert found == {
        "us, subtract, batch 32": True,
        "share of copy bandwidth, subtract, batch 32": True,
        "times the torch chain, subtract, batch 32": True,
        "times FlashInfer's sampling, subtract, batch 32": False,
        "us over head and argmax, subtract, batch 8": True,
    }


def test_the_pass_for_the_sanitizer_is_right_and_says_where_there_is_no_sanitizer(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitize = importlib.import_module("gpu_sanitize")
    assert sanitize.main(["--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["checks"] > 40
    monkeypatch.setenv("PATH", "")
    assert sanitize.main(["--run"]) == 3
    assert "not on PATH" in capsys.readouterr().err


def test_the_sanitizer_is_started_once_a_tool_and_what_it_finds_fails(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\ntest "$2" = memcheck\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    sanitize = importlib.import_module("gpu_sanitize")
    assert sanitize.main(["--run", "--tools", "memcheck", "racecheck"]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == {"memcheck": 0, "racecheck": 1}
    assert sanitize.main(["--run", "--tools", "memcheck"]) == 0


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
