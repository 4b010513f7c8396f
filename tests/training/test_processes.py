"""Two processes under `accelerate launch` learn what one does that accumulates two batches."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.utils.logging as transformers_logging
from safetensors.torch import load_file
from tiny_base import Tiny
from tiny_run import FORGET, KEYWORDS, RETAIN, write_questions

from uld_serve.profiles.store import read_profile
from uld_serve.training import command

LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip


def arguments(tiny: Tiny, folder: Path, name: str) -> list[str]:
    (folder / "keywords.txt").write_text("\n".join(KEYWORDS))
    write_questions(folder / "f.jsonl", FORGET)
    write_questions(folder / "r.jsonl", RETAIN)
    given = {
        "method": "rkld", "base": tiny.folder, "dtype": "float32", "device": "cpu", "forget": folder / "f.jsonl",
        "retain": folder / "r.jsonl", "keywords": folder / "keywords.txt", "steps": 6, "rank": 4, "fork": 2,
        "save-steps": 3, "max-answer-tokens": 4, "forget-batch": 3, "retain-batch": 3, "out": folder / name,
        "name": "tiny",
    }  # fmt: skip
    return ["train", *(text for key, value in given.items() for text in (f"--{key}", str(value)))]


def train_in_two(tiny: Tiny, folder: Path, name: str) -> Path:
    command = [sys.executable, *LAUNCH, "-m", "uld_serve", *arguments(tiny, folder, name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, timeout=240, capture_output=True, text=True)
    return folder / name


def train_in_one(tiny: Tiny, folder: Path, name: str, *options: str) -> Path:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_parser(parser.add_subparsers())
    level, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        assert command.run(parser.parse_args([*arguments(tiny, folder, name), *options])) == 0
    finally:
        transformers_logging.set_verbosity(level)
        if has_bars:
            transformers_logging.enable_progress_bar()
    return folder / name


@pytest.mark.timeout(300)
def test_two_processes_train_what_one_trains_on_twice_as_many_batches(tiny: Tiny, tmp_path: Path) -> None:
    two = train_in_two(tiny, tmp_path, "two")
    one = train_in_one(tiny, tmp_path, "one", "--grad-accum", "2")
    assert read_profile(two).profile == read_profile(one).profile
    records = [json.loads((path / "training.json").read_text()) for path in (one, two)]
    assert [record["processes"] for record in records] == [1, 2]
    adapters = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, expected in adapters[0].items():
        # The same batches; sums in another order.
        torch.testing.assert_close(adapters[1][name], expected, rtol=0, atol=2e-3)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
