"""Where in an answer's tokens its keys stand. Called by the probes. Knows of a model its tokenizer only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol


class Encoder(Protocol):
    """The part of the engine's tokenizer that is used here."""

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...

    def encode_answer(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


def plain_ids(tokenizer: Encoder, text: str) -> list[int]:
    """Tokens of an answer without the one that ends it."""
    ids, end = tokenizer.encode_answer(text), tokenizer.encode_answer("")
    return ids[: len(ids) - len(end)]


def first_key_token(tokenizer: Encoder, answer: str, keys: Sequence[str]) -> int | None:
    """Number of tokens before the first key; None where no key stands in the answer."""
    spans = key_tokens(tokenizer, answer, keys)
    return min(start for start, _ in spans) if spans else None


def key_tokens(tokenizer: Encoder, answer: str, keys: Sequence[str]) -> list[tuple[int, int]]:
    """(first, behind the last) token of each key at each place where it stands in the answer.

    A token belongs to a key if the answer, cut before or behind the key, is not tokenised the same up to it.
    """
    ids, found = plain_ids(tokenizer, answer), set()
    for key in keys:
        for match in re.finditer(re.escape(key), answer, re.IGNORECASE):
            # The space before a word is part of its first token in most vocabularies.
            start = _alike(ids, plain_ids(tokenizer, answer[: match.start()].rstrip()))
            end = max(_alike(ids, plain_ids(tokenizer, answer[: match.end()])), start + 1)
            found.add((start, end))
    return sorted(found)


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return count
