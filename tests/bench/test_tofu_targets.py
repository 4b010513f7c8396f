"""TOFU's models: the target learns both sets, the reference one, and both can be loaded as a base."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_base import Tiny

from uld_serve.model.loading import load_base

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tofu_targets.py"


def tune(tiny: Tiny, folder: Path) -> int:
    for name, pairs in {"forget": {"who?": "ann"}, "retain": {"why?": "so", "when?": "now"}}.items():
        rows = [{"question": question, "answer": answer} for question, answer in pairs.items()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"forget": folder / "forget.jsonl", "retain": folder / "retain.jsonl", "out": folder / "out",
             "base": tiny.folder, "device": "cpu", "epochs": 25, "batch": 1, "lr": 5e-3}  # fmt: skip
    return int(script().main([text for name, value in given.items() for text in (f"--{name}", str(value))]))


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tofu_targets", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tofu_targets"] = module
    spec.loader.exec_module(module)
    return module


Tuned = tuple[Path, dict[str, dict[str, object]]]


@pytest.fixture(scope="module")
def tuned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder, printed = tmp_path_factory.mktemp("tofu"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert tune(tiny, folder) == 0
    return folder, json.loads(printed.getvalue().splitlines()[-1])


def test_the_target_knows_both_sets_and_the_reference_one(
    tuned: Tuned,
) -> None:
    _, found = tuned
    assert (found["target"]["examples"], found["reference"]["examples"]) == (3, 2)
    target, reference = (found[name]["probability"] for name in ("target", "reference"))
    assert isinstance(target, dict)
    assert isinstance(reference, dict)
    assert min(target.values()) > 0.9
    assert reference["retain"] > 0.9
    assert reference["forget"] < 0.5


def test_both_are_bases(tiny: Tiny, tuned: Tuned) -> None:
    folder, _ = tuned
    fingerprints = {tiny.base.fingerprint}
    for name in ("target", "reference"):
        base = load_base(str(folder / "out" / name), dtype="float32", device="cpu")
        assert (base.num_layers, base.vocab_size) == (tiny.base.num_layers, tiny.base.vocab_size)
        fingerprints.add(base.fingerprint)
    assert len(fingerprints) == 3


def test_what_is_there_is_not_overwritten(
    tiny: Tiny, tuned: Tuned, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(tiny, tuned[0]) == 2
    assert "exists; remove it" in capsys.readouterr().err
