"""A model shared by two processes: the same tokens as one process gives, adapters cut up with their layers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_base import Tiny

from uld_serve.assembly import assemble
from uld_serve.config import EngineSettings
from uld_serve.engine.plan import Applied, Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.engine.scoring import Job, run_jobs

PROFILES = [
    ["late-fork"],
    ["truncated"],
    ["pair"],
    ["ranked"],
    ["all-layers"],
    ["late-fork", "all-layers"],
    [],
]
REQUESTS = [
    {
        "prompt": [256, 5 + number, 77, 130, 9, 201][: 3 + number % 4],
        "params": {"max_tokens": 12, "ignore_eos": True, **drawing},
        "profiles": profiles,
    }
    for number, profiles in enumerate(PROFILES)
    for drawing in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 7 + number})
]


def expected(tiny: Tiny) -> list[list[int]]:
    roots = [path for path, _ in tiny.profiles.values()]
    settings = EngineSettings(kv_cache_bytes=2**24, max_step_rows=16)
    found = assemble(str(tiny.folder), profiles=roots, dtype="float32", device="cpu", settings=settings)
    jobs = [
        Job(
            list(one["prompt"]),
            SamplingParams(**one["params"]),
            Decision.forgetting([Applied(found.registry.get(name)) for name in one["profiles"]])
            if one["profiles"]
            else Decision.base(),
        )
        for one in REQUESTS
    ]
    return [
        [token for delta in deltas for token in delta.token_ids] for deltas in run_jobs(found.engine, jobs)
    ]


@pytest.mark.timeout(240)
def test_two_processes_give_the_tokens_of_one(tiny: Tiny, tmp_path: Path) -> None:
    job = {
        "model": str(tiny.folder),
        "profiles": [str(path) for path, _ in tiny.profiles.values()],
        "requests": REQUESTS,
        "out": str(tmp_path / "tokens.json"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    run_ranks(2, tmp_path / "job.json")
    assert json.loads((tmp_path / "tokens.json").read_text()) == expected(tiny)


def run_ranks(size: int, job: Path) -> None:
    script = Path(__file__).parent / "shared_steps.py"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(job)],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n---\n".join(said)
