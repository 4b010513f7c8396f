"""Measures whether a profile forgets what it should and keeps the rest, on its own probes or on others. Called by
`uld-serve profiles verify`. Asks through LLM alone, so what is measured is what is served; knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from uld_serve.engine.request import SamplingParams
from uld_serve.errors import ProfileError
from uld_serve.evaluation import metrics
from uld_serve.evaluation.held_out import Item
from uld_serve.evaluation.verdict import Fluency, Likelihood, Limits, Recall, Report
from uld_serve.llm import Completion, Scored
from uld_serve.profiles.probes import Probe, Probes
from uld_serve.profiles.profile import ProfileVersion

Step = Callable[[str], None]


class Encoder(Protocol):
    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`samples` answers are drawn for each forget prompt at temperature 1; an answer has at most
    `max_tokens`."""

    samples: int = 4
    max_tokens: int = 48
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked. An item without an answer has the base's own. Without `keywords` nobody can say what an answer
    tells: then recall is not measured and nothing is drawn at temperature 1."""

    forget: Sequence[Item]
    retain: Sequence[Item]
    keywords: tuple[str, ...]

    @classmethod
    def of(cls, probes: Probes, encoder: Encoder) -> Questions:
        def item(probe: Probe) -> Item:
            prompt_ids = encoder.encode_chat([message.model_dump() for message in probe.messages])
            return Item(prompt_ids, list(probe.answer_ids or ()), None)

        return cls([*map(item, probes.forget)], [*map(item, probes.retain)], probes.keywords)


def verify(
    model: Model,
    version: ProfileVersion,
    *,
    unfiltered: str,
    options: Options,
    questions: Questions | None = None,
    limits: Limits | None = None,
    step: Step = lambda _: None,
) -> Report:
    """Ask every question, without and with the profile; its own probes unless other `questions` are given.

    `unfiltered` names a profile in `model` that is the same but for a fused filter (the same name where
    there is none): a fused filter gives an unlikely token probability 0, so its NLL would be infinite,
    while what the rule does to it is finite and tells how much. All else is asked of the profile as served.
    `step` is called with a word before each of at most `NUM_STEPS` stages. Raises ProfileError if a list of questions
    is empty.
    """
    asked = Questions.of(version.probes, model.tokenizer) if questions is None else questions
    if not asked.forget or not asked.retain:
        raise ProfileError(f"profile '{version.name}' cannot be verified: no forget or no retain probes")
    asker = _Asker(model, version.name, unfiltered, options, step)
    retain_greedy = asker.greedy(asked.retain, None, "base, greedy, retain prompts")
    greedy = _Pair(
        asker.greedy(asked.forget, None, "base, greedy"),
        asker.greedy(asked.forget, version.name, "profile, greedy"),
    )
    drawn = _drawn(asker, asked, version.name) if asked.keywords else None
    return Report(
        version=version,
        forget=asker.likelihood(asked.forget, greedy.base, "likelihood of forget answers"),
        retain=asker.likelihood(asked.retain, retain_greedy, "likelihood of retain answers"),
        recall=None if drawn is None else _recall(greedy, drawn, asked.keywords),
        fluency=_fluency(asker, asked, greedy, drawn, options),
        limits=limits or Limits(),
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """Answers to the same prompts."""

    base: list[Completion]
    fused: list[Completion]


def _drawn(asker: _Asker, asked: Questions, name: str) -> _Pair:
    return _Pair(
        asker.sampled(asked.forget, None, "base, T = 1"), asker.sampled(asked.forget, name, "profile, T = 1")
    )


def _recall(greedy: _Pair, drawn: _Pair, keywords: Sequence[str]) -> Recall:
    told = [
        metrics.recall([answer.text for answer in answers], keywords)
        for answers in (greedy.base, greedy.fused, drawn.base, drawn.fused)
    ]
    return Recall(base=told[0], fused=told[1], base_t1=told[2], fused_t1=told[3])


def _fluency(
    asker: _Asker, asked: Questions, greedy: _Pair, drawn: _Pair | None, options: Options
) -> Fluency:
    base_t1 = fused_t1 = None
    if drawn is not None:
        repeated = [item for item in asked.forget for _ in range(options.samples)]
        base_t1 = asker.perplexity(repeated, drawn.base, "fluency of the base, T = 1")
        fused_t1 = asker.perplexity(repeated, drawn.fused, "fluency of the profile, T = 1")
    return Fluency(
        base=asker.perplexity(asked.forget, greedy.base, "fluency of the base, greedy"),
        fused=asker.perplexity(asked.forget, greedy.fused, "fluency of the profile, greedy"),
        base_t1=base_t1,
        fused_t1=fused_t1,
        distinct_base=metrics.distinct([answer.token_ids for answer in greedy.base]),
        distinct_fused=metrics.distinct([answer.token_ids for answer in greedy.fused]),
    )


NUM_STEPS = 11


class _Asker:
    """Puts questions to the model, with one set of options."""

    def __init__(self, model: Model, name: str, unfiltered: str, options: Options, step: Step) -> None:
        self._model, self._name, self._unfiltered = model, name, unfiltered
        self._options, self._step = options, step

    def greedy(self, items: Sequence[Item], profile: str | None, what: str) -> list[Completion]:
        self._step(what)
        params = SamplingParams(max_tokens=self._options.max_tokens, temperature=0.0)
        prompts = [item.prompt_ids for item in items]
        return self._model.generate(prompts, [params] * len(prompts), profile=profile)

    def sampled(self, items: Sequence[Item], profile: str | None, what: str) -> list[Completion]:
        """`samples` answers a prompt, with fixed seeds that are the same without and with the profile."""
        self._step(what)
        options = self._options
        prompts = [item.prompt_ids for item in items for _ in range(options.samples)]
        params = [
            SamplingParams(max_tokens=options.max_tokens, temperature=1.0, seed=options.seed + number)
            for number in range(len(prompts))
        ]
        return self._model.generate(prompts, params, profile=profile)

    def likelihood(self, items: Sequence[Item], own: Sequence[Completion], what: str) -> Likelihood:
        """Of the items' answers, or of the base's `own` where one has none."""
        self._step(what)
        answers = [item.answer_ids or answer.token_ids for item, answer in zip(items, own, strict=True)]
        base, base_top = self._score(items, answers, None)
        served, served_top = self._score(items, answers, self._name)
        fused, _ = self._score(items, answers, self._unfiltered)
        tokens = [value for answer in served for value in answer]
        return Likelihood(
            n=len(items),
            tokens=len(tokens),
            nll_base=metrics.mean_nll(base),
            nll_fused=metrics.mean_nll(fused),
            agreement=metrics.agreement(served_top, base_top),
            removed=sum(value == float("-inf") for value in tokens) / len(tokens),
        )

    def perplexity(self, items: Sequence[Item], answers: Sequence[Completion], what: str) -> float:
        """Under the base, given the prompt. An answer without a token counts for nothing."""
        self._step(what)
        pairs = zip(items, answers, strict=True)
        said = [(item, answer.token_ids) for item, answer in pairs if answer.token_ids]
        logprobs, _ = self._score([item for item, _ in said], [ids for _, ids in said], None)
        return metrics.perplexity(logprobs)

    def _score(
        self, items: Sequence[Item], answers: Sequence[Sequence[int]], profile: str | None
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Log-probability of each answer token, and the most likely token at its position."""
        prompts = [item.prompt_ids for item in items]
        sequences = [prompt + list(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        scored = self._model.score(sequences, profile=profile, starts=[len(one) for one in prompts], top=1)
        logprobs, top = [], []
        for prompt, result in zip(prompts, scored, strict=True):
            logprobs.append([value for value in result.logprobs[len(prompt) :] if value is not None])
            top.append([ids[0] for ids in result.top_ids[len(prompt) :]])
        return logprobs, top
