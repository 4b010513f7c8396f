"""Puts what a profile costs beside what `uld-serve eval tofu` measured of it.

    uld-serve eval tofu ... --profiles DIR --profile NAME ... --out OUT
    uld-serve bench decode --modes plain unlearned --profiles DIR --profile NAME ... --json >> decode.jsonl
    python benchmarks/tofu_table.py OUT/summary.json --profiles DIR --decode decode.jsonl --json table.json

Prints a Markdown table; --json writes one JSON line with everything that is in it. No figure is computed anew but the
overhead: the time of a decode step with the profile over one without, from one run of both in turn."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uld_serve.errors import DataError, UldError
from uld_serve.evaluation.table import Column, table
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.registry import profile_directories
from uld_serve.profiles.store import read_profile, read_training_record

BYTES_A_PARAMETER = 2  # adapters are served in bfloat16
FORGET = ("sections", "forget")
COLUMNS = (
    Column("forget quality p", ("forget_quality", "p"), ".3g"),
    Column("D", ("forget_quality", "d"), ".3f"),
    Column("utility", ("model_utility",)),
    Column("of the target's", ("utility_share",), ".1%"),
    Column("forget probability", (*FORGET, "probability"), ".3f"),
    Column("forget ROUGE-L", (*FORGET, "rougeL_recall"), ".3f"),
    Column("extraction strength", ("extraction_strength",), ".3f"),
    Column("decode step", ("decode_step",), ".2f"),
    Column("MB", ("megabytes",), ".1f"),
    Column("CPU s", ("cpu_seconds",), ".0f"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("summary", type=Path, help="what `eval tofu` wrote")
    parser.add_argument("--profiles", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--decode", type=Path, metavar="FILE", help="lines of `bench decode --json`")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    try:
        rows = rows_of(_read(args.summary), _profiles(args.profiles), _steps(args.decode))
    except UldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(COLUMNS, rows)))
    if args.json:
        args.json.write_text(json.dumps({"results": rows}) + "\n")
    return 0


def _read(file: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(file.read_text())
        read["subjects"].items(), read["digests"].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file} is not a summary that `eval tofu` writes") from error
    return read


def _profiles(roots: Sequence[Path]) -> dict[str, tuple[Path, ProfileVersion]]:
    """By digest."""
    read = [(folder, read_profile(folder)) for root in roots for folder in profile_directories(root)]
    return {version.digest: (folder, version) for folder, version in read}


def _steps(file: Path | None) -> dict[str, float]:
    """By the profile's reference: a decode step over a plain one, at the largest batch of each line."""
    if file is None:
        return {}
    found = {}
    try:
        for line in file.read_text().splitlines():
            run = json.loads(line)
            ratios = run["ratios"][max(run["ratios"], key=int)]
            found[run["settings"]["profile"]] = float(ratios["unlearned/plain"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} has a line that `bench decode --json` did not print") from error
    return found


def rows_of(
    summary: Mapping[str, Any],
    profiles: Mapping[str, tuple[Path, ProfileVersion]],
    steps: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """By subject. Raises DataError: a profile that was asked, or a version of it, is not there."""
    rows = {}
    for name, figures in summary["subjects"].items():
        digest = summary["digests"].get(name)
        rows[name] = figures if digest is None else {**figures, **_cost(name, digest, profiles, steps)}
    return rows


def _cost(
    name: str,
    digest: str,
    profiles: Mapping[str, tuple[Path, ProfileVersion]],
    steps: Mapping[str, float],
) -> dict[str, Any]:
    if digest not in profiles:
        raise DataError(
            f"no profile given has the digest {digest} of '{name}'; name its folder with --profiles"
        )
    folder, version = profiles[digest]
    record = read_training_record(folder) or {}
    parameters = sum(adapter.num_parameters for adapter in version.adapters.values())
    return {
        "method": version.profile.method,
        "rule": version.profile.rule.model_dump(),
        "decode_step": steps.get(version.ref),
        "megabytes": BYTES_A_PARAMETER * parameters / 1e6,
        "seconds": record.get("seconds"),
        "cpu_seconds": record.get("cpu_seconds"),
        "settings": record.get("settings", {}),
    }


if __name__ == "__main__":
    sys.exit(main())
