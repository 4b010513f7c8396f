"""Asks a model TOFU's questions, without or with a profile, through the engine that serves. Called by tofu_run. Knows
no file, and no figure that is made of the answers.

Legend: N questions, J wrong answers of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Protocol

import numpy as np

from uld_serve.engine.request import SamplingParams
from uld_serve.evaluation.memorization import exact_memorization, extraction_strength
from uld_serve.evaluation.overlap import rouge_l
from uld_serve.evaluation.questions import Question
from uld_serve.evaluation.tofu import Samples
from uld_serve.llm import Completion, Scored

FLOOR_NATS = -50.0
"""A token that a filter makes impossible counts as this likely, so that means over an answer stay numbers."""
QUESTIONS_AT_ONCE = 16

Advance = Callable[[int], None]


class Encoder(Protocol):
    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...

    def encode_answer(self, text: str) -> list[int]: ...


class Model(Protocol):
    """The part of LLM that is used here."""

    @property
    def tokenizer(self) -> Encoder: ...

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, *, profile: str | None = None
    ) -> list[Completion]: ...

    def score(
        self, sequences: Sequence[Sequence[int]], *, profile: str | None = None, top: int = 1
    ) -> list[Scored]: ...


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is asked. `profile` answers; `unfiltered` gives likelihoods, which behind a fused filter would be zero for
    all that it drops: the same profile without that filter, or `profile` itself. None is the model alone."""

    name: str
    profile: str | None = None
    unfiltered: str | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """`extraction_strength` and `exact_memorization` are of the right answers, by what is served."""

    samples: Samples
    extraction_strength: list[float]
    exact_memorization: list[float]
    answers: list[str]
    """Greedy."""
    impossible: float
    """Share of the right answers' tokens that the served filter gives probability 0."""


def ask(
    model: Model, subject: Subject, questions: Sequence[Question], *, max_tokens: int, advance: Advance
) -> Measured:
    """One section. `advance` is told how many questions are done. Raises what the model raises."""
    parts = []
    for start in range(0, len(questions), QUESTIONS_AT_ONCE):
        some = questions[start : start + QUESTIONS_AT_ONCE]
        parts.append(_Part(model, subject, some, max_tokens))
        advance(len(some))
    impossible, tokens = sum(part.num_impossible for part in parts), sum(part.num_tokens for part in parts)
    return Measured(
        samples=Samples(
            loss_N=np.concatenate([part.losses[:, 0] for part in parts]),
            paraphrased_loss_N=np.concatenate([part.losses[:, 1] for part in parts]),
            perturbed_loss_NJ=np.concatenate([part.losses[:, 2:] for part in parts]),
            rougeL_recall_N=np.asarray([value for part in parts for value in part.recalls]),
        ),
        extraction_strength=[value for part in parts for value in part.strengths],
        exact_memorization=[value for part in parts for value in part.memorized],
        answers=[answer for part in parts for answer in part.answers],
        impossible=impossible / tokens,
    )


class _Part:
    """Some questions, asked and scored. `losses` is (N, 2 + J): right, paraphrased, wrong."""

    def __init__(
        self, model: Model, subject: Subject, questions: Sequence[Question], max_tokens: int
    ) -> None:
        self._model = model
        tokenizer = model.tokenizer
        prompts = [
            tokenizer.encode_chat([{"role": "user", "content": question.question}]) for question in questions
        ]
        right = [tokenizer.encode_answer(question.answer) for question in questions]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.answers = [one.text for one in model.generate(prompts, params, profile=subject.profile)]
        self.recalls = [
            rouge_l(said, question.answer).recall
            for said, question in zip(self.answers, questions, strict=True)
        ]
        served = self._scored(prompts, right, subject.profile)
        chosen = [
            [ids[0] for ids in one.top_ids[len(prompt) :]]
            for prompt, one in zip(prompts, served, strict=True)
        ]
        self.strengths = [extraction_strength(*pair) for pair in zip(chosen, right, strict=True)]
        self.memorized = [exact_memorization(*pair) for pair in zip(chosen, right, strict=True)]
        logprobs = [value for pair in zip(served, prompts, strict=True) for value in _logprobs(*pair)]
        self.num_tokens, self.num_impossible = len(logprobs), sum(value <= FLOOR_NATS for value in logprobs)
        texts = [[q.answer, q.paraphrased, *q.perturbed] for q in questions]
        self.losses = np.asarray(self._losses(prompts, texts, subject.unfiltered))

    def _losses(
        self, prompts: Sequence[list[int]], texts: Sequence[Sequence[str]], profile: str | None
    ) -> list[list[float]]:
        """Mean NLL of each text after its prompt; a text that stands twice is scored once."""
        pairs = {(number, text): None for number, row in enumerate(texts) for text in row}
        asked = [prompts[number] for number, _ in pairs]
        answers = [self._model.tokenizer.encode_answer(text) for _, text in pairs]
        scored = self._scored(asked, answers, profile)
        found = {
            pair: -fsum(values) / len(values)
            for pair, values in zip(pairs, map(_logprobs, scored, asked), strict=True)
        }
        return [[found[number, text] for text in row] for number, row in enumerate(texts)]

    def _scored(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]], profile: str | None
    ) -> list[Scored]:
        sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return self._model.score(sequences, profile=profile, top=1)


def _logprobs(scored: Scored, prompt: Sequence[int]) -> list[float]:
    """Of the answer's tokens."""
    values = scored.logprobs[len(prompt) :]
    return [max(value, FLOOR_NATS) for value in values if value is not None]
