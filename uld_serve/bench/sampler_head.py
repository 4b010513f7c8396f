"""`uld-serve bench sampler --head`: from hidden rows to tokens with the assistant's logits computed whole, or late on
the tokens that filters leave, by batch size, and where one overtakes the other. Called by sampler.

Legend: B rows to draw, D model width, V vocabulary."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from uld_kernels import LateRows, SampleOutput, SampleRow, fused_sample

from uld_serve.bench.environment import Environment
from uld_serve.bench.report import Json, Reporter
from uld_serve.bench.sampler_kinds import KINDS, History
from uld_serve.bench.timing import Quartiles, interleave
from uld_serve.errors import InvalidRequest
from uld_serve.model.head import Head

COLUMNS = ("rows", "vocab", "batch", "whole ms", "late ms", "late/whole", "of the fastest")
HEAD_ROWS = ("subtract", "relu_difference")
LARGEST_WIDTH = 65536
# Of the logits. 100 to 300 tokens then lie within a filter's reach of the best.
LOGIT_DEVIATION = 3.0
SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    head = parser.add_argument_group("the head, instead")
    head.add_argument(
        "--head",
        action="store_true",
        help="time the head's product and the draw together, the assistant's logits whole and late (rows: "
        f"{' and '.join(HEAD_ROWS)})",
    )
    head.add_argument("--width", type=int, default=576, metavar="D", help="model width (default: 576)")


def run(args: argparse.Namespace, reporter: Reporter, environment: Environment, device: torch.device) -> int:
    if device.type != "cpu":
        raise InvalidRequest("--head compares two ways of a CPU; benchmarks/gpu.py times them on a GPU")
    if not 1 <= args.width <= LARGEST_WIDTH:
        raise InvalidRequest(f"--width must be 1 to {LARGEST_WIDTH}")
    names = [name for name in args.rows if name in HEAD_ROWS]
    if not names:
        raise InvalidRequest(f"--head needs --rows {' or '.join(HEAD_ROWS)}: others read every logit")
    results: list[dict[str, Json]] = []
    total = len(args.vocab) * len(names) * len(args.batch)
    with reporter.progress("draws", total) as advance, torch.inference_mode():
        for vocab in args.vocab:
            head = _random_head(vocab, args.width, device)
            for name in names:
                for batch in args.batch:
                    times = _times(head, name, batch, args.repeats, device)
                    results.append(_record(name, vocab, batch, times))
                    advance()
    crossovers = {
        f"{name}/{vocab}": crossover([one for one in results if (one["rows"], one["vocab"]) == (name, vocab)])
        for name in names
        for vocab in args.vocab
    }
    reporter.table(f"head of width {args.width} and one draw", COLUMNS, [_cells(one) for one in results])
    for key, found in crossovers.items():
        reporter.console.print(f"{key}: {found}")
    reporter.end(
        {
            "results": results,
            "crossovers": crossovers,
            "settings": {"width": args.width, "dtype": "bfloat16", "repeats": args.repeats},
            "environment": environment.record(),
        }
    )
    return 0


def crossover(results: Sequence[Mapping[str, Json]]) -> str:
    """In words: which one is faster, or up to and from which of the batch sizes measured."""
    batches = sorted((int(str(one["batch"])), float(str(one["late/whole"])) < 1.0) for one in results)
    wins = [is_late for _, is_late in batches]
    if len(set(wins)) == 1:
        return f"{'late' if wins[0] else 'whole'} is faster at every batch size measured"
    changes = [at for at in range(1, len(wins)) if wins[at] != wins[at - 1]]
    if len(changes) > 1:
        return "neither is faster throughout: these times are too noisy to tell"
    (at,) = changes
    first, second = ("late", "whole") if wins[0] else ("whole", "late")
    return f"{first} is faster up to batch {batches[at - 1][0]}, {second} from batch {batches[at][0]} on"


def _random_head(vocab: int, width: int, device: torch.device) -> Head:
    generator = torch.Generator(device).manual_seed(SEED)
    linear = nn.Linear(width, vocab, bias=False, device="meta")
    weight_VD = torch.randn(vocab, width, generator=generator, device=device)
    linear.weight = nn.Parameter(weight_VD.to(torch.bfloat16), requires_grad=False)
    return Head.of(linear, is_packed=device.type == "cpu")


def _times(head: Head, name: str, batch: int, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of both, in turn, from hidden rows of which each assistant's is near its target's."""
    generator = torch.Generator(device).manual_seed(SEED)
    vocab, width = head.weight_WD.shape
    noise_SBD = torch.randn(2, batch, width, generator=generator, device=device)
    noise_SBD[1] = 0.9 * noise_SBD[0] + 0.4 * noise_SBD[1]
    hidden_RD = (noise_SBD.view(2 * batch, width) * (LOGIT_DEVIATION / width**0.5)).to(torch.bfloat16)
    history = History.random(batch, vocab, device)
    rows = [KINDS[name].row(number, batch, history) for number in range(batch)]
    calls = {"whole": _whole(head, hidden_RD, rows), "late": _late(head, hidden_RD, rows)}
    for call in calls.values():
        call()
    return interleave(calls, repeats, device=device, on_round=lambda: None)


def _whole(head: Head, hidden_RD: torch.Tensor, rows: Sequence[SampleRow]) -> Callable[[], object]:
    return lambda: _drawn(head.logits(hidden_RD), rows, head)


def _late(head: Head, hidden_RD: torch.Tensor, rows: Sequence[SampleRow]) -> Callable[[], object]:
    target_BD, assistant_BD = hidden_RD[: len(rows)], hidden_RD[len(rows) :]
    return lambda: _drawn(head.logits(target_BD), rows, head, head.late(assistant_BD))


def _drawn(
    logits_RV: torch.Tensor, rows: Sequence[SampleRow], head: Head, late: LateRows | None = None
) -> SampleOutput:
    none = torch.tensor([], dtype=torch.int64, device=logits_RV.device)
    return fused_sample(logits_RV, rows, vocab_size=head.weight_WD.shape[0], protected_ids=none, late=late)


def _record(name: str, vocab: int, batch: int, seconds: Mapping[str, list[float]]) -> dict[str, Json]:
    record: dict[str, Json] = {"rows": name, "vocab": vocab, "batch": batch}
    times = {way: Quartiles.of_seconds(found) for way, found in seconds.items()}
    for way, quartiles in times.items():
        record[f"{way}_ms_median"] = round(quartiles.median, 4)
        record[f"{way}_ms_quartiles"] = [round(quartiles.lower, 4), round(quartiles.upper, 4)]
        record[f"{way}_ms_fastest"] = round(min(seconds[way]) * 1e3, 4)
    record["late/whole"] = round(times["late"].median / times["whole"].median, 4)
    record["late/whole fastest"] = round(min(seconds["late"]) / min(seconds["whole"]), 4)
    return record


def _cells(record: Mapping[str, Json]) -> list[str]:
    return [
        str(record[name])
        for name in (
            "rows",
            "vocab",
            "batch",
            "whole_ms_median",
            "late_ms_median",
            "late/whole",
            "late/whole fastest",
        )
    ]
