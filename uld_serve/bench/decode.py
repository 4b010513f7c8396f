"""`uld-serve bench decode`: one step of the real engine with a full batch past its prompts, by mode. Called by command.

A step is schedule, batch, run, sample and finish: what serving pays for one token of every request.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

import torch

from uld_serve.bench.environment import Environment
from uld_serve.bench.report import Json, Reporter
from uld_serve.bench.result import COLUMNS, Result, ratios, table_rows, throughput_of_many
from uld_serve.bench.subjects import Subjects, add_options
from uld_serve.bench.timing import Quartiles, interleave
from uld_serve.bench.variant import Mode, Variant, num_requests, random_prompts
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import InvalidRequest

WARM_UP_STEPS = 3
# Requests that had to wait for a place draw later than the first; so many more tokens fit before one ends.
SPARE_TOKENS = 32
SUMMARY = "time of one decode step: plain, naive and unlearned, in turn in one process"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, modes=("plain", "naive", "unlearned"))
    how = parser.add_argument_group("how")
    how.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="requests in the batch")
    how.add_argument("--context", type=int, default=256, help="tokens in each request's cache at the start")
    how.add_argument("--steps", type=int, default=30, help="timed steps of each mode and batch")
    how.add_argument("--temperature", type=float, default=0.0)
    how.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="one mode after the other, to hold only one engine in memory; the modes are then not interleaved",
    )
    how.add_argument("--json", action="store_true", help="one JSON line last; all else to standard error")


def run(args: argparse.Namespace) -> int:
    if min(args.batch) < 1 or args.context < 1 or args.steps < 1:
        raise InvalidRequest("--batch, --context and --steps must be at least 1")
    subjects, reporter = Subjects.of(args), Reporter(as_json=args.json)
    environment = Environment.look(subjects.base.device)
    reporter.begin(environment)
    groups = [[mode] for mode in subjects.modes] if args.one_at_a_time else [list(subjects.modes)]
    results: list[Result] = []
    adapter_bytes: dict[str, int] = {}
    with reporter.progress("steps", len(args.batch) * args.steps * len(groups)) as advance:
        for group in groups:
            measured, held = _measure(subjects, group, args, environment.copy_gb_per_s * 1e9, advance)
            results += measured
            adapter_bytes |= held
    order = {mode: number for number, mode in enumerate(subjects.modes)}
    results.sort(key=lambda result: (result.batch, order[result.mode]))
    _report(reporter, subjects, args, environment, results, adapter_bytes)
    return 0


def _report(
    reporter: Reporter,
    subjects: Subjects,
    args: argparse.Namespace,
    environment: Environment,
    results: Sequence[Result],
    adapter_bytes: Mapping[str, int],
) -> None:
    found = ratios(results, key=lambda result: result.batch)
    rows = table_rows(results, found, key=lambda result: result.batch)
    reporter.table(f"decode step of {subjects.base.id}", COLUMNS, rows)
    throughput = throughput_of_many(results)
    for batch, ratio in throughput.items():
        profiles = subjects.description["profiles_in_batch"]
        reporter.console.print(f"batch {batch}: throughput of {profiles} profiles over one: {ratio:.3f}")
    for count, num_bytes in adapter_bytes.items():
        reporter.console.print(f"adapter bytes with {count} resident: {num_bytes / 1e6:.2f} MB")
    settings = {
        **subjects.description,
        "steps": args.steps,
        "temperature": args.temperature,
        "interleaved": not args.one_at_a_time,
    }
    reporter.end(
        {
            "results": [result.record() for result in results],
            "ratios": found,
            "throughput_of_many": throughput,
            "adapter_bytes": adapter_bytes,
            "peak_device_bytes": _peak_bytes(subjects.base.device),
            "settings": settings,
            "environment": environment.record(),
        }
    )


def _measure(
    subjects: Subjects,
    modes: Sequence[Mode],
    args: argparse.Namespace,
    bytes_per_s: float,
    advance: Callable[[], None],
) -> tuple[list[Result], dict[str, int]]:
    """Results of `modes` at every batch size, and resident bytes of adapters by number of profiles."""
    num_new = 1 + WARM_UP_STEPS + args.steps + SPARE_TOKENS
    most = max(num_requests(mode, batch) for mode in modes for batch in args.batch)
    settings = subjects.settings(most, args.context + num_new)
    params = SamplingParams(max_tokens=num_new, ignore_eos=True, temperature=args.temperature, seed=0)
    variants = [subjects.variant(mode, settings) for mode in modes]
    adapter_bytes = _adapter_bytes(variants)
    results: list[Result] = []
    for batch in args.batch:
        prompts = random_prompts(
            num_requests("crowded", batch), args.context, vocab_size=subjects.base.vocab_size, seed=batch
        )
        seconds = _times(variants, batch, prompts, params, args.steps, subjects.base.device, advance)
        for mode in modes:
            requests = num_requests(mode, batch)
            floor_s = subjects.floor_s(requests, args.context, bytes_per_s=bytes_per_s)
            times = Quartiles.of_seconds(seconds[mode])
            results.append(Result(batch, mode, args.context, times, requests, floor_s))
    return results, adapter_bytes


def _times(
    variants: Sequence[Variant],
    batch: int,
    prompts: list[list[int]],
    params: SamplingParams,
    steps: int,
    device: torch.device,
    advance: Callable[[], None],
) -> dict[Mode, list[float]]:
    try:
        for variant in variants:
            variant.fill(prompts[: num_requests(variant.mode, batch)], params)
            _level(variant, WARM_UP_STEPS)
        calls = {variant.mode: variant.decode for variant in variants}
        return interleave(calls, steps, device=device, on_round=advance)
    finally:
        for variant in variants:
            variant.clear()


def _level(variant: Variant, steps: int) -> None:
    """A few untimed steps, for caches and lazy set-up."""
    for _ in range(steps):
        variant.decode()


def _adapter_bytes(variants: Sequence[Variant]) -> dict[str, int]:
    """Resident bytes with one profile and with all of a variant's, by loading them one after the other."""
    found: dict[str, int] = {}
    for variant in variants:
        if variant.mode not in ("unlearned", "many", "mixed"):
            continue
        planner = variant.engine.planner
        for count, decision in enumerate(variant.decisions, start=1):
            planner.release(planner.plan(decision))
            if decision.applied and count in (1, len(variant.decisions)):
                found[str(count)] = variant.engine.runner.decoder.bank.resident_bytes
    return found


def _peak_bytes(device: torch.device) -> Json:
    """Most memory that tensors held on a GPU; None on a CPU, where nobody counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
