"""Where a run's data is, and what is known of it: paths, documents with their answers, the base's answers kept on disk.
Made by command; read by preparation and whatever resumes a run. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from uld_serve.data.documents import Document

Stage = Callable[[str, int], Callable[[int], None]]
"""stage(what, total) -> advance(count): how progress is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where the data is. `uses_columns`: other wordings that stand in the forget data are learnt too; `augment_file`
    has more of them, by question. `probe_forget` and `probe_retain` hold held-out prompts; `split` takes every sixth
    prompt of the training files instead. Without both, the profile carries no probes."""

    forget: Path | tuple[Path, ...]
    retain: Path | tuple[Path, ...]
    keywords: tuple[str, ...] = ()
    uses_columns: bool = True
    augment_file: Path | tuple[Path, ...] | None = None
    probe_forget: Path | tuple[Path, ...] | None = None
    probe_retain: Path | tuple[Path, ...] | None = None
    split: bool = False

    @property
    def has_probes(self) -> bool:
        return self.split or self.probe_forget is not None

    @property
    def files(self) -> list[Path]:
        """What was read: a resumed run must find the same."""
        given = (self.forget, self.retain, self.augment_file, self.probe_forget, self.probe_retain)
        parts = [one if isinstance(one, tuple) else (one,) for one in given]
        return [path for part in parts for path in part if path is not None]


@dataclass(frozen=True, slots=True)
class Answered:
    document: Document
    prompt_ids: list[int]
    answer_ids: list[int]


def usable(group: Sequence[Answered]) -> list[Answered]:
    """Those with a token before the answer and one to learn."""
    return [one for one in group if one.prompt_ids and one.answer_ids]


class AnswerBook:
    """The base's answers on disk, so that a resumed run learns from the very same ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._book: dict[str, list[list[int]]] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: object, make: Callable[[], list[list[int]]]) -> list[list[int]]:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        if name not in self._book:
            self._book[name] = make()
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._book))
            partial.replace(self._path)
        return self._book[name]
