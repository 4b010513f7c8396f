"""Writes down what the tests of the reliability table reached, one JSON line a test, where `ULD_TEST_RESULTS` names a
file. Called by conftest."""

from __future__ import annotations

import json
import os
import subprocess
import time
from functools import cache
from pathlib import Path

import pytest
from scale import SCALE


def note(item: pytest.Item, report: pytest.TestReport) -> None:
    """`@pytest.mark.row("…")` names the row, and its count or `record_property` does."""
    marker, path = item.get_closest_marker("row"), os.environ.get("ULD_TEST_RESULTS")
    if marker is None or path is None or report.when != "call" or report.skipped:
        return
    line = {
        "row": marker.args[0],
        "test": item.nodeid,
        "scale": SCALE,
        "outcome": report.outcome,
        "seconds": round(report.duration, 1),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        **marker.kwargs,
        **dict(report.user_properties),
    }
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")


@cache
def _commit() -> str:
    """With a + where the tree differs from it."""
    shown = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--match="]
    found = subprocess.run(shown, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return found.stdout.strip() or "unknown"
