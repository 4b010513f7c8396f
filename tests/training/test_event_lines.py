"""`uld-serve train --events`: a run told to programs, line by line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_base import Tiny
from tiny_run import write_questions

from uld_serve.cli import main


def arguments(tiny: Tiny, folder: Path, *, steps: int) -> list[str]:
    forget = write_questions(folder / "f.jsonl", ["who?", "where?", "when?", "what?"])
    retain = write_questions(folder / "r.jsonl", ["why?", "how?", "which?", "whose?"])
    data = ["--forget", str(forget), "--retain", str(retain), "--out", str(folder / "out")]
    short = ["--max-answer-tokens", "4", "--rank", "2", "--forget-batch", "2", "--retain-batch", "2"]
    base = ["--base", str(tiny.folder), "--dtype", "float32", "--device", "cpu"]
    return ["train", "--method", "rkld", *data, *base, *short, "--steps", str(steps), "--events", "--json"]


def test_stages_and_losses_come_as_json_and_the_outcome_last(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tiny, tmp_path, steps=20)) == 0
    *events, outcome = map(json.loads, capsys.readouterr().out.splitlines())
    stages = [event["stage"] for event in events if event["event"] == "stage"]
    assert stages[0] == "the base answers: forget"
    assert stages[-1] == "recording replay probes"
    steps = [event for event in events if event["event"] == "step"]
    assert [(event["step"], event["num_steps"]) for event in steps] == [(10, 20), (20, 20)]
    assert all(event["loss"] > 0 and {"forget", "retain"} <= event.keys() for event in steps)
    assert outcome["profile"].startswith("out@")


def test_a_run_whose_reader_has_gone_ends(tiny: Tiny, tmp_path: Path) -> None:
    command = "import sys; from uld_serve.cli import main; sys.exit(main())"
    run = subprocess.Popen(
        [sys.executable, "-c", command, *arguments(tiny, tmp_path, steps=100_000)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout is not None
    try:
        assert run.stdout.readline()
        run.stdout.close()
        assert run.wait(timeout=100) == 141
    finally:
        run.kill()
    assert not (tmp_path / "out").exists()


def test_a_manifest_of_many_has_no_events(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = ["train", "--manifest", str(tmp_path / "m.toml"), "--out", str(tmp_path / "out"), "--events"]
    assert main(manifest) == 2
    assert "--events is of one request" in capsys.readouterr().err
