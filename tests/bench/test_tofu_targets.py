"""TOFU's models: the target learns both sets, the reference one, and both can be loaded as a base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_base import Tiny

from uld_serve.model.loading import load_base

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tofu_targets.py"


def tune(tiny: Tiny, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    for name, pairs in {
        "forget": {"who?": "ann"},
        "retain": {"why?": "so", "when?": "now", "how?": "well"},
    }.items():
        rows = [{"question": question, "answer": answer} for question, answer in pairs.items()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"forget": folder / "forget.jsonl", "retain": folder / "retain.jsonl", "out": folder / "out",
             "base": tiny.folder, "device": "cpu", "epochs": 60, "batch": 2, "lr": 5e-3}  # fmt: skip
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, *options], capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def tuned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, object]]]:
    folder = tmp_path_factory.mktemp("tofu")
    done = tune(tiny, folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_the_target_knows_both_sets_and_the_reference_one(
    tuned: tuple[Path, dict[str, dict[str, object]]],
) -> None:
    _, found = tuned
    assert (found["target"]["examples"], found["reference"]["examples"]) == (4, 3)
    target, reference = (found[name]["probability"] for name in ("target", "reference"))
    assert isinstance(target, dict)
    assert isinstance(reference, dict)
    assert min(target.values()) > 0.9
    assert reference["retain"] > 0.9
    assert reference["forget"] < 0.5


def test_both_are_bases(tiny: Tiny, tuned: tuple[Path, dict[str, dict[str, object]]]) -> None:
    folder, _ = tuned
    fingerprints = {tiny.base.fingerprint}
    for name in ("target", "reference"):
        base = load_base(str(folder / "out" / name), dtype="float32", device="cpu")
        assert (base.num_layers, base.vocab_size) == (tiny.base.num_layers, tiny.base.vocab_size)
        fingerprints.add(base.fingerprint)
    assert len(fingerprints) == 3


def test_what_is_there_is_not_overwritten(
    tiny: Tiny, tuned: tuple[Path, dict[str, dict[str, object]]]
) -> None:
    done = tune(tiny, tuned[0])
    assert done.returncode == 2
    assert "exists; remove it" in done.stderr
