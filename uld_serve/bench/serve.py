"""`uld-serve bench serve`: open-loop load against a server over HTTP with streaming; latencies and throughput.
Called by command. Starts a server itself unless it is given one."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch

from uld_serve.bench.environment import Environment
from uld_serve.bench.load import Load, Record, Run, drive
from uld_serve.bench.report import Json, Reporter
from uld_serve.errors import InvalidRequest
from uld_serve.server.process import running_server

SUMMARY = "time to first token, between tokens and to the end under Poisson arrivals, over HTTP"
KEY_VARIABLE = "ULD_SERVE_API_KEY"
BASE, ALL = "none", "all"
PERCENTILES = (50, 90, 99)
COLUMNS = ("profile", "requests", "errors", "first token", "between tokens", "end to end", "tokens/s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("which server")
    where.add_argument("--url", help=f"of a running server (key from {KEY_VARIABLE}); default: start one")
    where.add_argument("--model", metavar="ID_OR_PATH", help="of the server to start")
    where.add_argument("--profiles", type=Path, metavar="DIR", help="of the server to start")
    where.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), help="of the server to start")
    where.add_argument("--device", help="of the server to start")
    load = parser.add_argument_group("which load")
    load.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="NAME",
        help="forget with this profile; 'none' for the base; repeat to deal several to the requests in turn "
        "(default: none)",
    )
    load.add_argument("--rate", type=float, default=2.0, help="requests a second, on average")
    load.add_argument("--requests", type=int, default=50)
    load.add_argument(
        "--concurrency-cap",
        type=int,
        default=64,
        help="requests sent at once at most; later ones wait here, and their waiting counts",
    )
    load.add_argument("--prompt-tokens", type=int, default=256)
    load.add_argument("--max-tokens", type=int, default=64, help="every answer has exactly so many")
    load.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for one request")
    load.add_argument("--seed", type=int, default=0, help="of arrivals and prompts")
    parser.add_argument("--json", action="store_true", help="one JSON line last; all else to standard error")


def run(args: argparse.Namespace) -> int:
    """0 when every request was answered, 1 when any failed."""
    for name in ("rate", "requests", "concurrency_cap", "prompt_tokens", "max_tokens", "timeout"):
        if not getattr(args, name) > 0:
            raise InvalidRequest(f"--{name.replace('_', '-')} must be above 0")
    reporter, arguments = Reporter(as_json=args.json), _server_arguments(args)
    key = os.environ.get(KEY_VARIABLE) if args.url is not None else None
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    environment = Environment.look(torch.device("cpu"))
    reporter.begin(environment)
    with nullcontext(args.url.rstrip("/")) if args.url is not None else _server(arguments, reporter) as root:
        load = _load(args, _served_model(root, headers))
        with reporter.progress("requests", load.num_requests) as advance:
            measured = drive(f"{root}/v1", load, headers=headers, on_done=advance)
    results = summarise(measured, load.models)
    reporter.table(f"{load.rate:g} requests/s; milliseconds at p50 / p90 / p99", COLUMNS, _rows(results))
    errors = Counter(record.failure for record in measured.records if record.failure is not None)
    for kind, count in errors.items():
        reporter.console.print(f"{count} failed: {kind}")
    reporter.end(
        {
            "results": results,
            "errors": dict(errors),
            "duration_s": round(measured.seconds, 3),
            "settings": {
                "url": args.url,
                "rate": args.rate,
                "requests": args.requests,
                "concurrency_cap": args.concurrency_cap,
                "prompt_tokens": args.prompt_tokens,
                "max_tokens": args.max_tokens,
            },
            "environment": environment.record(),
        }
    )
    return 1 if errors else 0


@contextmanager
def _server(arguments: Sequence[str], reporter: Reporter) -> Iterator[str]:
    with ExitStack() as stack:
        with reporter.console.status("starting the server"):
            url = stack.enter_context(running_server(arguments))
        yield url


def _server_arguments(args: argparse.Namespace) -> list[str]:
    given = {name: getattr(args, name) for name in ("model", "profiles", "dtype", "device")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.url is not None and given:
        raise InvalidRequest(f"--{next(iter(given))} is for a server to start; --url names one that runs")
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def _served_model(root: str, headers: dict[str, str]) -> str:
    """The name of the server's base: the first model that it lists."""
    try:
        request = urllib.request.Request(f"{root}/v1/models", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(json.load(response)["data"][0]["id"])
    except (urllib.error.URLError, OSError, ValueError, LookupError) as error:
        raise InvalidRequest(f"{root}/v1/models lists no model: {error}") from error


def _load(args: argparse.Namespace, model: str) -> Load:
    return Load(
        models=tuple(model if name == BASE else f"{model}:{name}" for name in args.profile or [BASE]),
        rate=args.rate,
        num_requests=args.requests,
        concurrency_cap=args.concurrency_cap,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
        timeout_s=args.timeout,
        seed=args.seed,
    )


def summarise(run: Run, models: Sequence[str]) -> list[dict[str, Json]]:
    """One record for each model, and one for all of them where there are several. Times are in milliseconds."""
    results = [
        _summary(_label(model), [r for r in run.records if r.model == model], run.seconds)
        for model in dict.fromkeys(models)
    ]
    return results if len(results) == 1 else [*results, _summary(ALL, run.records, run.seconds)]


def _label(model: str) -> str:
    """A request's profile, of a model's name `base:profile`."""
    return model.partition(":")[2] or BASE


def _summary(name: str, records: Sequence[Record], seconds: float) -> dict[str, Json]:
    done = [record for record in records if record.streamed is not None]
    tokens = sum(record.streamed.completion_tokens for record in done if record.streamed is not None)
    return {
        "mode": name,
        "requests": len(records),
        "errors": len(records) - len(done),
        "ttft_ms": _percentiles([record.first_token_s for record in done]),
        "inter_token_ms": _percentiles([gap for record in done for gap in record.gaps_s]),
        "end_to_end_ms": _percentiles([record.total_s for record in done]),
        "tokens_per_s": round(tokens / seconds, 2),
        "requests_per_s": round(len(done) / seconds, 3),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p90 and p99 in milliseconds; None of nothing."""
    if not seconds:
        return None
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 99
    return {f"p{percent}": round(cuts[percent - 1] * 1e3, 2) for percent in PERCENTILES}


def _rows(results: Sequence[dict[str, Json]]) -> list[list[str]]:
    rows = []
    for result in results:
        times = [_cell(result[name]) for name in ("ttft_ms", "inter_token_ms", "end_to_end_ms")]
        named = [str(result[name]) for name in ("mode", "requests", "errors")]
        rows.append([*named, *times, str(result["tokens_per_s"])])
    return rows


def _cell(percentiles: Json) -> str:
    if not isinstance(percentiles, dict):
        return "-"
    return " / ".join(f"{value:.1f}" for value in percentiles.values() if isinstance(value, float))
