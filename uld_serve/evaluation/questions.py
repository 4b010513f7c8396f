"""Questions with a right answer, the same in other words, and wrong ones: a section of TOFU, or data of one's own in
its form. Called by the eval command. Knows no model.

    {"question": ..., "answer": ..., "paraphrased_answer": ..., "perturbed_answer": [...]}

Without "paraphrased_answer" the answer stands for it, as in TOFU's real authors and world facts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from uld_serve.errors import DataError
from uld_serve.evaluation.rows import Row, dataset_rows, file_rows, text_of


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
    is_folder = Path(source).is_dir()
    rows = (
        file_rows(Path(source) / f"{name}.jsonl") if is_folder else dataset_rows(source, name, split="train")
    )
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


def _question(row: Row, where: str) -> Question:
    answer = text_of(row, "answer", where)
    wrong = row.get("perturbed_answer")
    if not isinstance(wrong, list) or not wrong or not all(isinstance(one, str) and one for one in wrong):
        raise DataError(f"{where}: 'perturbed_answer' must be a list of texts")
    paraphrased = (
        answer if row.get("paraphrased_answer") is None else text_of(row, "paraphrased_answer", where)
    )
    return Question(text_of(row, "question", where), answer, paraphrased, tuple(wrong))
