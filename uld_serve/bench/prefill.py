"""`uld-serve bench prefill`: from a request's arrival to its first token, on an idle engine, by mode. Called by
command. Every prompt is new, so no cached prefix helps."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from uld_serve.bench.environment import Environment
from uld_serve.bench.report import Reporter
from uld_serve.bench.result import COLUMNS, Result, ratios, table_rows
from uld_serve.bench.subjects import Subjects, add_options
from uld_serve.bench.timing import Quartiles, interleave
from uld_serve.bench.variant import Mode, Variant, random_prompts
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import InvalidRequest

SUMMARY = "time to first token by prompt length: plain and unlearned, in turn in one process"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, modes=("plain", "unlearned"))
    how = parser.add_argument_group("how")
    how.add_argument("--context", type=int, nargs="+", default=[512, 2048], help="prompt lengths in tokens")
    how.add_argument("--repeats", type=int, default=10, help="timed prompts of each mode and length")
    how.add_argument("--json", action="store_true", help="one JSON line last; all else to standard error")


def run(args: argparse.Namespace) -> int:
    if min(args.context) < 1 or args.repeats < 1:
        raise InvalidRequest("--context and --repeats must be at least 1")
    subjects, reporter = Subjects.of(args), Reporter(as_json=args.json)
    environment = Environment.look(subjects.base.device)
    reporter.begin(environment)
    settings = subjects.settings(1, max(args.context) + 2)
    variants = [subjects.variant(mode, settings) for mode in subjects.modes]
    results: list[Result] = []
    with reporter.progress("prompts", len(args.context) * args.repeats) as advance:
        for context in args.context:
            seconds = _times(subjects, variants, context, args.repeats, advance)
            results += [
                Result(1, mode, context, Quartiles.of_seconds(seconds[mode]), context)
                for mode in subjects.modes
            ]
    found = ratios(results, key=lambda result: result.context)
    rows = table_rows(results, found, key=lambda result: result.context)
    reporter.table(f"time to first token of {subjects.base.id}", COLUMNS, rows)
    reporter.end(
        {
            "results": [result.record() for result in results],
            "ratios": found,
            "settings": {**subjects.description, "repeats": args.repeats},
            "environment": environment.record(),
        }
    )
    return 0


def _times(
    subjects: Subjects, variants: list[Variant], context: int, repeats: int, advance: Callable[[], None]
) -> dict[Mode, list[float]]:
    params = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.0, seed=0)
    prompts = iter(random_prompts(repeats + 1, context, vocab_size=subjects.base.vocab_size, seed=context))
    prompt: list[int] = next(prompts)

    def next_prompt() -> None:
        nonlocal prompt
        for variant in variants:
            variant.clear()
        prompt = next(prompts)

    try:
        for variant in variants:  # once untimed, for caches and lazy set-up
            variant.first_token(prompt, params)
        calls = {one.mode: lambda one=one: one.first_token(prompt, params) for one in variants}
        device = subjects.base.device
        return interleave(calls, repeats, device=device, on_round=advance, before_round=next_prompt)
    finally:
        for variant in variants:
            variant.clear()
