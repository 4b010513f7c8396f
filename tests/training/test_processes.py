"""Two processes under `accelerate launch` learn what one does that accumulates two batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_base import Tiny
from tiny_run import FORGET, KEYWORDS, RETAIN, write_questions

from uld_serve.profiles.store import read_profile


def train(tiny: Tiny, folder: Path, name: str, *options: str, launch: tuple[str, ...] = ()) -> Path:
    (folder / "keywords.txt").write_text("\n".join(KEYWORDS))
    write_questions(folder / "f.jsonl", FORGET)
    write_questions(folder / "r.jsonl", RETAIN)
    given = {
        "method": "rkld", "base": tiny.folder, "dtype": "float32", "device": "cpu", "forget": folder / "f.jsonl",
        "retain": folder / "r.jsonl", "keywords": folder / "keywords.txt", "steps": 8, "rank": 4, "fork": 2,
        "save-steps": 4, "max-answer-tokens": 6, "forget-batch": 3, "retain-batch": 3, "out": folder / name,
        "name": "tiny",
    }  # fmt: skip
    arguments = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    command = [*launch, "-m", "uld_serve", "train", *arguments, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, *command], check=True, env=environment, timeout=240, capture_output=True, text=True
    )
    return folder / name


@pytest.mark.timeout(300)
def test_two_processes_train_what_one_trains_on_twice_as_many_batches(tiny: Tiny, tmp_path: Path) -> None:
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
    two = train(tiny, tmp_path, "two", launch=launch)
    one = train(tiny, tmp_path, "one", "--grad-accum", "2")
    assert read_profile(two).profile == read_profile(one).profile
    records = [json.loads((path / "training.json").read_text()) for path in (one, two)]
    assert [record["processes"] for record in records] == [1, 2]
    adapters = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, expected in adapters[0].items():
        # The same batches; sums in another order.
        torch.testing.assert_close(adapters[1][name], expected, rtol=0, atol=2e-3)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
