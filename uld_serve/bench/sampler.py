"""`uld-serve bench sampler`: one draw for a batch of rows, from logits in memory to tokens, by kind of row, batch and
vocabulary: ours beside the plain torch chain and FlashInfer. Called by command. Holds no model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from uld_serve.bench import sampler_head
from uld_serve.bench.environment import Environment
from uld_serve.bench.report import Json, Reporter
from uld_serve.bench.sampler_kinds import ROW_HELP, ROW_KINDS, History, floor_bytes, rotated_logits
from uld_serve.bench.sampler_variants import (
    VARIANT_HELP,
    VARIANTS,
    Case,
    VariantName,
    can_draw,
    case_of,
    clock_of,
    missing,
)
from uld_serve.bench.timing import Quartiles
from uld_serve.errors import InvalidRequest

SUMMARY = "time of one draw: the fused sampler, the plain torch chain, that chain compiled, and FlashInfer"
COLUMNS = ("rows", "vocab", "batch", "variant", "us", "quartiles", "floor us", "bandwidth", "x chain")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST_BATCH, LARGEST_VOCAB = 4096, 2**20
# Buffers beyond these are never reached on a CPU, where every call is timed by itself.
_BUFFERS_PER_REPEAT = len(VARIANTS) + 1


@dataclass(frozen=True, slots=True)
class DrawTime:
    """`floor_us`: every row of logits that the draw depends on, read once at the measured copy bandwidth."""

    rows: str
    vocab: int
    batch: int
    variant: VariantName
    times: Quartiles
    fastest_us: float
    floor_us: float
    is_replayed: bool

    @property
    def us(self) -> float:
        return self.times.median * 1e3

    @property
    def key(self) -> str:
        return f"{self.rows}/{self.vocab}/{self.batch}"

    def record(self) -> dict[str, Json]:
        return {
            "rows": self.rows,
            "vocab": self.vocab,
            "batch": self.batch,
            "variant": self.variant,
            "us_median": round(self.us, 3),
            "us_fastest": round(self.fastest_us, 3),
            "us_quartiles": [round(self.times.lower * 1e3, 3), round(self.times.upper * 1e3, 3)],
            "floor_us": round(self.floor_us, 3),
            "share_of_bandwidth": round(self.floor_us / self.us, 4),
            "graph": self.is_replayed,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is drawn")
    what.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8, 32, 64, 256], help="rows to draw at once"
    )
    what.add_argument(
        "--vocab",
        type=int,
        nargs="+",
        default=[32000, 49152, 128256, 151936],
        help="tokens in the vocabulary",
    )
    what.add_argument("--rows", nargs="+", choices=ROW_KINDS, default=list(ROW_KINDS), help=ROW_HELP)
    what.add_argument("--dtype", choices=DTYPES, default="float32", help="of the logits")
    what.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    what.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as torch chooses)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        help=f"{VARIANT_HELP} (default: all that run here; on a CPU compiled only when named: it compiles for 10 s and "
        "more for each kind, batch and vocabulary)",
    )
    how.add_argument(
        "--repeats", type=int, default=10, help="timed rounds; every variant once in each, in turn"
    )
    how.add_argument("--json", action="store_true", help="one JSON line last; all else to standard error")
    sampler_head.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    device = _checked(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    reporter, environment = Reporter(as_json=args.json), Environment.look(device)
    reporter.begin(environment)
    if args.head:
        return sampler_head.run(args, reporter, environment, device)
    variants, left_out = _variants(args, device)
    for name, why in left_out.items():
        reporter.console.print(f"{name} is left out: {why}")
    results: list[DrawTime] = []
    total = len(args.vocab) * len(args.batch) * len(args.rows)
    with reporter.progress("draws", total) as advance, torch.inference_mode():
        for case in _cases(args, device):
            found = measure(case, variants, args.repeats, bytes_per_s=environment.copy_gb_per_s * 1e9)
            results += found
            advance()
            print(_line(found), file=sys.stderr)
    ratios = over_chain(results)
    reporter.table("one draw", COLUMNS, _table_rows(results, ratios))
    reporter.end(
        {
            "results": [result.record() for result in results],
            "ratios": ratios,
            "left_out": {str(name): why for name, why in left_out.items()},
            "settings": {
                "dtype": args.dtype,
                "repeats": args.repeats,
                "variants": list(variants),
                "backend": _backend(results),
                "floor": "every row of logits that a draw depends on, read once at the copy bandwidth",
            },
            "environment": environment.record(),
        }
    )
    return 0


def measure(
    case: Case, variants: Sequence[VariantName], repeats: int, *, bytes_per_s: float
) -> list[DrawTime]:
    """Every variant `repeats` times, in turn, each round beginning with the next one."""
    clocks = [clock_of(name, case) for name in variants if can_draw(name, case)]
    seconds: dict[VariantName, list[float]] = {clock.name: [] for clock in clocks}
    for number in range(repeats):
        start = number % len(clocks)
        for clock in clocks[start:] + clocks[:start]:
            seconds[clock.name].append(clock.seconds())
    floor = floor_bytes(case.kinds, case.vocab_size, case.logits_NRV.element_size()) / bytes_per_s
    return [
        DrawTime(
            case.name,
            case.vocab_size,
            case.batch,
            clock.name,
            Quartiles.of_seconds(seconds[clock.name]),
            min(seconds[clock.name]) * 1e6,
            floor * 1e6,
            clock.is_replayed,
        )
        for clock in clocks
    ]


def over_chain(results: Sequence[DrawTime]) -> dict[str, dict[str, float]]:
    """By "rows/vocab/batch": how many times as long as each of ours the others take."""
    groups: dict[str, dict[str, float]] = {}
    for one in results:
        groups.setdefault(one.key, {})[one.variant] = one.us
    return {key: _pairs(medians) for key, medians in groups.items()}


def _pairs(medians: dict[str, float]) -> dict[str, float]:
    return {
        f"{other}/{ours}": round(medians[other] / medians[ours], 3)
        for ours in ("fused", "static")
        for other in ("chain", "compiled", "flashinfer")
        if ours in medians and other in medians
    }


def _checked(args: argparse.Namespace) -> torch.device:
    """Raises InvalidRequest for numbers and a device that mean nothing."""
    if not all(1 <= batch <= LARGEST_BATCH for batch in args.batch):
        raise InvalidRequest(f"--batch must be 1 to {LARGEST_BATCH}")
    if not all(2 <= vocab <= LARGEST_VOCAB for vocab in args.vocab):
        raise InvalidRequest(f"--vocab must be 2 to {LARGEST_VOCAB}")
    if args.repeats < 1:
        raise InvalidRequest("--repeats must be at least 1")
    if args.threads is not None and args.threads < 1:
        raise InvalidRequest("--threads must be at least 1")
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidRequest(f"--device must be auto, cpu, cuda or cuda:N, not '{name}'") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise InvalidRequest(f"there is no device '{name}' here")
    return device


def _variants(
    args: argparse.Namespace, device: torch.device
) -> tuple[list[VariantName], dict[VariantName, str]]:
    """Those that run, and why each other one does not. Raises InvalidRequest where none of the wanted ones does."""
    left_out = {name: why for name in args.variants or VARIANTS if (why := missing(name, device)) is not None}
    if args.variants is None and device.type == "cpu":
        left_out.setdefault("compiled", "it compiles for 10 s and more for each case; name it in --variants")
    chosen = [name for name in VARIANTS if name in (args.variants or VARIANTS) and name not in left_out]
    if not chosen:
        raise InvalidRequest(f"nothing to time: {'; '.join(left_out.values())}")
    return chosen, left_out


def _cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    at_most = args.repeats * _BUFFERS_PER_REPEAT + len(VARIANTS) if device.type == "cpu" else None
    for vocab in args.vocab:
        for batch in args.batch:
            logits_NRV = rotated_logits(batch, vocab, DTYPES[args.dtype], device, at_most=at_most)
            history = History.random(batch, vocab, device)
            for name in args.rows:
                yield case_of(name, batch, logits_NRV, history)


def _backend(results: Sequence[DrawTime]) -> str:
    """What the static sampler ran: its launches can be recorded where the kernels are Triton's."""
    static = [one.is_replayed for one in results if one.variant == "static"]
    return "triton" if any(static) else "torch"


def _line(found: Sequence[DrawTime]) -> str:
    times = ", ".join(f"{one.variant} {one.us:.1f} us" for one in found)
    return (
        f"{found[0].rows}, vocab {found[0].vocab}, batch {found[0].batch}: {times}"
        if found
        else "nothing to time"
    )


def _table_rows(results: Sequence[DrawTime], ratios: dict[str, dict[str, float]]) -> Iterator[list[str]]:
    for one in results:
        ratio = ratios[one.key].get(f"chain/{one.variant}")
        yield [
            one.rows,
            str(one.vocab),
            str(one.batch),
            one.variant,
            f"{one.us:.1f}",
            f"{one.times.lower * 1e3:.1f}-{one.times.upper * 1e3:.1f}",
            f"{one.floor_us:.2f}",
            f"{one.floor_us / one.us:.1%}",
            "" if ratio is None else f"{ratio:.2f}",
        ]
