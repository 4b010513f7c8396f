"""More to learn from than the data says once: other wordings and wrong answers in the data or in a file beside it, and
what the base itself would say. Called by preparation; part of each method. Knows no objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from uld_serve.data.documents import Document, Message, Variants, read_lines, told
from uld_serve.errors import DataError
from uld_serve.model.loading import Base
from uld_serve.training import answers
from uld_serve.training.settings import Settings
from uld_serve.training.sources import AnswerBook, Answered, Sources, Stage, usable

TEMPERATURE = 0.8
REWRITE = "Say the following in other words and keep every fact:\n\n{answer}"
NOTES = (
    "{statement}\n\n{question}",
    'I read this today: "{statement}"\n\nSo tell me: {question}',
    "{question}\n\nAnswer from this text alone:\n{statement}",
)
"""Prompts with a statement beside the question. None is the in-context probe's: its words are not to be learnt."""
# A rewrite that shares fewer words with the answer says something else; one that shares more says the same again.
LEAST_SHARED, MOST_SHARED = 0.3, 0.95


def with_wordings(documents: Sequence[Document], sources: Sources) -> tuple[list[Document], int]:
    """Forget documents with the wordings that are to be used, and how many questions of the file are not theirs.

    Raises DataError: the file has no wordings, or none of a question that is to be forgotten, or some of a question
    that has no answer in the data.
    """
    found = [one if sources.uses_columns else replace(one, variants=Variants()) for one in documents]
    if sources.augment_file is None:
        return found, 0
    beside = _by_question(read_lines(sources.augment_file, kind="augment-file"))
    matched = [beside.pop(one.key, None) for one in found]
    if not any(one is not None and one.variants for one in matched):
        raise DataError(
            f"--augment-file: {told(sources.augment_file)} has no other wording of a question in "
            f"{told(sources.forget)}; a line is "
            '{"question", "answer"} with "paraphrased_question", "paraphrased_answer" or "perturbed_answer"'
        )
    for one, other in zip(found, matched, strict=True):
        if other is not None and other.variants and (one.answer is None or len(one.messages) != 1):
            raise DataError(
                f"{one.where}: --augment-file has other wordings of it at {other.where}, which need one question and "
                "its answer in the forget data"
            )
    joined = [
        one if other is None else replace(one, variants=_joined(one.variants, other.variants))
        for one, other in zip(found, matched, strict=True)
    ]
    return joined, len(beside)


def _by_question(documents: Iterable[Document]) -> dict[str, Document]:
    """A question may have several lines: their wordings are one."""
    found: dict[str, Document] = {}
    for one in documents:
        before = found.get(one.key)
        found[one.key] = (
            one if before is None else replace(before, variants=_joined(before.variants, one.variants))
        )
    return found


def _joined(first: Variants, second: Variants) -> Variants:
    return Variants(
        questions=tuple(dict.fromkeys((*first.questions, *second.questions))),
        paraphrases=tuple(dict.fromkeys((*first.paraphrases, *second.paraphrases))),
        perturbed=tuple(dict.fromkeys((*first.perturbed, *second.perturbed))),
    )


def variants_of(
    base: Base, documents: Sequence[Document], *, max_tokens: int
) -> tuple[list[Answered], list[Answered]]:
    """(the same asked or said otherwise, wrong answers), of what the documents carry."""
    more: list[Document] = []
    wrong: list[Document] = []
    for one in documents:
        asked = [replace(one, messages=(Message("user", question),)) for question in one.variants.questions]
        said = [replace(one, answer=answer) for answer in one.variants.paraphrases]
        more += [*asked, *said]
        wrong += [replace(one, answer=answer) for answer in one.variants.perturbed]
    encoded = [
        [
            Answered(
                one,
                answers.encode_prompt(one, base.tokenizer),
                answers.encode_answer(one, base, max_tokens=max_tokens),
            )
            for one in group
        ]
        for group in (more, wrong)
    ]
    return encoded[0], encoded[1]


