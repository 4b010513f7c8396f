"""What every peer script shares: its options, the clock, and the lines it speaks with run.py. Needs nothing but
Python, because peers run in environments of their own. Knows no peer."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

READY = '{"ready": true}'


@dataclass(frozen=True)
class Job:
    """Generate greedily from `prompts`, one batch of token id lists, `new_tokens` each; do not stop at end of text.

    After `time_limit_s` a peer may stop early: it then returns how many tokens it made, and its speed is of those.
    """

    prompts: list[list[int]]
    new_tokens: int
    time_limit_s: float

    @property
    def line(self) -> str:
        return json.dumps(asdict(self))


Generate = Callable[[Job], int]
"""Runs a job; returns the number of tokens made, over all prompts."""


def options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--max-batch", type=int, required=True, help="prompts in the largest job")
    parser.add_argument("--assistant-layers", type=int, default=8)
    parser.add_argument("--threads", type=int, required=True)
    return parser


def work(generate: Generate) -> None:
    """Say that loading is done; then one line of JSON out for each job that comes in, until there are no more."""
    print(READY, flush=True)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        began = time.perf_counter()
        tokens = generate(job)
        record = {"tokens": tokens, "seconds": time.perf_counter() - began}
        print(json.dumps(record), flush=True)
