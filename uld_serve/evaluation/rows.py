"""Rows of a benchmark's data: of a file of one's own, or of a Hugging Face dataset. Called by the readers of the
benchmarks. Knows no benchmark."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from uld_serve.errors import DataError

Row = Mapping[str, object]
ENDINGS = (".jsonl", ".json")


def file_rows(path: Path) -> list[Row]:
    """Of JSON lines, or of .json that holds one list of objects. Raises DataError with the place."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if path.suffix == ".json":
        whole = _parsed(text, str(path))
        if not isinstance(whole, list):
            raise DataError(f"{path} must hold a list")
        return [_object(row, f"{path}, row {number}") for number, row in enumerate(whole, start=1)]
    # Not splitlines: JSON lines may hold U+2028 and the like as they are.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [
        _object(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}") for number, line in lines
    ]


def find_file(folder: Path, name: str) -> Path | None:
    """`name` with one of the endings that file_rows reads."""
    there = [folder / f"{name}{ending}" for ending in ENDINGS if (folder / f"{name}{ending}").is_file()]
    return there[0] if there else None


def dataset_rows(source: str, name: str, *, split: str) -> Iterable[Row]:
    """Of the configuration `name` of a Hugging Face dataset, by id or as a folder that holds one. Raises DataError."""
    try:
        # Imported where used: it takes a second, and files need none of it.
        load: Any = importlib.import_module("datasets").load_dataset
    except ImportError as error:
        raise DataError(
            f"{source} is no folder; datasets by id are read by the package datasets: pip install "
            "'uld-serve[datasets]'"
        ) from error
    try:
        found: Iterable[Row] = load(source, name, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{source}: {name} cannot be loaded as a dataset: {reason}") from error
    return found


def text_of(row: Row, field: str, where: str) -> str:
    """Raises DataError where the field is missing, no text or blank."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: '{field}' must be a text")
    return value


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}") from error


def _object(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where} must be a JSON object")
    return row
