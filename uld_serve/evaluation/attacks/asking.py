"""Puts prompts to one model, without or with a profile, through the engine that serves, and keeps what it says. Called
by the probes command. Knows no kind of attack."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from uld_serve.engine.request import MAX_TOP_LOGPROBS, SamplingParams
from uld_serve.evaluation.attacks.cases import Case
from uld_serve.evaluation.attacks.difference import FLOOR_NATS, View
from uld_serve.evaluation.attacks.ledger import Ledger
from uld_serve.evaluation.attacks.places import Encoder, plain_ids
from uld_serve.llm import Completion, Scored

AT_ONCE = 128
SCORED_AT_ONCE = 16

Advance = Callable[[int], None]


class Model(Protocol):
    """The part of LLM that is used here."""

    @property
    def tokenizer(self) -> Encoder: ...

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], *, profile: str | None = None
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
class Asker:
    """Asks one subject. `version` tells its weights, tokens and profile from others; answers are kept in `folder`."""

    model: Model
    profile: str | None
    version: str
    folder: Path
    max_tokens: int
    advance: Advance

    def greedy(self, cases: Sequence[Case]) -> list[str]:
        """The most likely answer to each."""
        prompts = [self._prompt(case) for case in cases]
        return self._said("greedy", prompts, 0.0, [0] * len(prompts))

    def sampled(
        self, cases: Sequence[Case], *, samples: int, seed: int, temperature: float = 1.0
    ) -> list[list[str]]:
        """Answers drawn from the whole distribution that is served. Seeds hang on the prompt's words and the draw's
        number, so they are the same for all subjects, and more draws leave the first ones as they are."""
        prompts = [self._prompt(case) for case in cases for _ in range(samples)]
        seeds = [_seed(seed, case.prompt, number) for case in cases for number in range(samples)]
        said = self._said("sampled", prompts, temperature, seeds)
        return [said[start : start + samples] for start in range(0, len(said), samples)]

    def views(self, cases: Sequence[Case], places: Sequence[Sequence[int]]) -> list[list[View]]:
        """What is shown at some tokens of each case's truth, given the true ones before it; `places` counts them from
        the truth's first."""
        prompts = [self._prompt(case) for case in cases]
        answers = [plain_ids(self.model.tokenizer, case.truth) for case in cases]
        asked = [
            [self.version, prompt, answer, list(place)]
            for prompt, answer, place in zip(prompts, answers, places, strict=True)
        ]

        def make(some: Sequence[int]) -> list[object]:
            scored = self.model.score(
                [prompts[n] + answers[n] for n in some],
                profile=self.profile,
                starts=[len(prompts[n]) for n in some],
                top=MAX_TOP_LOGPROBS,
            )
            return [
                list(_shown(one, len(prompts[n]), places[n])) for n, one in zip(some, scored, strict=True)
            ]

        kept = Ledger(self.folder / "views.json").answers(
            asked, make, at_once=SCORED_AT_ONCE, advance=self.advance
        )
        return [_views(one) for one in kept]

    def _said(
        self, name: str, prompts: Sequence[list[int]], temperature: float, seeds: Sequence[int]
    ) -> list[str]:
        asked = [
            [self.version, prompt, self.max_tokens, temperature, seed]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

        def make(some: Sequence[int]) -> list[object]:
            params = [
                SamplingParams(max_tokens=self.max_tokens, temperature=temperature, seed=seeds[n])
                for n in some
            ]
            made = self.model.generate([prompts[n] for n in some], params, profile=self.profile)
            return [one.text for one in made]

        ledger = Ledger(self.folder / f"{name}.json")
        return [str(one) for one in ledger.answers(asked, make, at_once=AT_ONCE, advance=self.advance)]

    def _prompt(self, case: Case) -> list[int]:
        tokenizer = self.model.tokenizer
        messages = [message.as_dict() for message in case.messages]
        opened = tokenizer.encode_chat(messages) if messages else tokenizer.encode(case.text)
        return opened + (plain_ids(tokenizer, case.prefix) if case.prefix else [])


def _seed(seed: int, prompt: str, number: int) -> int:
    digest = hashlib.sha256(json.dumps([seed, prompt, number]).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _shown(scored: Scored, start: int, places: Sequence[int]) -> Iterator[object]:
    """For JSON, which knows no infinity."""
    for place in places:
        ids, logprobs = scored.top_ids[start + place], scored.top_logprobs[start + place]
        yield [list(ids), [max(value, FLOOR_NATS) for value in logprobs]]


def _views(kept: object) -> list[View]:
    if not isinstance(kept, list):
        raise TypeError("views are kept as lists")
    return [View(tuple(ids), tuple(logprobs)) for ids, logprobs in kept]
