"""What models have answered, kept on disk by what was asked, so that a run that was interrupted goes on. Called by the
probes. Knows no model and no probe."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from uld_serve.evaluation.kept import key_of, write_whole

Make = Callable[[Sequence[int]], Sequence[object]]
"""Positions of what is asked -> an answer each."""


class Ledger:
    """A JSON file of answers. Values are what JSON can hold."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = _read(path)

    def answers(
        self, asked: Sequence[object], make: Make, *, at_once: int, advance: Callable[[int], None]
    ) -> list[object]:
        """One answer each, asking only what was not asked before, `at_once` at a time, each time kept before the next.
        What is asked must tell apart all that decides the answer. The same asked twice is asked once."""
        keys = [key_of(one) for one in asked]
        missing = list({key: number for number, key in enumerate(keys) if key not in self._kept}.values())
        advance(len(asked) - len(missing))
        for start in range(0, len(missing), at_once):
            some = missing[start : start + at_once]
            made = make(some)
            self._kept |= {keys[number]: answer for number, answer in zip(some, made, strict=True)}
            write_json(self._path, self._kept)
            advance(len(some))
        return [self._kept[key] for key in keys]


def write_json(path: Path, record: object) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _read(path: Path) -> dict[str, object]:
    """Nothing where there is no such file, or one that is not whole."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
