"""What is to be forgotten, one fact a line of the user's own forget set, and questions of one's own to get at it.
Called by the probes command. Knows no model.

Beside the columns that the trainer reads, a line may have

    "key"                  what gives the fact away, as one text or a list of spellings
    "subject", "alias"     whom the question is about, and what else they are called (one text or a list)
    "translated_question"  {"es": "...", "de": "..."}
    "multi_hop"            {"question", "answer", "key"} that needs the fact on the way, or a list of them

A line of a probes file is {"probe", "question", "answer"} or any form of the trainer's, and may have "key"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uld_serve.data.documents import Document, Message, read_documents, read_lines
from uld_serve.errors import DataError
from uld_serve.evaluation.attacks.judge import names

# A text without a question is continued: so much of it is shown, and so much expected.
SHOWN_WORDS, EXPECTED_WORDS = 48, 48


@dataclass(frozen=True, slots=True)
class Hop:
    """A question that needs a fact on the way. Without keys it is judged by its answer's words."""

    question: str
    answer: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A question as a conversation, or a text to be continued: either `messages` or `text` is set. `answer` is None
    until the base has given one. `keys`: any one of them gives the fact away; none: the answer's words do."""

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    answer: str | None = None
    keys: tuple[str, ...] = ()
    subject: str | None = None
    aliases: tuple[str, ...] = ()
    wordings: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    translations: Mapping[str, str] = field(default_factory=dict)
    hops: tuple[Hop, ...] = ()

    @property
    def question(self) -> str:
        """The user's last turn; nothing for a text."""
        return self.messages[-1].content if self.messages else ""


@dataclass(frozen=True, slots=True)
class OwnProbe:
    """A line of the probes file."""

    probe: str
    fact: Fact


def read_facts(
    paths: Sequence[Path], keywords: Sequence[str], *, limit: int | None = None
) -> tuple[list[Fact], dict[str, int]]:
    """The first `limit` facts, and how many lines were dropped, by reason. Raises DataError: as the trainer's reader
    does, or for a column of another form."""
    reading = read_documents(tuple(paths), kind="forget")
    facts = [fact_of(document, keywords) for document in reading.documents[:limit]]
    return facts, dict(reading.dropped)


def read_own_probes(paths: Sequence[Path], known: Sequence[str], keywords: Sequence[str]) -> list[OwnProbe]:
    """Raises DataError: no probe, one that is not `known`, no answer."""
    found = []
    for document in read_lines(tuple(paths), kind="probes-file"):
        probe = document.columns.get("probe")
        if probe not in known:
            raise DataError(f"{document.where}: 'probe' must be one of {', '.join(known)}, not {probe!r}")
        fact = fact_of(document, keywords)
        if not fact.answer:
            raise DataError(f"{document.where}: a probe of one's own needs its answer")
        found.append(OwnProbe(str(probe), fact))
    return found


def read_keywords(paths: Sequence[Path]) -> tuple[str, ...]:
    """One a line. Raises DataError."""
    found: list[str] = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--keywords: {path} cannot be read as text") from error
        found += [line.strip() for line in lines if line.strip()]
    if paths and not found:
        raise DataError("--keywords has no word")
    return tuple(dict.fromkeys(found))


def fact_of(document: Document, keywords: Sequence[str]) -> Fact:
    """Raises DataError for a column of another form."""
    columns, where = document.columns, document.where
    # A .txt file has no columns.
    if not document.messages and ("text" in columns or not columns):
        return _continued(document, keywords)
    if document.messages and document.messages[-1].role != "user":
        raise DataError(f"{where}: a conversation must end with the user's turn, or with an answer after it")
    answer = document.answer or None
    subject = _texts(columns, "subject", where)
    return Fact(
        where=where,
        messages=document.messages,
        text=document.text,
        answer=answer,
        keys=_texts(columns, "key", where) or chosen(keywords, answer),
        subject=subject[0] if subject else None,
        aliases=_texts(columns, "alias", where),
        wordings=document.variants.questions,
        wrong=document.variants.perturbed,
        translations=_translations(columns.get("translated_question"), where),
        hops=_hops(columns.get("multi_hop"), where),
    )


def chosen(keywords: Sequence[str], answer: str | None) -> tuple[str, ...]:
    """The keywords that stand in the answer; all of them where there is none yet."""
    return tuple(word for word in keywords if answer is None or names(answer, [word]))


def _continued(document: Document, keywords: Sequence[str]) -> Fact:
    """A text is continued from its middle on, or from as far as is shown."""
    words = document.text.split()
    if len(words) < 2:
        raise DataError(f"{document.where}: a text of one word cannot be continued")
    shown = min(SHOWN_WORDS, len(words) // 2)
    # With the space that parts it from what is shown: its first token has it.
    answer = f" {' '.join(words[shown : shown + EXPECTED_WORDS])}"
    keys = _texts(document.columns, "key", document.where) or chosen(keywords, answer)
    return Fact(where=document.where, text=" ".join(words[:shown]), answer=answer, keys=keys)


def _texts(columns: Mapping[str, object], name: str, where: str) -> tuple[str, ...]:
    value = columns.get(name)
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{where}: {name!r} must be a text or a list of texts")
    return tuple(dict.fromkeys(str(text).strip() for text in texts))


def _translations(value: object, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) and text for text in value.values()):
        raise DataError(f"{where}: 'translated_question' must be an object of texts by language")
    return {str(language): str(text) for language, text in value.items()}


def _hops(value: object, where: str) -> tuple[Hop, ...]:
    rows = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_hop(row, where) for row in rows)


def _hop(row: object, where: str) -> Hop:
    if not isinstance(row, dict):
        raise DataError(f"{where}: 'multi_hop' must be objects with a question and an answer")
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or not question.strip() or not answer:
        raise DataError(f"{where}: 'multi_hop' needs 'question' and 'answer' as texts")
    return Hop(question, answer, _texts(row, "key", where))
