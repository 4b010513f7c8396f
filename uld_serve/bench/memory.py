"""`uld-serve bench memory`: what resident profiles cost, one after the other, and what a request without one costs.
Called by command. Runs no step, so it says nothing of speed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from uld_serve.bench.environment import Environment
from uld_serve.bench.naive import shared_copy
from uld_serve.bench.random_profiles import AdapterShape, random_profile
from uld_serve.bench.report import Reporter
from uld_serve.bench.target import add_random_options, add_target_options, random_shape, room_for, target_of
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.errors import InvalidRequest
from uld_serve.model.loading import Base

SUMMARY = "bytes that resident profiles take: with 1, 10 and 100 of them"
COLUMNS = ("profiles", "adapters MB", "MB a profile", "process MB")
STATM = Path("/proc/self/statm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target_options(parser)
    add_random_options(parser.add_argument_group("with which profiles"), "each")
    how = parser.add_argument_group("how")
    how.add_argument("--count", type=int, nargs="+", default=[1, 10, 100], help="resident profiles")
    how.add_argument("--json", action="store_true", help="one JSON line last; all else to standard error")


def run(args: argparse.Namespace) -> int:
    if min(args.count) < 1:
        raise InvalidRequest("--count must be at least 1")
    base, reporter = target_of(args), Reporter(as_json=args.json)
    shape = random_shape(args, base)
    environment = Environment.look(base.device)
    reporter.begin(environment)
    engine = Engine.of(shared_copy(base), room_for(base, 1, 64))
    with reporter.progress("profiles", max(args.count)) as advance:
        results = []
        for found in _loaded(engine, base, shape, max(args.count)):
            advance()
            if found["profiles"] in (0, *args.count):
                results.append(found)
    reporter.table(f"resident random profiles on {base.id}", COLUMNS, [_row(one) for one in results])
    reporter.end(
        {
            "results": results,
            "settings": {"model": base.id, **asdict(shape), "modules": list(shape.modules)},
            "environment": environment.record(),
        }
    )
    return 0


def _loaded(engine: Engine, base: Base, shape: AdapterShape, count: int) -> Iterator[dict[str, int]]:
    """Bytes with no profile, with one, … up to `count`. None is kept outside the engine, as the process's own bytes
    would then count each twice."""
    yield _bytes(engine, 0)
    for number in range(count):
        version = random_profile(base, shape, number)
        engine.prepare([version])
        engine.planner.release(engine.planner.plan(Decision.of_version(version)))
        if engine.runner.decoder.bank.num_resident != number + 1:
            raise InvalidRequest(
                f"adapter_bytes holds {engine.runner.decoder.bank.num_resident} of these profiles"
            )
        yield _bytes(engine, number + 1)


def _bytes(engine: Engine, profiles: int) -> dict[str, int]:
    resident = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if STATM.exists() else 0
    return {
        "profiles": profiles,
        "adapter_bytes": engine.runner.decoder.bank.resident_bytes,
        "process_bytes": resident,
    }


def _row(found: dict[str, int]) -> list[str]:
    profiles, adapters = found["profiles"], found["adapter_bytes"] / 1e6
    each = f"{adapters / profiles:.3f}" if profiles else ""
    process = f"{found['process_bytes'] / 1e6:.1f}" if found["process_bytes"] else "-"
    return [str(profiles), f"{adapters:.2f}", each, process]
