"""The side-by-side gives every peer the same fresh prompts and names the peers that could not run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_base import Tiny

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"

# Says how many tokens it made as a peer would, and stops early at batch 2.
HONEST = """
import sys
sys.path.insert(0, {folder!r})
from peer import measure, options
measure(options("").parse_args(), lambda job: 3 if len(job.prompts) == 2 else job.new_tokens * len(job.prompts))
"""
BROKEN = "raise SystemExit('the anvil is missing')"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"peers_{name}", PEERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_no_prompt_is_used_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = load("peer", monkeypatch)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([[number] for number in range(8)]))
    seen: list[tuple[list[list[int]], int]] = []

    def generate(job: object) -> int:
        seen.append((job.prompts, job.new_tokens))
        return len(job.prompts) * job.new_tokens

    args = argparse.Namespace(prompts=prompts, batch=[1, 3], new_tokens=10, time_limit=5.0)
    peer.measure(args, generate)
    assert seen == [([[0]], 4), ([[1]], 10), ([[2], [3], [4]], 4), ([[5], [6], [7]], 10)]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["batch"], one["tokens"], one["is_whole"]) for one in lines] == [(1, 10, True), (3, 30, True)]


def test_a_peer_that_fails_is_named_and_the_others_are_measured(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load("run", monkeypatch)
    scripts = {"honest": HONEST.format(folder=str(PEERS)), "broken": BROKEN}
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    made = {name: run.Peer(str(tmp_path / f"{name}.py"), (), name, run.our_python) for name in scripts}
    monkeypatch.setattr(run, "PEERS", made)
    monkeypatch.setattr(run, "embedded_model_dir", lambda: tiny.folder)
    monkeypatch.setattr(sys, "argv", ["run.py", "--batch", "1", "2", "--new-tokens", "5", "--json"])
    assert run.main() == 1
    found = json.loads(capsys.readouterr().out)
    assert list(found["not_run"]) == ["broken"]
    assert "the anvil is missing" in found["not_run"]["broken"]
    by_place = {(one["peer"], one["batch"]): one for one in found["results"]}
    assert set(by_place) == {(name, batch) for name in scripts for batch in (1, 2)}
    assert by_place["honest", 1]["is_whole"] is True
    assert by_place["honest", 2] | {"tokens_per_s": 0} == {
        "peer": "honest", "batch": 2, "tokens_per_s": 0, "tokens": 3, "is_whole": False, "note": "",
    }  # fmt: skip
    assert by_place["broken", 1]["tokens_per_s"] is None


def test_an_environment_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load("run", monkeypatch)
    monkeypatch.setattr(run.venv, "create", lambda folder, **_: (folder / "bin").mkdir(parents=True))
    python = tmp_path / "env" / "bin" / "python"

    def refuse(command: list[object], **_: object) -> argparse.Namespace:
        assert command[0] == python
        return argparse.Namespace(returncode=1, stderr="ERROR: No matching distribution found")

    monkeypatch.setattr(run.subprocess, "run", refuse)
    with pytest.raises(run.Unavailable, match="No matching distribution"):
        run.vllm_python(tmp_path / "env")
    assert not (tmp_path / "env" / ".ready").exists()
