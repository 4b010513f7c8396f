"""Puts MUSE's texts and questions to a model, without or with a profile. Called by muse_run. Knows no file, and no
figure over several samples.

Prompts are plain texts without a chat template, and lengths, ends and ROUGE without stems are as in MUSE's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uld_serve.evaluation.asker import Advance, Model, Subject, greedy_answers, some_at_once, text_logprobs
from uld_serve.evaluation.membership import min_k_score
from uld_serve.evaluation.muse_data import Pair
from uld_serve.evaluation.overlap import rouge_l

ENDS = ("\n\n", "\nQuestion", "Question:")
"""A model without a chat's end would go on with questions of its own."""


@dataclass(frozen=True, slots=True)
class Said:
    """ROUGE-L of every greedy text against the true one."""

    f1: list[float]
    recall: list[float]
    texts: list[str]


@dataclass(frozen=True, slots=True)
class Familiar:
    """Min-K% of every text, larger for those more likely seen."""

    min_k: list[float]


def go_on(
    model: Model, subject: Subject, pairs: Sequence[Pair], *, max_tokens: int, advance: Advance
) -> Said:
    """VerbMem: `max_tokens` tokens after each beginning, against as many of the text."""
    truths = [_cut(model, pair.truth, max_tokens) for pair in pairs]
    texts: list[str] = []
    for some in some_at_once(pairs, advance):
        prompts = [model.tokenizer.encode(pair.prompt) for pair in some]
        texts += greedy_answers(model, subject, prompts, max_tokens=max_tokens)
    return _said(texts, truths)


def answer(
    model: Model,
    subject: Subject,
    pairs: Sequence[Pair],
    examples: Sequence[Pair],
    *,
    max_tokens: int,
    advance: Advance,
) -> Said:
    """KnowMem."""
    texts: list[str] = []
    for some in some_at_once(pairs, advance):
        prompts = [model.tokenizer.encode(question_text(pair.prompt, examples)) for pair in some]
        texts += greedy_answers(model, subject, prompts, max_tokens=max_tokens, stop=ENDS)
    return _said(texts, [pair.truth for pair in pairs])


def question_text(question: str, examples: Sequence[Pair]) -> str:
    """MUSE's code ends in "Answer: ". Byte-level tokenizers make that space a token of its own, after which little but
    digits is likely (SmolLM2 answered "1984's The Shining"), and what a model knows would look forgotten."""
    shots = [f"Question: {pair.prompt}\nAnswer: {pair.truth}\n\n" for pair in examples]
    return "".join(shots) + f"Question: {question}\nAnswer:"


def read(model: Model, subject: Subject, texts: Sequence[str], *, share: float, advance: Advance) -> Familiar:
    """PrivLeak's attack."""
    scores: list[float] = []
    for some in some_at_once(texts, advance):
        scores += [min_k_score(logprobs, share=share) for logprobs in text_logprobs(model, subject, some)]
    return Familiar(scores)


def _cut(model: Model, text: str, max_tokens: int) -> str:
    return model.tokenizer.decode(model.tokenizer.encode_more(text)[:max_tokens])


def _said(texts: list[str], truths: Sequence[str]) -> Said:
    scores = [rouge_l(text, truth, stems=False) for text, truth in zip(texts, truths, strict=True)]
    return Said([score.f1 for score in scores], [score.recall for score in scores], texts)
