"""Rows of a dataset in Hugging Face's forms, by the package `datasets`: an id of the hub, or a folder of parquet, JSON
or CSV files. Called by documents. Knows no form of a row.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from uld_serve.errors import DataError

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OUR_FILES = (".jsonl", ".json", ".txt")
"""A name that ends so is a file that is not there, not an owner's dataset."""

_FILES = ("*.parquet", "*.jsonl", "*.json", "*.csv", "*.arrow")


def is_dataset(name: str) -> bool:
    """Whether ID, ID:CONFIG or ID:CONFIG:SPLIT could be one: a folder with data files, or owner/name."""
    source = name.split(":")[0]
    if Path(source).is_dir():
        return any(True for pattern in _FILES for _ in Path(source).rglob(pattern))
    looks_so = _ID.fullmatch(source) is not None and Path(source).suffix not in _OUR_FILES
    return looks_so and not Path(source).exists() and name.count(":") <= 2


def rows(name: str, *, kind: str) -> Iterator[Mapping[str, object]]:
    """Raises DataError: the package is missing, there is no such dataset, configuration or split."""
    source, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    load: Any = _load_dataset(name, kind=kind)
    try:
        found = load(source, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"--{kind}: {name} cannot be loaded as a dataset: {reason}") from error
    yield from found


def _load_dataset(name: str, *, kind: str) -> object:
    try:
        # Imported where used: it takes a second, and files need none of it.
        return importlib.import_module("datasets").load_dataset
    except ImportError as error:
        raise DataError(
            f"--{kind}: {name} is read by the package datasets; install uld-serve[datasets]"
        ) from error
