"""What a run keeps so that the same command goes on where it was interrupted: one file for each part, with a key of
what was asked of whom. Called by the evaluations' runs. Knows no figure.

Files are replaced whole, so that nobody ever reads half of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def key_of(*parts: object) -> str:
    """Of values that JSON can hold. Equal for equal values only."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def kept_or_made(
    path: Path,
    key: str,
    make: Callable[[], T],
    *,
    restore: Callable[[Mapping[str, object]], T],
    record: Callable[[T], Mapping[str, object]],
    when_kept: Callable[[], None],
) -> T:
    """What `path` keeps under this key, after a call of `when_kept`; or what `make` gives, which is then kept there."""
    kept = _read(path, key)
    if kept is not None:
        when_kept()
        return restore(kept)
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"key": key, "part": record(made)}) + "\n")
    return made


def write_whole(path: Path, text: str) -> None:
    """All or nothing: what was there before stays until all of the new text is written."""
    scratch = scratch_of(path)
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def scratch_of(path: Path) -> Path:
    """Where to write what shall then take the place of `path`."""
    return path.with_name(f".{path.name}.part")


def _read(path: Path, key: str) -> Mapping[str, object] | None:
    """None for a file of another key, or that no run has written."""
    if not path.is_file():
        return None
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(whole, dict) or whole.get("key") != key or not isinstance(whole.get("part"), dict):
        return None
    part: Mapping[str, object] = whole["part"]
    return part
