"""Asks a model TOFU's questions, without or with a profile. Called by tofu_run. Knows no file, and no figure that is
made of the answers.

Legend: N questions, J wrong answers of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np

from uld_serve.evaluation.asker import (
    FLOOR_NATS,
    Advance,
    Model,
    Subject,
    greedy_answers,
    logprobs_from,
    some_at_once,
)
from uld_serve.evaluation.memorization import exact_memorization, extraction_strength
from uld_serve.evaluation.overlap import rouge_l
from uld_serve.evaluation.questions import Question
from uld_serve.evaluation.tofu import Samples
from uld_serve.llm import Scored


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
    parts = [_Part(model, subject, some, max_tokens) for some in some_at_once(questions, advance)]
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
        self.answers = greedy_answers(model, subject, prompts, max_tokens=max_tokens)
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
        starts = map(len, prompts)
        logprobs = [value for pair in zip(served, starts, strict=True) for value in logprobs_from(*pair)]
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
            for pair, values in zip(pairs, map(logprobs_from, scored, map(len, asked)), strict=True)
        }
        return [[found[number, text] for text in row] for number, row in enumerate(texts)]

    def _scored(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]], profile: str | None
    ) -> list[Scored]:
        sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return self._model.score(sequences, profile=profile, starts=[len(one) for one in prompts], top=1)
