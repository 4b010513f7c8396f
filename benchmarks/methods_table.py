"""Puts what several profiles cost to train beside what `uld-serve profiles verify` measured of them.

    uld-serve profiles verify NAME ... --profiles DIR --json > verify.json
    python benchmarks/methods_table.py verify.json --profiles DIR --json methods.json

Prints a Markdown table; --json also writes one JSON line with everything that is in it. Figures are those of verify's
report and of each profile's training.json; none is computed anew but differences."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uld_serve.errors import DataError, UldError
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.registry import profile_directories
from uld_serve.profiles.store import read_profile, read_training_record

BYTES_A_PARAMETER = 2  # adapters are served in bfloat16
COLUMNS = (
    "method", "steps", "minutes", "MB", "forget", "retain", "agreement", "names it, greedy", "names it, T = 1",
    "perplexity ratio", "verify",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, nargs="+", help="what `profiles verify --json` printed")
    parser.add_argument("--profiles", type=Path, action="append", required=True, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    try:
        rows = rows_of(_reports(args.report), _profiles(args.profiles))
    except UldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"results": rows}) + "\n")
    return 0


def _reports(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Of the last line of each file, for one profile or for several. Raises DataError."""
    found: list[dict[str, Any]] = []
    for file in files:
        try:
            last = json.loads(file.read_text().splitlines()[-1])
            found += last.get("profiles", [last])
        except (OSError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"{file}: its last line is not what `profiles verify --json` prints") from error
    return found


def _profiles(roots: Sequence[Path]) -> dict[str, tuple[Path, ProfileVersion]]:
    """By digest."""
    read = [(folder, read_profile(folder)) for root in roots for folder in profile_directories(root)]
    return {version.digest: (folder, version) for folder, version in read}


def rows_of(
    reports: Sequence[Mapping[str, Any]], profiles: Mapping[str, tuple[Path, ProfileVersion]]
) -> list[dict[str, Any]]:
    """One a report. Raises DataError: a report of a profile, or of a version of it, that is not there."""
    rows = []
    for report in reports:
        if report["digest"] not in profiles:
            raise DataError(f"no profile given has the digest {report['digest']} of '{report['profile']}'")
        folder, version = profiles[report["digest"]]
        record = read_training_record(folder) or {}
        parameters = sum(adapter.num_parameters for adapter in version.adapters.values())
        rows.append({**_trained(record, version), "adapter_bytes": BYTES_A_PARAMETER * parameters, **report})
    return rows


def _trained(record: Mapping[str, Any], version: ProfileVersion) -> dict[str, Any]:
    settings = record.get("settings", {})
    return {
        "method": version.profile.method,
        "steps": settings.get("steps"),
        "seconds": record.get("seconds"),
        "cpu_seconds": record.get("cpu_seconds"),
        "settings": settings,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Forget and retain are rises of the NLL of the base's own answers, in nats a token."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    forget, retain, recall = row["forget"], row["retain"], row["recall"]
    missed = [gate["name"] for gate in row["gates"] if not gate["ok"]]
    return [
        f"`{row['method']}`",
        "" if row["steps"] is None else f"{row['steps']}",
        "" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}",
        f"{row['adapter_bytes'] / 1e6:.1f}",
        f"{forget['nll_fused'] - forget['nll_base']:+.2f}",
        f"{retain['nll_fused'] - retain['nll_base']:+.3f}",
        f"{retain['agreement']:.3f}",
        _from_to(recall["base"], recall["fused"]),
        _from_to(recall["base_t1"], recall["fused_t1"]),
        "" if row["fluency"]["ratio"] is None else f"{row['fluency']['ratio']:.2f}",
        "ok" if row["ok"] else f"misses {', '.join(missed)}",
    ]


def _from_to(before: float, after: float) -> str:
    return f"{100 * before:.0f} to {100 * after:.0f} %"


if __name__ == "__main__":
    sys.exit(main())
