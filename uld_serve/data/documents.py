"""Reads what should be forgotten and what must stay: JSONL in four forms, folders of .txt files, and datasets in
Hugging Face's forms. Called by training and by evaluation. Knows no tokenizer and no model; says what it read, what it
dropped and why.

    {"question", "answer"}    one user turn through the chat template
    {"messages": [...]}       a conversation through the chat template; a last assistant turn is the answer
    {"prompt", "completion"}  plain text, no template
    {"text"}                  plain text, learnt whole; a .txt file is one such document

"answer" and "completion" may be missing: the base then answers itself. "form" is a word for reports. Other wordings may
stand beside an answer, as one text or a list (the names are TOFU's):

    "paraphrased_question"  asks the same       "paraphrased_answer"  says the same
    "perturbed_answer"      is wrong
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from uld_serve.data import datasets
from uld_serve.errors import DataError

ROLES = ("system", "user", "assistant")
VARIANTS = {
    "paraphrased_question": "questions",
    "paraphrased_questions": "questions",
    "paraphrased_answer": "paraphrases",
    "paraphrased_answers": "paraphrases",
    "perturbed_answer": "perturbed",
    "perturbed_answers": "perturbed",
}
FORMS = {"question": "answer", "prompt": "completion", "messages": None, "text": None}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
HELP = 'expected {"question", "answer"}, {"prompt", "completion"}, {"messages"} or {"text"}'


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Variants:
    """Other wordings of a question and its answer, and wrong answers to it."""

    questions: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    perturbed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.questions or self.paraphrases or self.perturbed)


@dataclass(frozen=True, slots=True)
class Document:
    """A prompt and, where the data has one, its answer. Either `messages` or `text` is set."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    answer: str | None = None
    form: str = "document"
    where: str = ""
    variants: Variants = Variants()
    columns: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)
    """All that stood in the line, for readers that know more columns than these."""

    @property
    def key(self) -> str:
        """The prompt as compared: lower case, runs of anything but letters and digits made one space."""
        said = " ".join(m.content for m in self.messages if m.role != "system") or self.text
        key = compared(said)
        return key if self.messages or self.answer is None else f"{key}|{self.answer}"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its own, and those of the other wordings of its question."""
        return (self.key, *map(compared, self.variants.questions))


def compared(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


@dataclass(frozen=True, slots=True)
class Reading:
    """What one source gave. `dropped` counts by reason."""

    source: str
    documents: tuple[Document, ...]
    dropped: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, object]:
        return {"source": self.source, "read": len(self.documents), "dropped": dict(self.dropped)}


def read_documents(source: Path | tuple[Path, ...], *, kind: str) -> Reading:
    """Read one source, or several as if they were one: JSONL files, folders of .txt files, and datasets, which are a
    Hugging Face id or a folder of its files as ID, ID:CONFIG or ID:CONFIG:SPLIT. `kind` ("forget", "retain") names it
    in errors.

    Repeated prompts are dropped and counted. Raises DataError: nothing there, nothing left, or a malformed
    line, with its number.
    """
    paths = source if isinstance(source, tuple) else (source,)
    found = read_lines(source, kind=kind)
    seen: set[str] = set()
    kept, dropped = [], Counter[str]()
    for document in found:
        if not document.key:
            dropped["empty"] += 1
        elif document.key in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(document.key)
            kept.append(document)
    if not kept:
        raise DataError(
            f"--{kind}: {told(source)} holds no usable document ({dict(dropped) or 'it is empty'})"
        )
    names = " and ".join(path.name for path in paths)
    return Reading(source=names, documents=tuple(kept), dropped=dict(dropped))


def read_lines(source: Path | tuple[Path, ...], *, kind: str) -> list[Document]:
    """The same with nothing dropped. Raises DataError: nothing there, or a malformed line."""
    paths = source if isinstance(source, tuple) else (source,)
    return [document for path in paths for document in _documents(path, kind)]


def told(source: Path | tuple[Path, ...]) -> str:
    """Paths as an error names them."""
    return " and ".join(map(str, source)) if isinstance(source, tuple) else str(source)


def _documents(path: Path, kind: str) -> list[Document]:
    if path.is_file():
        return list(_read_jsonl(path))
    if path.is_dir() and (any(path.rglob("*.txt")) or not datasets.is_dataset(str(path))):
        return list(_read_folder(path))
    if datasets.is_dataset(str(path)):
        rows = datasets.rows(str(path), kind=kind)
        return [_document(row, f"{path}:{number}") for number, row in enumerate(rows, start=1)]
    raise DataError(
        f"--{kind}: {path} does not exist; give a JSONL file, a folder of .txt files or a Hugging Face id"
    )


def refuse_overlap(first: Sequence[Document], second: Sequence[Document], *, names: tuple[str, str]) -> None:
    """Raises DataError if a prompt is in both, other wordings included: what it should do would be undefined or
    unmeasurable."""
    where = {key: document for document in first for key in document.keys}
    shared = [(key, document) for document in second for key in document.keys if key in where]
    if shared:
        key, one = shared[0]
        raise DataError(
            f"{len(shared)} prompts are both in the {names[0]} and in the {names[1]} set, the first at "
            f"{where[key].where} and {one.where}; remove them from one"
        )


def _read_folder(path: Path) -> Iterator[Document]:
    for file in sorted(path.rglob("*.txt")):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text") from error
        yield Document(text=text.strip(), answer="" if text.strip() else None, form="text", where=file.name)


def _read_jsonl(path: Path) -> Iterator[Document]:
    try:
        # Not splitlines(): U+2028 and its like may stand inside a JSON string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text") from error
    yield from parse_lines(lines, name=f"{path.name}:")


def parse_lines(lines: Sequence[str], *, name: str) -> Iterator[Document]:
    """JSONL's documents; `name` and a line's number say where one stands. Raises DataError, in words that do not quote
    the line."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _document(_row(line, f"{name}{number}"), f"{name}{number}")


