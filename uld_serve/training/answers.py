"""The base's own words: greedy answers to prompts that came without one, and samples that avoid some words.
Called by run before any adapter exists. Knows no objective and no profile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerFast

from uld_serve.data.documents import Document
from uld_serve.errors import DataError
from uld_serve.model.loading import Base
from uld_serve.training.continuation import Drawing, continuations

BATCH_SIZE = 96
Advance = Callable[[int], None]


def encode_prompt(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids that come before the answer. Raises DataError for a conversation without a chat template."""
    if not document.messages:
        return list(tokenizer.encode(document.text))
    if not tokenizer.chat_template:
        raise DataError(
            f"{document.where}: this base has no chat template; use the prompt and completion form"
        )
    text = tokenizer.apply_chat_template(
        [message.as_dict() for message in document.messages], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_answer(document: Document, base: Base, *, max_tokens: int) -> list[int]:
    """Token ids of the answer in the data, cut to `max_tokens`; one of a conversation ends with the end token."""
    ids = list(base.tokenizer.encode(document.answer or "", add_special_tokens=False))
    if document.messages and base.tokenizer.eos_token_id is not None:
        ids.append(int(base.tokenizer.eos_token_id))
    return ids[:max_tokens]


@torch.inference_mode()
def own_answers(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    avoid: Sequence[Sequence[int]] = (),
    advance: Advance = lambda _: None,
) -> list[list[int]]:
    """One answer of the base to each prompt, with the end token where it ended; token sequences in `avoid` are
    never completed. `advance` is told how many were made."""
    answers: list[list[int]] = [[] for _ in prompts]
    draw = Drawing(temperature=temperature, avoid=avoid)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            batch = [prompts[number] for number in chosen]
            made = continuations(base, batch, max_tokens=max_tokens, draw=draw)
            for number, answer in zip(chosen, made, strict=True):
                answers[number] = answer
            advance(len(chosen))
    return answers


def names_any(text: str, keywords: Sequence[str]) -> bool:
    """Whether a keyword stands in the text as a whole word or phrase, in any case."""
    return any(
        re.search(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE) is not None
        for keyword in keywords
    )


def openings(keywords: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, ...]]:
    """The first one or two tokens of each keyword as it is commonly written, for `avoid`.

    Two where the first is shorter than three characters: " D" opens far more than "Dumbledore".
    """
    found = set()
    for keyword in keywords:
        for spelled in (keyword, keyword.lower(), keyword.upper()):
            for written in (spelled, f" {spelled}", f'"{spelled}'):
                ids = tuple(tokenizer.encode(written, add_special_tokens=False))
                found.add(ids[: 1 if len(tokenizer.decode(ids[:1]).strip()) >= 3 else 2])
    return sorted(found)
