"""What an evaluation leaves behind: summary.json and report.md. Called by the commands of the benchmarks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from rich.console import Console

from uld_serve.evaluation.groups import grouped
from uld_serve.evaluation.identity import engine
from uld_serve.evaluation.kept import write_whole
from uld_serve.evaluation.lineup import Chosen


def record_of(
    args: argparse.Namespace,
    chosen: Chosen,
    figures: Mapping[str, Mapping[str, object]],
    *,
    asked: Mapping[str, object],
) -> dict[str, object]:
    """All of summary.json: `asked` is what the benchmark adds of its questions, `figures` are by subject."""
    return {
        "benchmark": args.benchmark,
        "data": args.data,
        "limit": args.limit,
        "max_tokens": getattr(args, "max_tokens", None),
        # Nothing is drawn: no figure hangs on a seed.
        "temperature": 0.0,
        "seed": None,
        "model": args.model,
        "reference": getattr(args, "reference", None),
        "engine": engine(),
        "digests": {version.name: version.digest for _, version in chosen.versions},
        **asked,
        "subjects": figures,
        "groups": {name: group.record() for name, group in grouped(chosen.groups, figures).items()},
    }


def publish(args: argparse.Namespace, record: Mapping[str, object], text: str, console: Console) -> None:
    """Writes both files whole, and prints."""
    write_whole(args.out / "summary.json", json.dumps(record, indent=1) + "\n")
    write_whole(args.out / "report.md", text)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"written: {args.out / 'report.md'}", highlight=False)
    if args.json:
        print(json.dumps(record))
