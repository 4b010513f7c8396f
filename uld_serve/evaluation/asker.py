"""Asks a model for answers and likelihoods, without or with a profile, through the engine that serves. Called by the
evaluations' own askers. Knows no benchmark, no file, and no figure that is made of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from uld_serve.engine.request import SamplingParams
from uld_serve.errors import DataError
from uld_serve.llm import Completion, Scored

FLOOR_NATS = -50.0
"""A token that a filter makes impossible counts as this likely, so that means over an answer stay numbers."""
AT_ONCE = 16
"""Questions between two reports of progress."""

Advance = Callable[[int], None]
T = TypeVar("T")


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...

    def encode_more(self, text: str) -> list[int]: ...

    def encode_answer(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class Model(Protocol):
    """The part of LLM that is used here."""

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
class Subject:
    """Who is asked. `profile` answers; `unfiltered` gives likelihoods, which behind a fused filter would be zero for
    all that it drops: the same profile without that filter, or `profile` itself. None is the model alone."""

    name: str
    profile: str | None = None
    unfiltered: str | None = None


def some_at_once(items: Sequence[T], advance: Advance) -> Iterator[Sequence[T]]:
    """The items in short runs; `advance` is told of each run when the next is asked for."""
    for start in range(0, len(items), AT_ONCE):
        some = items[start : start + AT_ONCE]
        yield some
        advance(len(some))


def greedy_answers(
    model: Model,
    subject: Subject,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int,
    stop: tuple[str, ...] = (),
) -> list[str]:
    """By what is served. Raises what the model raises."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=stop)
    return [one.text for one in model.generate(prompts, params, profile=subject.profile)]


def text_logprobs(model: Model, subject: Subject, texts: Sequence[str]) -> list[list[float]]:
    """Of every token of each text but its first, by the unfiltered subject. Raises DataError for a text of one token,
    which has no such."""
    sequences = [model.tokenizer.encode(text) for text in texts]
    for ids, text in zip(sequences, texts, strict=True):
        if len(ids) < 2:
            raise DataError(f"a text of fewer than two tokens has no likelihood: {text!r}")
    scored = model.score(sequences, profile=subject.unfiltered, top=0)
    return [logprobs_from(one, 1) for one in scored]


def logprobs_from(scored: Scored, start: int) -> list[float]:
    """Of the tokens from position `start` on, in nats, from FLOOR_NATS to 0."""
    return [min(0.0, max(value, FLOOR_NATS)) for value in scored.logprobs[start:] if value is not None]
