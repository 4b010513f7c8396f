"""Questions with a right answer, the same in other words, and wrong ones: a section of TOFU, or data of one's own in
its form. Called by the eval command. Knows no model.

    {"question": ..., "answer": ..., "paraphrased_answer": ..., "perturbed_answer": [...]}

Without "paraphrased_answer" the answer stands for it, as in TOFU's real authors and world facts."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from uld_serve.errors import DataError


@dataclass(frozen=True, slots=True)
class Question:
    question: str
    answer: str
    paraphrased: str
    perturbed: tuple[str, ...]


def section_files(split: str) -> dict[str, str]:
    """TOFU's names of the four sections' data, by section."""
    return {
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
        "forget": f"{split}_perturbed",
    }


def read_questions(source: str, name: str, *, limit: int | None = None) -> list[Question]:
    """From `source`/`name`.jsonl, or the configuration `name` of the Hugging Face dataset `source`. The first `limit`.

    Raises DataError: nothing there, a row of another form, rows with different numbers of wrong answers.
    """
    rows = _lines(Path(source) / f"{name}.jsonl") if Path(source).is_dir() else _dataset(source, name)
    questions = []
    for number, row in enumerate(rows, start=1):
        if limit is not None and number > limit:
            break
        questions.append(_question(row, f"{source}: {name}, row {number}"))
    if not questions:
        raise DataError(f"{source}: {name} has no row")
    if len({len(question.perturbed) for question in questions}) > 1:
        raise DataError(f"{source}: {name}: every question needs as many wrong answers")
    return questions


def digest(questions: Sequence[Question]) -> str:
    """Tells whether two lists ask the same."""
    text = json.dumps([astuple(question) for question in questions])
    return hashlib.sha256(text.encode()).hexdigest()


def _question(row: Mapping[str, object], where: str) -> Question:
    answer = _text(row, "answer", where)
    wrong = row.get("perturbed_answer")
    if not isinstance(wrong, list) or not wrong or not all(isinstance(one, str) and one for one in wrong):
        raise DataError(f"{where}: 'perturbed_answer' must be a list of texts")
    paraphrased = answer if row.get("paraphrased_answer") is None else _text(row, "paraphrased_answer", where)
    return Question(_text(row, "question", where), answer, paraphrased, tuple(wrong))


def _text(row: Mapping[str, object], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: '{field}' must be a text")
    return value


def _lines(path: Path) -> Iterable[Mapping[str, object]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} must be a JSON object")
        yield row


def _dataset(source: str, name: str) -> Iterable[Mapping[str, object]]:
    try:
        # Imported where used: it takes a second, and files need none of it.
        load: Any = importlib.import_module("datasets").load_dataset
    except ImportError as error:
        raise DataError(
            f"{source} is no folder; datasets by id are read by the package datasets: pip install "
            "'uld-serve[datasets]'"
        ) from error
    try:
        found: Iterable[Mapping[str, object]] = load(source, name, split="train")
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{source}: {name} cannot be loaded as a dataset: {reason}") from error
    return found
