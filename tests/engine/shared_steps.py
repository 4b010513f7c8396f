"""One rank of a model that several processes share, as torchrun starts it: rank 0 generates and writes what came of it,
the others follow. Started by test_tensor_parallel.py. Knows no test."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    # Imported here: what is missing should end with a traceback of this process.
    from uld_serve.assembly import assemble
    from uld_serve.config import EngineSettings
    from uld_serve.engine.following import follow
    from uld_serve.engine.plan import Applied, Decision
    from uld_serve.engine.ranks import Ranks
    from uld_serve.engine.request import SamplingParams
    from uld_serve.engine.scoring import Job, run_jobs
    from uld_serve.model.loading import load_base

    ranks = Ranks.join(int(os.environ["WORLD_SIZE"]), os.environ, device="cpu", on_lost=lambda: os._exit(1))
    settings = EngineSettings(kv_cache_bytes=2**24, max_step_rows=16)
    if ranks.part.rank != 0:
        base = load_base(job["model"], dtype="float32", device="cpu", part=ranks.part)
        follow(base, ranks, settings)
        return
    roots = [Path(root) for root in job["profiles"]]
    found = assemble(
        job["model"], profiles=roots, dtype="float32", device="cpu", settings=settings, ranks=ranks
    )
    jobs = [
        Job(
            one["prompt"],
            SamplingParams(**one["params"]),
            Decision.forgetting([Applied(found.registry.get(name)) for name in one["profiles"]])
            if one["profiles"]
            else Decision.base(),
        )
        for one in job["requests"]
    ]
    tokens = [
        [token for delta in deltas for token in delta.token_ids] for deltas in run_jobs(found.engine, jobs)
    ]
    found.engine.check_integrity()
    ranks.leave()
    Path(job["out"]).write_text(json.dumps(tokens))


if __name__ == "__main__":
    main()