def _row(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not JSON that can be read: nested too deep, or a number too long"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object; {HELP}")
    if _SURROGATE.search(line) and not _is_encodable(row):
        raise DataError(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which no tokenizer takes"
        )
    return row


def _is_encodable(row: Mapping[str, object]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _document(row: Mapping[str, object], where: str) -> Document:
    document = _plain_document(row, where)
    variants = _variants(row, where)
    if variants and (len(document.messages) != 1 or not document.answer):
        raise DataError(f"{where}: other wordings need a question and its answer beside them")
    return replace(document, variants=variants, columns=row)


def _variants(row: Mapping[str, object], where: str) -> Variants:
    found: dict[str, list[str]] = {"questions": [], "paraphrases": [], "perturbed": []}
    for name, group in VARIANTS.items():
        value = row.get(name)
        texts = value if isinstance(value, list) else [] if value is None else [value]
        said = [text for text in texts if isinstance(text, str)]
        if len(said) != len(texts):
            raise DataError(f"{where}: {name!r} must be text or a list of texts")
        found[group] += [text for text in said if text.strip()]
    return Variants(**{group: tuple(dict.fromkeys(texts)) for group, texts in found.items()})


def _plain_document(row: Mapping[str, object], where: str) -> Document:
    forms = [name for name in FORMS if name in row]
    if len(forms) != 1:
        raise DataError(f"{where} has {' and '.join(forms) or 'no known field'}; {HELP}")
    form = _text(row, "form", where) or forms[0]
    if forms[0] == "messages":
        return _conversation(row["messages"], form, where)
    body = _text(row, forms[0], where) or ""
    if forms[0] == "text":
        return Document(text=body, answer="" if body.strip() else None, form=form, where=where)
    answer = _text(row, FORMS[forms[0]] or "", where)
    if forms[0] == "prompt":
        return Document(text=body, answer=answer, form=form, where=where)
    return Document(messages=(Message("user", body),), answer=answer, form=form, where=where)


def _text(row: Mapping[str, object], name: str, where: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {name!r} must be text, not {type(value).__name__}")
    return value


def _conversation(value: object, form: str, where: str) -> Document:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' must be a list of {{'role', 'content'}}")
    messages = []
    for turn in value:
        if (
            not isinstance(turn, dict)
            or turn.get("role") not in ROLES
            or not isinstance(turn.get("content"), str)
        ):
            raise DataError(f"{where}: a message needs a role of {', '.join(ROLES)} and text as content")
        messages.append(Message(turn["role"], turn["content"]))
    answer = messages.pop().content if messages[-1].role == "assistant" else None
    if not messages:
        raise DataError(f"{where}: a conversation needs a turn before the answer")
    return Document(messages=tuple(messages), answer=answer, form=form, where=where)
