"""From files to examples: reads, refuses overlaps, lets the base answer, drops what would teach the wrong thing.
Called by run. Knows no adapter and no objective.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uld_serve.errors import DataError
from uld_serve.model.loading import Base
from uld_serve.training import answers
from uld_serve.training.documents import Document, Reading, read_documents, refuse_overlap
from uld_serve.training.examples import Example, Goals, Kind, common_tokens
from uld_serve.training.settings import Settings

SPLIT_SHARE = 6
"""One prompt in so many is held out by `split`."""

MIN_SPLIT = 2
DETOUR_TEMPERATURE = 0.8

Stage = Callable[[str, int], Callable[[int], None]]
"""stage(what, total) -> advance(count): how progress is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where the data is. `probe_forget` and `probe_retain` hold held-out prompts; `split` takes every sixth
    prompt of the training files instead. Without both, the profile carries no probes."""

    forget: Path
    retain: Path
    keywords: tuple[str, ...] = ()
    probe_forget: Path | None = None
    probe_retain: Path | None = None
    split: bool = False

    @property
    def has_probes(self) -> bool:
        return self.split or self.probe_forget is not None

    @property
    def files(self) -> list[Path]:
        """What was read: a resumed run must find the same."""
        given = (self.forget, self.retain, self.probe_forget, self.probe_retain)
        return [path for path in given if path is not None]


@dataclass(frozen=True, slots=True)
class Answered:
    document: Document
    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    pools: dict[Kind, list[Example]]
    named_ids: frozenset[int]
    probe_forget: list[Answered]
    probe_retain: list[Answered]
    record: dict[str, object] = field(default_factory=dict)


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


def prepare(base: Base, sources: Sources, settings: Settings, *, book: AnswerBook, stage: Stage) -> Prepared:
    """Raises DataError: unusable files, prompts in two sets, nothing left to learn from."""
    readings = _read(sources)
    documents = {name: list(reading.documents) for name, reading in readings.items()}
    if sources.split:
        for name in ("forget", "retain"):
            documents[name], documents[f"held-out {name}"] = _split(documents[name], name)
    names = list(documents)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            refuse_overlap(documents[first], documents[second], names=(first, second))
    answered = {
        name: _answer(base, group, settings, book, stage(f"the base answers: {name}", len(group)))
        for name, group in documents.items()
    }
    kept = [one for one in answered["retain"] if not _tells(base, one, sources.keywords)]
    num_telling = len(answered["retain"]) - len(kept)
    goals = _goals(base, sources.keywords, settings, kept)
    num_empty = sum(len(group) - len(_usable(group)) for group in (answered["forget"], kept))
    forget, kept = _usable(answered["forget"]), _usable(kept)
    detours = _detours(base, forget, sources.keywords, settings, book, stage)
    pools = {
        Kind.FORGET: [goals.example(one.prompt_ids, one.answer_ids, Kind.FORGET) for one in forget],
        Kind.RETAIN: [goals.example(one.prompt_ids, one.answer_ids, Kind.RETAIN) for one in kept],
        Kind.DETOUR: [goals.example(one.prompt_ids, one.answer_ids, Kind.DETOUR) for one in detours],
    }
    record: dict[str, object] = {
        "read": {name: reading.summary() for name, reading in readings.items()},
        "examples": {kind.name.lower(): len(pool) for kind, pool in pools.items()},
        "answer_tokens": {
            kind.name.lower(): sum(len(one.answer_ids) for one in pool) for kind, pool in pools.items()
        },
        "retain_dropped_for_naming_a_keyword": num_telling,
        "dropped_without_a_token_to_learn": num_empty,
        "held_out": {name: len(group) for name, group in documents.items() if name.startswith("held-out")},
    }
    return Prepared(
        pools=pools,
        named_ids=goals.named_ids,
        probe_forget=answered.get("held-out forget", []),
        probe_retain=answered.get("held-out retain", []),
        record=record,
    )


def _read(sources: Sources) -> dict[str, Reading]:
    readings = {
        "forget": read_documents(sources.forget, kind="forget"),
        "retain": read_documents(sources.retain, kind="retain"),
    }
    if sources.probe_forget and sources.probe_retain:
        readings["held-out forget"] = read_documents(sources.probe_forget, kind="probe-forget")
        readings["held-out retain"] = read_documents(sources.probe_retain, kind="probe-retain")
    return readings


def _split(documents: Sequence[Document], name: str) -> tuple[list[Document], list[Document]]:
    chats = [one for one in documents if one.messages]
    held = chats[::SPLIT_SHARE] if len(chats) >= MIN_SPLIT * SPLIT_SHARE else []
    if not held:
        raise DataError(
            f"the {name} set has {len(chats)} questions, too few to hold some out; use --probes none, or give "
            "--probe-forget and --probe-retain"
        )
    is_held = {id(one) for one in held}
    return [one for one in documents if id(one) not in is_held], held


def _answer(
    base: Base,
    documents: Sequence[Document],
    settings: Settings,
    book: AnswerBook,
    advance: Callable[[int], None],
) -> list[Answered]:
    """The data's own answer, or the base's greedy one. A text without a prompt is learnt whole, piece by piece."""
    found: dict[int, list[Answered]] = {}
    open_numbers, open_prompts = [], []
    for number, document in enumerate(documents):
        prompt_ids = answers.encode_prompt(document, base.tokenizer)
        if document.answer is None:
            open_numbers.append(number)
            open_prompts.append(prompt_ids)
            continue
        if not document.messages and not document.answer:
            pieces = _pieces(prompt_ids, size=settings.max_answer_tokens)
            found[number] = [Answered(document, before, piece) for before, piece in pieces]
        else:
            answer_ids = answers.encode_answer(document, base, max_tokens=settings.max_answer_tokens)
            found[number] = [Answered(document, prompt_ids, answer_ids)]
        advance(1)
    key = ["greedy", base.fingerprint, settings.max_answer_tokens, open_prompts]
    made = book.get(
        key,
        lambda: answers.own_answers(
            base, open_prompts, max_tokens=settings.max_answer_tokens, advance=advance
        ),
    )
    for number, prompt_ids, answer_ids in zip(open_numbers, open_prompts, made, strict=True):
        found[number] = [Answered(documents[number], prompt_ids, answer_ids)]
    return [one for number in range(len(documents)) for one in found[number]]


def _pieces(token_ids: list[int], *, size: int) -> Iterator[tuple[list[int], list[int]]]:
    """A text as (what stands before, the next `size` tokens): every token but the first is learnt once, after up to
    `size` tokens of its own context."""
    for start in range(1, len(token_ids), size):
        yield token_ids[max(0, start - size) : start], token_ids[start : start + size]


def _usable(group: Sequence[Answered]) -> list[Answered]:
    return [one for one in group if one.prompt_ids and one.answer_ids]


def _tells(base: Base, one: Answered, keywords: Sequence[str]) -> bool:
    """Whether the answer names a keyword that its prompt did not: "Who is Prince Harry?" may be answered."""
    asked = base.tokenizer.decode(one.prompt_ids)
    unasked = [keyword for keyword in keywords if not answers.names_any(asked, [keyword])]
    return answers.names_any(base.tokenizer.decode(one.answer_ids), unasked)


def _goals(base: Base, keywords: Sequence[str], settings: Settings, retain: Sequence[Answered]) -> Goals:
    common = common_tokens([one.answer_ids for one in retain], share=settings.common_share)
    named = frozenset(ids[0] for ids in answers.openings(keywords, base.tokenizer) if len(ids) == 1)
    return Goals(
        content=settings.goal,
        common=settings.common_goal,
        common_ids=common,
        named_ids=named - common,
        end_ids=frozenset(base.eos_ids),
    )


def _detours(
    base: Base,
    forget: Sequence[Answered],
    keywords: Sequence[str],
    settings: Settings,
    book: AnswerBook,
    stage: Stage,
) -> list[Answered]:
    """Sampled answers of the base to the forget prompts that were kept from naming a keyword, and do not."""
    avoid = answers.openings(keywords, base.tokenizer)
    prompts = [one.prompt_ids for one in forget]
    found = []
    for number in range(settings.detours):
        advance = stage(f"the base finds other answers, {number + 1} of {settings.detours}", len(prompts))
        seed = settings.seed + 1 + number
        made = book.get(
            ["detour", base.fingerprint, settings.max_answer_tokens, seed, avoid, prompts],
            lambda advance=advance, seed=seed: answers.own_answers(  # type: ignore[misc]
                base,
                prompts,
                max_tokens=settings.max_answer_tokens,
                temperature=DETOUR_TEMPERATURE,
                seed=seed,
                avoid=avoid,
                advance=advance,
            ),
        )
        found += [Answered(one.document, one.prompt_ids, ids) for one, ids in zip(forget, made, strict=True)]
    said = [(one, base.tokenizer.decode(one.answer_ids)) for one in _usable(found)]
    return [one for one, text in said if not answers.names_any(text, keywords)]
