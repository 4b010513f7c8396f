"""Held-out prompts with the answers whose likelihood tells what was forgotten and kept, as token ids. Called by tune
and `eval sweep`. Knows no file, no rule and no figure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from uld_serve.engine.request import SamplingParams
from uld_serve.errors import DataError
from uld_serve.llm import Completion, Scored

MAX_ANSWER_TOKENS = 48
"""Of the base's own answer, where the data has none."""
MIN_ITEMS = 2


class Turn(Protocol):
    def as_dict(self) -> dict[str, str]: ...


class Document(Protocol):
    """The part of training's Document that is used here: either `messages` or `text` is set; an `answer` of None is
    the base's to give, and a `text` with an empty one is a document that is read whole."""

    @property
    def messages(self) -> Sequence[Turn]: ...

    @property
    def text(self) -> str: ...

    @property
    def answer(self) -> str | None: ...

    @property
    def key(self) -> str: ...


DocumentT = TypeVar("DocumentT", bound=Document)


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...

    def encode_answer(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class Model(Protocol):
    """The part of LLM that is used by a sweep."""

    @property
    def tokenizer(self) -> Encoder: ...

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, *, profile: str | None = None
    ) -> list[Completion]: ...

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        profile: str | None = None,
        starts: Sequence[int] | None = None,
        top: int = 1,
    ) -> list[Scored]: ...


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and the answer that is scored after it. `answer` is its text; None for a document that is read whole,
    which nobody can be asked for."""

    prompt_ids: list[int]
    answer_ids: list[int]
    answer: str | None


def items(model: Model, documents: Sequence[Document], *, kind: str, at_least: int = MIN_ITEMS) -> list[Item]:
    """Those that have a token to score, in order; the base answers greedily where the data does not. Raises DataError
    where fewer than `at_least` are left; `kind` ("forget", "retain") names them."""
    found = [_given(model.tokenizer, document) for document in documents]
    unanswered = [
        number
        for number, (item, document) in enumerate(zip(found, documents, strict=True))
        if _asks(document)
    ]
    params = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0)
    said = model.generate([found[number].prompt_ids for number in unanswered], params) if unanswered else []
    for number, one in zip(unanswered, said, strict=True):
        found[number] = Item(found[number].prompt_ids, list(one.token_ids), one.text)
    usable = [item for item in found if item.prompt_ids and item.answer_ids]
    if len(usable) < at_least:
        raise DataError(f"--{kind}: {len(usable)} prompts with an answer; at least {at_least} are needed")
    return usable


def halves(documents: Sequence[DocumentT], *, kind: str) -> tuple[list[DocumentT], list[DocumentT]]:
    """A part to choose by and one to report on, in the data's order: by a hash of the prompt, so that a prompt is in
    the same part whatever stands beside it in the file. Raises DataError for fewer than two a part."""
    ranked = sorted(documents, key=lambda document: hashlib.sha256(document.key.encode()).digest())
    first = {id(document) for document in ranked[: (len(ranked) + 1) // 2]}
    choosing = [document for document in documents if id(document) in first]
    reporting = [document for document in documents if id(document) not in first]
    if len(reporting) < MIN_ITEMS:
        raise DataError(
            f"--{kind}: {len(documents)} prompts; at least {2 * MIN_ITEMS} are needed, one half to choose by and one "
            "to report on"
        )
    return choosing, reporting


def _asks(document: Document) -> bool:
    return document.answer is None


def _given(tokenizer: Encoder, document: Document) -> Item:
    answer = document.answer
    if document.messages:
        prompt_ids = tokenizer.encode_chat([turn.as_dict() for turn in document.messages])
        return Item(prompt_ids, [] if answer is None else tokenizer.encode_answer(answer), answer)
    if answer:
        whole, prompt_ids = tokenizer.encode(document.text + answer), tokenizer.encode(document.text)
        # As many tokens as the prompt has by itself: where the last of them differs, it is scored too.
        start = next(
            (
                number
                for number, pair in enumerate(zip(whole, prompt_ids, strict=False))
                if pair[0] != pair[1]
            ),
            min(len(whole), len(prompt_ids)),
        )
        return Item(whole[:start], whole[start:], answer)
    ids = tokenizer.encode(document.text)
    return Item(ids, [], None) if answer is None else Item(ids[:1], ids[1:], None)
