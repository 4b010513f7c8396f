"""What the reliability table has reached: folds the lines that `make test-full`, `make test-aims` and `make soak` left
into one result, a test's last run of each scale, and prints it as the table of docs/reliability.md.

    python benchmarks/reliability.py reliability.jsonl > benchmarks/results/DATE-cpu-reliability.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def latest(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    """Of each test and scale the last; of a test with parameters all of them."""
    found = {(line["row"], line.get("test"), line.get("scale")): line for line in lines}
    return list(found.values())


def rows(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    """One entry a row and scale: counts added up over its tests, and whether all of them passed."""
    made: dict[tuple[object, object], dict[str, object]] = {}
    for line in lines:
        row = made.setdefault(
            (line["row"], line.get("scale")),
            {**{key: value for key, value in line.items() if key != "test"}, "count": 0, "seconds": 0.0},
        )
        row["count"] = int(str(row["count"])) + int(str(line.get("count", 0)))
        row["seconds"] = round(float(str(row["seconds"])) + float(str(line["seconds"])), 1)
        row["outcome"] = row["outcome"] if line["outcome"] == "passed" else line["outcome"]
    return list(made.values())


def main() -> None:
    lines = [json.loads(line) for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
    found = rows(latest(lines))
    for row in found:
        print(f"| {row['row']} | {row.get('scale')} | {row['count']} | {row['outcome']} |", file=sys.stderr)
    print(json.dumps({"rows": found}, indent=1))


if __name__ == "__main__":
    main()
