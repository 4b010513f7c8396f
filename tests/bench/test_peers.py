"""The side-by-side gives every peer the same fresh prompts in turn and names the peers that could not run."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tiny_base import Tiny

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
MODULES = ("peer", "worker", "roster", "run")

# Says how many tokens it made as a peer would, stops early at batch 2, and keeps what it was asked.
HONEST = """
import sys
sys.path.insert(0, {folder!r})
from peer import options, work
options("").parse_args()
def generate(job):
    with open({asked!r}, "a") as file:
        file.write("{name} " + job.line + chr(10))
    return 3 if len(job.prompts) == 2 else job.new_tokens * len(job.prompts)
print("chatter of a library")
work(generate)
"""
BROKEN = "raise SystemExit('the anvil is missing')"
FRAIL = HONEST.replace(
    "    return", "    if job.new_tokens > 4: raise SystemExit('out of breath')" + chr(10) + "    return"
)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The scripts' modules; they import each other by their bare names, as scripts in one folder do."""
    monkeypatch.syspath_prepend(str(PEERS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_peer_answers_one_line_a_job(
    peers: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = peers["peer"].Job([[1], [2, 3]], 5, 9.0)
    monkeypatch.setattr(sys, "stdin", io.StringIO(job.line + chr(10)))
    seen = []

    def generate(given: object) -> int:
        seen.append(given)
        return 10

    peers["peer"].work(generate)
    ready, answer = capsys.readouterr().out.splitlines()
    assert ready == peers["peer"].READY
    assert json.loads(answer)["tokens"] == 10
    assert seen == [job]


def run(
    peers: dict[str, ModuleType],
    scripts: dict[str, str],
    tiny: Tiny,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
) -> tuple[int, list[tuple[str, dict]]]:
    """Exit status, and (peer, job) in the order in which they ran."""
    asked = folder / "asked"
    asked.touch()
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(text.format(folder=str(PEERS), asked=str(asked), name=name))
    roster = peers["roster"]
    made = {
        name: roster.Peer(str(folder / f"{name}.py"), (), name, roster.our_python, name == "slow")
        for name in scripts
    }
    monkeypatch.setattr(peers["run"], "PEERS", made)
    monkeypatch.setattr(peers["run"], "OURS", next(iter(scripts)))
    monkeypatch.setattr(peers["run"], "embedded_model_dir", lambda: tiny.folder)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--json"])
    status = peers["run"].main()
    lines = [line.partition(" ") for line in asked.read_text().splitlines()]
    return status, [(name, json.loads(job)) for name, _, job in lines]


def test_peers_take_turns_on_fresh_prompts(
    peers: dict[str, ModuleType],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripts = {"a": HONEST, "b": HONEST, "slow": HONEST}
    arguments = ("--batch", "1", "--new-tokens", "5", "--rounds", "3")
    status, jobs = run(peers, scripts, tiny, tmp_path, monkeypatch, *arguments)
    assert status == 0
    assert [name for name, _ in jobs] == ["a", "b", "slow"] * 2 + ["b", "a"] + ["a", "b"]
    assert [job["new_tokens"] for _, job in jobs] == [4] * 3 + [5] * 7
    rounds = [jobs[first][1]["prompts"] for first in (0, 3, 6, 8)]
    assert jobs[1][1]["prompts"] == rounds[0]
    assert len({str(one) for one in rounds}) == 4
    found = json.loads(capsys.readouterr().out)
    assert {one["peer"]: one["rounds"] for one in found["results"]} == {"a": 3, "b": 3, "slow": 1}
    speeds = {one["peer"]: one["tokens_per_s"] for one in found["results"]}
    assert found["ratios"]["1"]["a/b"] == pytest.approx(speeds["a"] / speeds["b"], rel=1e-3)


def test_a_peer_that_fails_is_named_and_the_others_are_measured(
    peers: dict[str, ModuleType],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripts = {"honest": HONEST, "broken": BROKEN, "frail": FRAIL}
    arguments = ("--batch", "1", "2", "--new-tokens", "5", "--rounds", "1")
    status, _ = run(peers, scripts, tiny, tmp_path, monkeypatch, *arguments)
    assert status == 1
    found = json.loads(capsys.readouterr().out)
    assert {name: reason.split(" |")[-1] for name, reason in found["not_run"].items()} == {
        "broken": "the anvil is missing", "frail": "out of breath",
    }  # fmt: skip
    by_place = {(one["peer"], one["batch"]): one for one in found["results"]}
    assert set(by_place) == {(name, batch) for name in scripts for batch in (1, 2)}
    assert by_place["honest", 1]["is_whole"] is True
    assert (by_place["honest", 2]["tokens"], by_place["honest", 2]["is_whole"]) == (3, False)
    assert by_place["broken", 1]["tokens_per_s"] is by_place["frail", 1]["tokens_per_s"] is None
    assert found["ratios"] == {"1": {}, "2": {}}


def test_nothing_is_left_of_a_peer_that_is_closed(peers: dict[str, ModuleType], tmp_path: Path) -> None:
    text = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '600']);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid));"
        f"print({peers['peer'].READY!r}, flush=True); sys.stdin.read()"
    )
    worker = peers["worker"].Worker([sys.executable, "-c", text], {})
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert child.exists()
    worker.close()
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_an_environment_that_cannot_be_made_says_why(
    peers: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roster = peers["roster"]
    monkeypatch.setattr(roster.venv, "create", lambda folder, **_: (folder / "bin").mkdir(parents=True))
    python = tmp_path / "env" / "bin" / "python"

    def refuse(command: list[object], **_: object) -> argparse.Namespace:
        assert command[0] == python
        return argparse.Namespace(returncode=1, stderr="ERROR: No matching distribution found")

    monkeypatch.setattr(roster.subprocess, "run", refuse)
    with pytest.raises(roster.Unavailable, match="No matching distribution"):
        roster.vllm_python(tmp_path / "env")
    assert not (tmp_path / "env" / ".ready").exists()
