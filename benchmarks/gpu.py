"""Everything that is to be known on a GPU, in one run: are kernels and sampler right, what do they take, and what does
a decode step take with and without recorded graphs, plain, naive and unlearned. `--shape tiny` runs it all on a CPU.

    python benchmarks/gpu.py --shape llama-3.1-8b --out benchmarks/results/gpu.json

One engine serves all modes, so that an 8B model, its caches and naive's second model fit 80 GB. Modes therefore run in
turn, plain first and last. Prints tables, then one JSON line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from gpu_kernels import Check, KernelTime, attention_checks, attention_times, lora_checks, lora_times
from gpu_layers import prefill_checks, step_checks
from gpu_sampler import SamplerReport, sampler_report

from uld_serve.bench.environment import Environment
from uld_serve.bench.naive import NaiveRunner, naive_version, truncated_copy
from uld_serve.bench.subjects import Subjects, add_options
from uld_serve.bench.target import kv_bytes_per_token
from uld_serve.bench.timing import Quartiles, interleave
from uld_serve.bench.variant import Mode, Variant, random_prompts
from uld_serve.engine.cuda_graphs import CudaRecorder, GraphedRunner, Record
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.engine.runner import Runner
from uld_serve.errors import UldError
from uld_serve.model.decoder import Decoder
from uld_serve.model.loading import Base

# Graphs are recorded when a shape comes back, and prompts have ended by then.
WARM_UP_STEPS = 4
PARTS = ("kernels", "sampler", "decode", "prefill")
# Plain a second time, last: how far the machine itself has moved meanwhile.
TURNS: tuple[Mode, ...] = ("plain", "unlearned", "naive", "plain")


@dataclass(frozen=True, slots=True)
class Step:
    """`floor` is the time of reading weights and keys and values once, at the measured copy bandwidth."""

    mode: str
    batch: int
    context: int
    graphs: bool
    turn: int
    replayed: bool
    ms_median: float
    ms_quartiles: tuple[float, float]
    floor_ms: float
    over_floor: float


@dataclass(frozen=True, slots=True)
class Prompt:
    mode: str
    tokens: int
    ms_median: float
    ms_quartiles: tuple[float, float]


def main(arguments: list[str] | None = None, *, record: Record | None = None) -> int:
    """`record` stands in for CUDA graphs where there is no GPU."""
    args = _parser().parse_args(arguments)
    subjects = Subjects.of(args)
    environment = Environment.look(subjects.base.device)
    print(environment.line, file=sys.stderr)
    checks, kernels = _kernels(args, subjects) if "kernels" in args.parts else ([], [])
    sampler = _sampler(args, subjects, environment) if "sampler" in args.parts else None
    checks += [] if sampler is None else sampler.checks
    steps, prompts, ratios, attention = [], [], {}, None
    if "decode" in args.parts or "prefill" in args.parts:
        bench = _Bench.of(args, subjects, environment, record)
        attention = bench.attention
        steps = list(bench.decode()) if "decode" in args.parts else []
        prompts = list(bench.prefill()) if "prefill" in args.parts else []
        ratios = _ratios(steps)
    report = {
        "checks": [asdict(check) for check in checks],
        "kernels": [asdict(one) for one in kernels],
        "sampler": None if sampler is None else sampler.record(),
        "lora_share": _lora_share(kernels, steps),
        "decode": [asdict(step) for step in steps],
        "ratios": ratios,
        "prefill": [asdict(prompt) for prompt in prompts],
        "attention": attention,
        "settings": {**subjects.description, "steps": args.steps, "arguments": arguments or sys.argv[1:]},
        "environment": environment.record(),
        "peak_device_bytes": _peak_bytes(subjects.base.device),
        "ok": all(check.ok for check in checks),
    }
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if report["ok"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, modes=("plain", "naive", "unlearned"))
    parser.set_defaults(shape="llama-3.1-8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, nargs="+", default=[512, 2048])
    parser.add_argument(
        "--sampler-batch",
        type=int,
        nargs="+",
        default=[1, 8, 32, 64, 256],
        help="rows that the sampler draws at once",
    )
    parser.add_argument("--steps", type=int, default=30, help="timed steps, or prompts, of each kind")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the report, indented, besides the last line"
    )
    return parser


def _kernels(args: argparse.Namespace, subjects: Subjects) -> tuple[list[Check], list[KernelTime]]:
    config, base = subjects.base.model.config.get_text_config(), subjects.base
    checks = [
        *attention_checks(base.device, base.dtype, config),
        *lora_checks(base.device, base.dtype, config),
        *prefill_checks(base.device, base.dtype, config),
        *step_checks(base.device, base.dtype, config),
    ]
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'} {check.what}: {check.gap:.2g}", file=sys.stderr)
    times = []
    for batch in args.batch:
        for context in args.context:
            times += attention_times(base.device, base.dtype, config, batch=batch, context=context)
        times += lora_times(base.device, base.dtype, config, batch=batch, rank=args.rank or 16)
    for one in times:
        print(f"{one.what:40} batch {one.batch:4} {one.us:9.1f} us {one.gb_per_s:8.0f} GB/s", file=sys.stderr)
    return checks, times


def _sampler(args: argparse.Namespace, subjects: Subjects, environment: Environment) -> SamplerReport:
    base = subjects.base
    report = sampler_report(
        base.device,
        base.dtype,
        vocab=base.vocab_size,
        width=base.model.config.get_text_config().hidden_size,
        batches=args.sampler_batch,
        bytes_per_s=environment.copy_gb_per_s * 1e9,
    )
    for line in report.lines():
        print(line, file=sys.stderr)
    return report


@dataclass(slots=True)
class _Bench:
    """One engine; its runner is changed between turns, while it holds no request. Runners: the base's, and that of
    naive's second model, each run as it is and recorded."""

    args: argparse.Namespace
    subjects: Subjects
    engine: Engine
    eager: tuple[Runner, Runner]
    graphed: tuple[GraphedRunner | None, GraphedRunner | None]
    bytes_per_s: float

    @classmethod
    def of(
        cls, args: argparse.Namespace, subjects: Subjects, environment: Environment, record: Record | None
    ) -> _Bench:
        base, device = subjects.base, subjects.base.device
        tokens = max(args.context) + 2 + WARM_UP_STEPS + 2 * args.steps
        settings = subjects.settings(max(args.batch), tokens)
        assistant: Base = truncated_copy(base, subjects.naive_layers)
        engine = Engine.of(base, settings)
        engine.planner.defers_logits = False  # as on a GPU: a recorded step computes all its scores
        if record is None and device.type == "cuda":
            record = CudaRecorder(device)
        second = Runner.of(Decoder.of(assistant), engine.config)
        rows = max(args.batch)
        graphed, graphed_second = None, None
        if isinstance(engine.runner, GraphedRunner):
            graphed = engine.runner
        elif record is not None:
            graphed = GraphedRunner.around(engine.runner, record, max_rows=rows)
        if graphed is not None and record is not None:
            graphed_second = GraphedRunner.around(second, record, max_rows=rows)
            second = _eager(graphed_second)
        eager = engine.runner if graphed is None else _eager(graphed)
        copied = environment.copy_gb_per_s * 1e9
        return cls(args, subjects, engine, (eager, second), (graphed, graphed_second), copied)

    @property
    def attention(self) -> str:
        """Of decode steps."""
        backend = getattr(self.eager[0].decoder, "attention", None)
        return "torch-sdpa" if backend is None else backend.name

    def decode(self) -> Iterator[Step]:
        print(f"{'mode':10} graphs  batch  context       ms  x floor", file=sys.stderr)
        for context in self.args.context:
            for batch in self.args.batch:
                for graphs in (False,) if self.graphed[0] is None else (False, True):
                    for turn, mode in enumerate(mode for mode in TURNS if mode in self.args.modes):
                        step = self._step(mode, batch, context, graphs, turn)
                        print(
                            f"{mode:10} {'on ' if graphs else 'off'} {batch:8} {context:8} "
                            f"{step.ms_median:8.3f} {step.over_floor:8.2f}",
                            file=sys.stderr,
                        )
                        yield step

    def prefill(self) -> Iterator[Prompt]:
        for tokens in self.args.context:
            prompts = iter(
                random_prompts(
                    2 * (self.args.steps + 1), tokens, vocab_size=self.subjects.base.vocab_size, seed=tokens
                )
            )
            for mode in (mode for mode in ("plain", "unlearned") if mode in self.args.modes):
                variant = self._variant(mode, graphs=False)
                times = [self._first_token(variant, next(prompts)) for _ in range(self.args.steps + 1)]
                quartiles = Quartiles.of_seconds(times[1:])  # the first one warms up
                yield Prompt(mode, tokens, quartiles.median, (quartiles.lower, quartiles.upper))

    def _first_token(self, variant: Variant, prompt: list[int]) -> float:
        params = _params(2)
        try:
            return self._timed(lambda: variant.first_token(prompt, params), 1)[0]
        finally:
            variant.clear()

    def _step(self, mode: Mode, batch: int, context: int, graphs: bool, turn: int) -> Step:
        variant = self._variant(mode, graphs=graphs)
        prompts = random_prompts(batch, context, vocab_size=self.subjects.base.vocab_size, seed=batch)
        replayed = self._replayed()
        try:
            variant.fill(prompts, _params(2 + WARM_UP_STEPS + 2 * self.args.steps))
            for _ in range(WARM_UP_STEPS):
                variant.decode()
            quartiles = Quartiles.of_seconds(self._timed(variant.decode, self.args.steps))
        finally:
            variant.clear()
        floor_ms = self.subjects.floor_s(batch, context, bytes_per_s=self.bytes_per_s) * 1e3
        return Step(
            mode,
            batch,
            context,
            graphs,
            turn,
            self._replayed() > replayed,
            quartiles.median,
            (quartiles.lower, quartiles.upper),
            floor_ms,
            quartiles.median / floor_ms,
        )

    def _timed(self, call: Callable[[], object], rounds: int) -> list[float]:
        device = self.subjects.base.device
        return interleave({"one": call}, rounds, device=device, on_round=lambda: None)["one"]

    def _replayed(self) -> int:
        graphs = None if self.graphed[0] is None else self.graphed[0].graphs
        return 0 if graphs is None else graphs.num_replayed

    def _variant(self, mode: Mode, *, graphs: bool) -> Variant:
        runner, second = self.graphed if graphs else self.eager
        assert runner is not None, "graphs are timed where there are any"
        assert second is not None, "both models have graphs, or none has"
        version = self.subjects.versions[0]
        decision = Decision.base() if mode == "plain" else Decision.of_version(version)
        if mode == "naive":
            decision = Decision.of_version(naive_version(version, num_layers=self.subjects.naive_layers))
            self.engine.runner = cast(Runner, NaiveRunner(runner, second))
        else:
            self.engine.runner = runner
        return Variant(mode, self.engine, (decision,), kv_bytes_per_token(self.subjects.base))


