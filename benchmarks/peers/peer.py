"""What every peer script shares: its options, the clock, and the line it prints. Needs nothing but Python, because
peers run in environments of their own. Knows no peer."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Job:
    """Generate greedily from `prompts`, one batch of token id lists, `new_tokens` each; do not stop at end of text.

    After `time_limit_s` a peer may stop early: it then returns how many tokens it made, and its speed is of those.
    """

    prompts: list[list[int]]
    new_tokens: int
    time_limit_s: float


Generate = Callable[[Job], int]
"""Runs a job; returns the number of tokens made, over all prompts."""


def options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument(
        "--prompts",
        required=True,
        type=Path,
        help="JSON list of lists of token ids, two for every place in a batch",
    )
    parser.add_argument("--batch", type=int, nargs="+", required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--time-limit", type=float, required=True, metavar="SECONDS")
    parser.add_argument("--assistant-layers", type=int, default=8)
    parser.add_argument("--threads", type=int, required=True)
    return parser


def measure(args: argparse.Namespace, generate: Generate) -> None:
    """Time one job for each batch size, each after a short one that is not timed, and print a JSON line for each.

    No prompt is used twice: a peer with a prefix cache would skip its prefill.
    """
    prompts = iter(json.loads(args.prompts.read_text()))
    for batch in args.batch:
        generate(Job(list(islice(prompts, batch)), WARM_UP_TOKENS, args.time_limit))
        job = Job(list(islice(prompts, batch)), args.new_tokens, args.time_limit)
        began = time.perf_counter()
        tokens = generate(job)
        seconds = time.perf_counter() - began
        record = {
            "batch": batch,
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(tokens / seconds, 2),
            "is_whole": tokens == batch * args.new_tokens,
        }
        print(json.dumps(record), flush=True)
