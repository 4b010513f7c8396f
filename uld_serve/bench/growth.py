"""`uld-serve bench growth`: bytes of keys and values, and the time of a decode step, by tokens of context. Called by
command. Both should lie on a line: it says how well they do."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from uld_serve.bench.decode import WARM_UP_STEPS
from uld_serve.bench.environment import Environment
from uld_serve.bench.line import Line, fit
from uld_serve.bench.plot import plot_growth, require_plot
from uld_serve.bench.report import Json, Reporter
from uld_serve.bench.subjects import Subjects, add_options
from uld_serve.bench.timing import Quartiles, interleave
from uld_serve.bench.variant import Mode, Variant, random_prompts
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import InvalidRequest

SUMMARY = "cache bytes and step time against context length, and how straight their lines are"
COLUMNS = ("mode", "context", "cache MB", "bytes a token", "ms", "quartiles")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, modes=("plain", "unlearned"))
    how = parser.add_argument_group("how")
    how.add_argument("--batch", type=int, default=1, help="requests in the batch")
    how.add_argument(
        "--context", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096],
        help="tokens in each request's cache at the start",
    )  # fmt: skip
    how.add_argument("--steps", type=int, default=20, help="timed steps of each mode and context")
    how.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw both; needs matplotlib")
    how.add_argument("--json", action="store_true", help="one JSON line last; all else to standard error")


@dataclass(frozen=True, slots=True)
class Point:
    """`cache_bytes` of the whole batch, in whole blocks; `tokens` of each request, half way through the steps."""

    mode: Mode
    context: int
    tokens: float
    cache_bytes: int
    times: Quartiles

    def record(self) -> dict[str, Json]:
        return {
            "mode": self.mode,
            "context": self.context,
            "tokens": self.tokens,
            "cache_bytes": self.cache_bytes,
            "ms_median": round(self.times.median, 4),
            "ms_quartiles": [round(self.times.lower, 4), round(self.times.upper, 4)],
        }


def run(args: argparse.Namespace) -> int:
    contexts = sorted(set(args.context))
    if contexts[0] < 1 or args.steps < 1 or args.batch < 1:
        raise InvalidRequest("--batch, --context and --steps must be at least 1")
    if len(contexts) < 3:
        raise InvalidRequest("--context needs three lengths or more: any two points lie on a line")
    if args.plot is not None:
        require_plot(args.plot)
    subjects, reporter = Subjects.of(args), Reporter(as_json=args.json)
    environment = Environment.look(subjects.base.device)
    reporter.begin(environment)
    num_new = 1 + WARM_UP_STEPS + args.steps + 1
    settings = subjects.settings(args.batch, contexts[-1] + num_new)
    variants = [subjects.variant(mode, settings) for mode in subjects.modes]
    points: list[Point] = []
    with reporter.progress("steps", len(contexts) * args.steps) as advance:
        for context in contexts:
            points += _points(subjects, variants, context, args, advance)
    points.sort(key=lambda point: subjects.modes.index(point.mode))
    _report(reporter, subjects, args, environment, points)
    return 0


def _points(
    subjects: Subjects,
    variants: Sequence[Variant],
    context: int,
    args: argparse.Namespace,
    advance: Callable[[], None],
) -> list[Point]:
    prompts = random_prompts(args.batch, context, vocab_size=subjects.base.vocab_size, seed=context)
    num_new = 1 + WARM_UP_STEPS + args.steps + 1
    params = SamplingParams(max_tokens=num_new, ignore_eos=True, temperature=0.0, seed=0)
    try:
        for variant in variants:
            variant.fill(prompts, params)
            for _ in range(WARM_UP_STEPS):
                variant.decode()
        calls = {variant.mode: variant.decode for variant in variants}
        seconds = interleave(calls, args.steps, device=subjects.base.device, on_round=advance)
        return [
            Point(
                one.mode,
                context,
                context + WARM_UP_STEPS + args.steps / 2,
                one.cache_bytes,
                Quartiles.of_seconds(seconds[one.mode]),
            )
            for one in variants
        ]
    finally:
        for variant in variants:
            variant.clear()


def _report(
    reporter: Reporter,
    subjects: Subjects,
    args: argparse.Namespace,
    environment: Environment,
    points: Sequence[Point],
) -> None:
    reporter.table(f"growth of {subjects.base.id}, batch {args.batch}", COLUMNS, map(_row, points))
    lines: dict[str, dict[str, Line]] = {
        mode: _lines([one for one in points if one.mode == mode]) for mode in subjects.modes
    }
    for mode, found in lines.items():
        reporter.console.print(
            f"{mode}: {found['bytes'].slope / args.batch:,.0f} bytes a token (R² {found['bytes'].r_squared:.5f}); "
            f"{found['ms'].slope * 1e3:.3f} ms a step per 1,000 tokens on {found['ms'].intercept:.2f} ms "
            f"(R² {found['ms'].r_squared:.4f})"
        )
    if args.plot is not None:
        plot_growth(args.plot, {mode: _series(points, mode) for mode in subjects.modes}, lines)
        reporter.console.print(f"drawn to {args.plot}")
    reporter.end(
        {
            "results": [point.record() for point in points],
            "fits": {mode: {what: asdict(line) for what, line in two.items()} for mode, two in lines.items()},
            "settings": {**subjects.description, "batch": args.batch, "steps": args.steps},
            "environment": environment.record(),
        }
    )


def _lines(points: Sequence[Point]) -> dict[str, Line]:
    tokens = [point.tokens for point in points]
    return {
        "bytes": fit(tokens, [point.cache_bytes for point in points]),
        "ms": fit(tokens, [point.times.median for point in points]),
    }


def _series(points: Sequence[Point], mode: Mode) -> dict[str, list[float]]:
    own = [point for point in points if point.mode == mode]
    return {
        "tokens": [point.tokens for point in own],
        "bytes": [float(point.cache_bytes) for point in own],
        "ms": [point.times.median for point in own],
    }


def _row(point: Point) -> list[str]:
    return [
        point.mode,
        str(point.context),
        f"{point.cache_bytes / 1e6:.2f}",
        f"{point.cache_bytes / point.tokens:,.0f}",
        f"{point.times.median:.2f}",
        f"{point.times.lower:.2f}-{point.times.upper:.2f}",
    ]