def _eager(graphed: GraphedRunner) -> Runner:
    """The same, without its graphs."""
    return Runner(graphed.decoder, graphed.cache, graphed.own, graphed.separate)


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, seed=0)


def _ratios(steps: list[Step]) -> dict[str, dict[str, float]]:
    """By "context/batch/graphs": medians over plain's, which is the mean of its turns."""
    groups: dict[str, dict[str, list[float]]] = {}
    for step in steps:
        key = f"{step.context}/{step.batch}/{'on' if step.graphs else 'off'}"
        groups.setdefault(key, {}).setdefault(step.mode, []).append(step.ms_median)
    found = {}
    for key, modes in groups.items():
        means = {mode: sum(times) / len(times) for mode, times in modes.items()}
        if "plain" in means:
            found[key] = {f"{mode}/plain": means[mode] / means["plain"] for mode in means if mode != "plain"}
            if len(modes["plain"]) > 1:
                found[key]["plain/plain"] = modes["plain"][-1] / modes["plain"][0]
    return found


def _lora_share(kernels: list[KernelTime], steps: list[Step]) -> dict[str, float]:
    """By "context/batch": time of all deltas of an unlearned step over the step's own, with graphs if there are."""
    by_batch: dict[int, float] = {}
    for one in kernels:
        by_batch[one.batch] = by_batch.get(one.batch, 0.0) + one.us_of_step / 1e3
    with_graphs = any(step.graphs for step in steps)
    return {
        f"{step.context}/{step.batch}": by_batch[step.batch] / step.ms_median
        for step in steps
        if step.mode == "unlearned" and step.graphs == with_graphs and step.batch in by_batch
    }


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UldError as error:
        print(error.message, file=sys.stderr)
        sys.exit(2)
