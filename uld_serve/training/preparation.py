"""From files to examples: reads, refuses overlaps, lets the base answer, drops what would teach the wrong thing.
Called by run. Knows no adapter and no objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from uld_serve.data.documents import Document, Reading, Variants, read_documents, refuse_overlap
from uld_serve.errors import DataError
from uld_serve.model.loading import Base
from uld_serve.training import answers, augmentation
from uld_serve.training.examples import Example, Goals, Kind, common_tokens
from uld_serve.training.settings import Settings
from uld_serve.training.sources import AnswerBook, Answered, Sources, Stage, usable

SPLIT_SHARE = 6
"""One prompt in so many is held out by `split`."""

MIN_SPLIT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    pools: dict[Kind, list[Example]]
    named_ids: frozenset[int]
    probe_forget: list[Answered]
    probe_retain: list[Answered]
    record: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Material:
    """Documents by set ("forget", "retain", "held-out …"), and what reading them gave."""

    documents: dict[str, list[Document]]
    record: dict[str, object]

    def first(self, count: int) -> Material:
        """The same with no more than `count` documents a set."""
        return Material({name: group[:count] for name, group in self.documents.items()}, self.record)


def gather(sources: Sources) -> Material:
    """Raises DataError: unusable files, prompts in two sets."""
    readings = _read(sources)
    documents = {name: list(reading.documents) for name, reading in readings.items()}
    documents["forget"], unmatched = augmentation.with_wordings(documents["forget"], sources)
    if sources.split:
        for name in ("forget", "retain"):
            documents[name], documents[f"held-out {name}"] = _split(documents[name], name)
    for name in documents.keys() - {"forget"}:  # nobody learns from theirs
        documents[name] = [replace(one, variants=Variants()) for one in documents[name]]
    names = list(documents)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            refuse_overlap(documents[first], documents[second], names=(first, second))
    record: dict[str, object] = {
        "read": {name: reading.summary() for name, reading in readings.items()},
        "documents": {name: len(group) for name, group in documents.items()},
        "wordings_of_unknown_questions": unmatched,
    }
    return Material(documents, record)


def prepare(
    base: Base,
    material: Material,
    settings: Settings,
    *,
    keywords: tuple[str, ...],
    book: AnswerBook,
    stage: Stage,
) -> Prepared:
    """Examples from documents: the base answers where the data does not."""
    documents = material.documents
    answered = {
        name: _answer(base, group, settings, book, stage(f"the base answers: {name}", len(group)))
        for name, group in documents.items()
    }
    kept = [one for one in answered["retain"] if not _tells(base, one, keywords)]
    num_telling = len(answered["retain"]) - len(kept)
    goals = _goals(base, keywords, settings, kept)
    num_empty = sum(len(group) - len(usable(group)) for group in (answered["forget"], kept))
    forget, kept = usable(answered["forget"]), usable(kept)
    detours = augmentation.detours(base, forget, keywords, settings, book, stage)
    more, wrong = augmentation.variants_of(base, documents["forget"], max_tokens=settings.max_answer_tokens)
    samples = augmentation.own_samples(base, forget, settings, book, stage)
    supplied, unrelated = augmentation.notes(base, forget, kept, settings, book, stage)
    forget = [*forget, *usable(more), *usable(samples), *unrelated]
    kept, detours = [*kept, *supplied], [*detours, *usable(wrong)]
    pools = {
        Kind.FORGET: [goals.example(one.prompt_ids, one.answer_ids, Kind.FORGET) for one in forget],
        Kind.RETAIN: [goals.example(one.prompt_ids, one.answer_ids, Kind.RETAIN) for one in kept],
        Kind.DETOUR: [goals.example(one.prompt_ids, one.answer_ids, Kind.DETOUR) for one in detours],
    }
    record = {
        **material.record,
        "examples": {kind.name.lower(): len(pool) for kind, pool in pools.items()},
        "answer_tokens": {
            kind.name.lower(): sum(len(one.answer_ids) for one in pool) for kind, pool in pools.items()
        },
        "augmented": {
            "wordings": len(more),
            "wrong_answers": len(wrong),
            "own_samples": len(samples),
            "supplied_answers": len(supplied),
            "unrelated_notes": len(unrelated),
        },
        "retain_dropped_for_naming_a_keyword": num_telling,
        "dropped_without_a_token_to_learn": num_empty,
    }
    return Prepared(
        pools=pools,
        named_ids=goals.named_ids,
        probe_forget=answered.get("held-out forget", []),
        probe_retain=answered.get("held-out retain", []),
        record=record,
    )


def nothing_of(kind: Kind) -> DataError:
    return DataError(
        f"there is no usable {kind.name.lower()} example: its answers are empty or name a keyword; see what was read"
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
