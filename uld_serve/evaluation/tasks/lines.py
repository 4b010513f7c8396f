"""Reads a task's lines from beside it. Called by lm-evaluation-harness, which the YAML files send here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any


def load(*, file: str, **_: object) -> dict[str, object]:
    """{"test": a dataset}. lm-eval adds a task's metadata to what is given."""
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line]
    # It comes with lm-eval.
    dataset: Any = importlib.import_module("datasets").Dataset
    return {"test": dataset.from_list(rows)}
