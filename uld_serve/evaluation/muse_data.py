"""MUSE's texts and questions (Shi et al. 2024, arXiv 2407.06460). Called by muse_command. Knows no model.

A folder, or a Hugging Face dataset such as muse-bench/MUSE-News with the folders as configurations and the files as
splits. Files are .jsonl, or .json with a list:

    verbmem/forget                               {"prompt", "gt"}
    knowmem/forget_qa, knowmem/retain_qa         {"question", "answer"}
    knowmem/forget_qa_icl, knowmem/retain_qa_icl the same: examples put in front of the questions
    privleak/forget, privleak/holdout            {"text"}"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

from uld_serve.errors import DataError
from uld_serve.evaluation.rows import Row, dataset_rows, file_rows, find_file, text_of

VERBMEM, KNOWMEM, PRIVLEAK = "verbmem", "knowmem", "privleak"
SPLITS = {
    VERBMEM: ("forget",),
    KNOWMEM: ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"),
    PRIVLEAK: ("forget", "holdout"),
}
SIDES = ("forget", "retain")


@dataclass(frozen=True, slots=True)
class Pair:
    """A text's beginning and how it goes on, or a question and its answer."""

    prompt: str
    truth: str


@dataclass(frozen=True, slots=True)
class Muse:
    """What is not in the data is not there."""

    verbmem: Sequence[Pair] = ()
    knowmem: dict[str, list[Pair]] = field(default_factory=dict)
    """By side."""
    examples: dict[str, list[Pair]] = field(default_factory=dict)
    privleak: dict[str, list[str]] = field(default_factory=dict)
    """By split."""

    @property
    def size(self) -> int:
        """Prompts, questions and texts."""
        questions, texts = sum(map(len, self.knowmem.values())), sum(map(len, self.privleak.values()))
        return len(self.verbmem) + questions + texts

    def record(self) -> dict[str, object]:
        """All that is asked, for JSON and keys."""
        return {
            VERBMEM: [astuple(pair) for pair in self.verbmem],
            KNOWMEM: {side: [astuple(pair) for pair in pairs] for side, pairs in self.knowmem.items()},
            "examples": {side: [astuple(pair) for pair in pairs] for side, pairs in self.examples.items()},
            PRIVLEAK: self.privleak,
        }


def read_muse(source: str, *, limit: int | None = None) -> Muse:
    """`limit` is for each split, but not for examples.

    Raises DataError: nothing there, a row of another form, texts to attack without texts to compare them with.
    """
    found = {
        f"{folder}/{split}": _rows(source, folder, split) for folder in SPLITS for split in SPLITS[folder]
    }
    kept = {name: rows if name.endswith("_icl") else rows[:limit] for name, rows in found.items() if rows}
    muse = Muse(
        verbmem=_pairs(kept, "verbmem/forget", ("prompt", "gt"), source),
        knowmem=_by_side(kept, "knowmem/{}_qa", source),
        examples=_by_side(kept, "knowmem/{}_qa_icl", source),
        privleak={
            split: [
                text_of(row, "text", f"{source}: privleak/{split}, row {number}")
                for number, row in enumerate(kept[f"privleak/{split}"], start=1)
            ]
            for split in SPLITS[PRIVLEAK]
            if f"privleak/{split}" in kept
        },
    )
    if len(muse.privleak) == 1:
        raise DataError(f"{source}: privleak needs both splits, {' and '.join(SPLITS[PRIVLEAK])}")
    if muse.size == 0:
        raise DataError(f"{source} has none of {', '.join(name for name in found if '_icl' not in name)}")
    return muse


def _by_side(found: dict[str, list[Row]], name: str, source: str) -> dict[str, list[Pair]]:
    pairs = {side: _pairs(found, name.format(side), ("question", "answer"), source) for side in SIDES}
    return {side: some for side, some in pairs.items() if some}


def _pairs(found: dict[str, list[Row]], name: str, fields: tuple[str, str], source: str) -> list[Pair]:
    prompt, truth = fields
    return [
        Pair(text_of(row, prompt, where), text_of(row, truth, where))
        for number, row in enumerate(found.get(name, ()), start=1)
        if (where := f"{source}: {name}, row {number}")
    ]


def _rows(source: str, folder: str, split: str) -> list[Row]:
    """None but those of a folder's file, where it has one."""
    if not _has_files(Path(source)):
        return list(dataset_rows(source, folder, split=split))
    path = find_file(Path(source) / folder, split)
    return [] if path is None else file_rows(path)


def _has_files(root: Path) -> bool:
    """Otherwise it is an id, or a copy of a dataset."""
    return any(find_file(root / folder, split) for folder, splits in SPLITS.items() for split in splits)