def own_samples(
    base: Base, forget: Sequence[Answered], settings: Settings, book: AnswerBook, stage: Stage
) -> list[Answered]:
    """What else the base would say: to prompts without an answer in the data samples of its own, of answers in the data
    its rewrites, where they neither repeat the answer nor leave it."""
    found = []
    asked = [_rewriting(base, one) for one in forget]
    prompts = [
        one.prompt_ids if prompt is None else prompt for one, prompt in zip(forget, asked, strict=True)
    ]
    for number in range(settings.own_samples):
        advance = stage(f"the base says it otherwise, {number + 1} of {settings.own_samples}", len(prompts))
        seed = settings.seed + 101 + number
        made = book.get(
            ["own sample", base.fingerprint, settings.max_answer_tokens, seed, prompts],
            lambda advance=advance, seed=seed: answers.own_answers(  # type: ignore[misc]
                base,
                prompts,
                max_tokens=settings.max_answer_tokens,
                temperature=TEMPERATURE,
                seed=seed,
                advance=advance,
            ),
        )
        for one, prompt, ids in zip(forget, asked, made, strict=True):
            if prompt is None or _says_the_same(base, one, ids):
                found.append(Answered(one.document, one.prompt_ids, ids))
    return usable(found)


def notes(
    base: Base,
    forget: Sequence[Answered],
    retain: Sequence[Answered],
    settings: Settings,
    book: AnswerBook,
    stage: Stage,
) -> tuple[list[Answered], list[Answered]]:
    """(questions beside their own answer, with what the base then says; the same beside the answer to something else,
    with the answer that is to be forgotten): what a user supplies may be used, and any other note opens nothing."""
    asked = [one for one in forget if len(one.document.messages) == 1]
    if not settings.notes or not asked or not retain:
        return [], []
    supplied = [_beside(base, one, one, number) for number, one in enumerate(asked)]
    unrelated = [_beside(base, one, retain[number % len(retain)], number) for number, one in enumerate(asked)]
    prompts = [answers.encode_prompt(one, base.tokenizer) for one in supplied]
    advance = stage("the base reads supplied answers", len(prompts))
    made = book.get(
        ["greedy", base.fingerprint, settings.max_answer_tokens, prompts],
        lambda: answers.own_answers(base, prompts, max_tokens=settings.max_answer_tokens, advance=advance),
    )
    used = [Answered(*parts) for parts in zip(supplied, prompts, made, strict=True)]
    unused = [
        Answered(prompt, answers.encode_prompt(prompt, base.tokenizer), one.answer_ids)
        for prompt, one in zip(unrelated, asked, strict=True)
    ]
    return usable(used), usable(unused)


def _beside(base: Base, one: Answered, other: Answered, number: int) -> Document:
    """The question of one with the answer to the other as a statement, in one of the forms."""
    question = one.document.messages[0].content
    text = NOTES[number % len(NOTES)].format(statement=_said(base, other), question=question)
    return Document(messages=(Message("user", text),), where=one.document.where)


def _said(base: Base, one: Answered) -> str:
    if one.document.answer is not None:
        return one.document.answer
    return str(base.tokenizer.decode(one.answer_ids, skip_special_tokens=True)).strip()


def _rewriting(base: Base, one: Answered) -> list[int] | None:
    """The prompt that asks for a rewrite; None where the answer is the base's own."""
    if one.document.answer is None or not one.document.messages:
        return None
    asked = Document(messages=(Message("user", REWRITE.format(answer=one.document.answer)),))
    return answers.encode_prompt(asked, base.tokenizer)


def _says_the_same(base: Base, one: Answered, ids: Sequence[int]) -> bool:
    said = {text.lower() for text in (one.document.answer or "").split()}
    again = {text.lower() for text in str(base.tokenizer.decode(ids, skip_special_tokens=True)).split()}
    shared = len(said & again) / max(1, len(said | again))
    return LEAST_SHARED <= shared <= MOST_SHARED


def detours(
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
                temperature=TEMPERATURE,
                seed=seed,
                avoid=avoid,
                advance=advance,
            ),
        )
        found += [Answered(one.document, one.prompt_ids, ids) for one, ids in zip(forget, made, strict=True)]
    said = [(one, base.tokenizer.decode(one.answer_ids)) for one in usable(found)]
    return [one for one, text in said if not answers.names_any(text, keywords)]
