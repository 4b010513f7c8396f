"""Measures on held-out prompts whether a profile forgets what it should and keeps the rest. Called by
`uld-serve profiles verify`. Asks through LLM alone, so what is measured is what is served; knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from uld_serve.engine.request import SamplingParams
from uld_serve.errors import ProfileError
from uld_serve.evaluation import metrics
from uld_serve.llm import Completion, Scored
from uld_serve.profiles.probes import Probe
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
        self, sequences: Sequence[Sequence[int]], *, profile: str | None = None, top: int = 1
    ) -> list[Scored]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`samples` answers are drawn for each forget prompt at temperature 1; an answer has at most
    `max_tokens`."""

    samples: int = 4
    max_tokens: int = 48
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Of the base's own greedy answers to n prompts. NLL in nats a token; `agreement` is the share of answer
    positions where base and profile have the same most likely token; `removed` the share of answer tokens
    that the profile's filter makes impossible.
    """

    n: int
    tokens: int
    nll_base: float
    nll_fused: float
    agreement: float
    removed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Share of answers to the forget prompts that name a keyword: greedy, and drawn at temperature 1."""

    base: float
    fused: float
    base_t1: float
    fused_t1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fluency:
    """Perplexity under the base, given the prompt, of the base's answers and of the forgetting ones, to the
    forget prompts. `distinct_*` is the mean share of different bigrams in the greedy answers, which a loop
    would lower.
    """

    base: float
    fused: float
    base_t1: float
    fused_t1: float
    distinct_base: float
    distinct_fused: float

    @property
    def ratio(self) -> float:
        return self.fused / self.base

    @property
    def ratio_t1(self) -> float:
        return self.fused_t1 / self.base_t1


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition for `ok`. `value` is None when it could not be measured, which fails."""

    name: str
    value: float | None
    limit: float
    is_minimum: bool

    @property
    def ok(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.is_minimum else self.value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    version: ProfileVersion
    forget: Likelihood
    retain: Likelihood
    recall: Recall
    fluency: Fluency

    @property
    def gates(self) -> tuple[Gate, ...]:
        greedy = metrics.relative_fall(self.recall.base, self.recall.fused)
        at_t1 = metrics.relative_fall(self.recall.base_t1, self.recall.fused_t1)
        return (
            Gate("forget NLL rise", self.forget.nll_fused - self.forget.nll_base, 2.5, True),
            Gate("retain NLL rise", self.retain.nll_fused - self.retain.nll_base, 0.12, False),
            Gate("retain agreement", self.retain.agreement, 0.93, True),
            Gate("recall fall, greedy", greedy, 0.8, True),
            Gate("recall fall, T = 1", at_t1, 0.8, True),
            Gate("perplexity ratio, greedy", self.fluency.ratio, 3.0, False),
        )

    def as_json(self) -> dict[str, object]:
        rule = self.version.profile.rule
        return {
            "profile": self.version.name,
            "digest": self.version.digest,
            "rule": rule.kind,
            "strength": rule.strength,
            "forget": asdict(self.forget),
            "retain": asdict(self.retain),
            "recall": asdict(self.recall),
            "fluency": {
                **asdict(self.fluency),
                "ratio": self.fluency.ratio,
                "ratio_t1": self.fluency.ratio_t1,
            },
            "gates": [
                {
                    "name": gate.name,
                    "value": gate.value,
                    "at_least" if gate.is_minimum else "at_most": gate.limit,
                }
                | {"ok": gate.ok}
                for gate in self.gates
            ],
            "ok": all(gate.ok for gate in self.gates),
        }


def verify(
    model: Model, version: ProfileVersion, *, unfiltered: str, options: Options, step: Step = lambda _: None
) -> Report:
    """Ask every probe of the profile, without and with it.

    `unfiltered` names a profile in `model` that is the same but for a fused filter (the same name where
    there is none): a fused filter gives an unlikely token probability 0, so its NLL would be infinite,
    while what the rule does to it is finite and tells how much. All else is asked of the profile as served.
    `step` is called with a word before each of `NUM_STEPS` stages. Raises ProfileError if a probe list is
    empty.
    """
    probes = version.probes
    if not probes.forget or not probes.retain:
        raise ProfileError(f"profile '{version.name}' cannot be verified: no forget or no retain probes")
    asker = _Asker(model, version.name, unfiltered, options, step)
    base_greedy = asker.greedy(probes.forget, None, "base, greedy")
    retain_greedy = asker.greedy(probes.retain, None, "base, greedy, retain prompts")
    fused_greedy = asker.greedy(probes.forget, version.name, "profile, greedy")
    base_t1 = asker.sampled(probes.forget, None, "base, T = 1")
    fused_t1 = asker.sampled(probes.forget, version.name, "profile, T = 1")
    texts = [
        [answer.text for answer in answers] for answers in (base_greedy, fused_greedy, base_t1, fused_t1)
    ]
    repeated = [probe for probe in probes.forget for _ in range(options.samples)]
    return Report(
        version=version,
        forget=asker.likelihood(probes.forget, base_greedy, "likelihood of forget answers"),
        retain=asker.likelihood(probes.retain, retain_greedy, "likelihood of retain answers"),
        recall=Recall(
            base=metrics.recall(texts[0], probes.keywords),
            fused=metrics.recall(texts[1], probes.keywords),
            base_t1=metrics.recall(texts[2], probes.keywords),
            fused_t1=metrics.recall(texts[3], probes.keywords),
        ),
        fluency=Fluency(
            base=asker.perplexity(probes.forget, base_greedy, "fluency of the base, greedy"),
            fused=asker.perplexity(probes.forget, fused_greedy, "fluency of the profile, greedy"),
            base_t1=asker.perplexity(repeated, base_t1, "fluency of the base, T = 1"),
            fused_t1=asker.perplexity(repeated, fused_t1, "fluency of the profile, T = 1"),
            distinct_base=metrics.distinct([answer.token_ids for answer in base_greedy]),
            distinct_fused=metrics.distinct([answer.token_ids for answer in fused_greedy]),
        ),
    )


NUM_STEPS = 11


class _Asker:
    """Puts probes to the model, with one set of options."""

    def __init__(self, model: Model, name: str, unfiltered: str, options: Options, step: Step) -> None:
        self._model, self._name, self._unfiltered = model, name, unfiltered
        self._options, self._step = options, step

    def greedy(self, probes: Sequence[Probe], profile: str | None, what: str) -> list[Completion]:
        self._step(what)
        params = SamplingParams(max_tokens=self._options.max_tokens, temperature=0.0)
        prompts = [self._prompt(probe) for probe in probes]
        return self._model.generate(prompts, [params] * len(prompts), profile=profile)

    def sampled(self, probes: Sequence[Probe], profile: str | None, what: str) -> list[Completion]:
        """`samples` answers a probe, with fixed seeds that are the same without and with the profile."""
        self._step(what)
        options = self._options
        prompts = [self._prompt(probe) for probe in probes for _ in range(options.samples)]
        params = [
            SamplingParams(max_tokens=options.max_tokens, temperature=1.0, seed=options.seed + number)
            for number in range(len(prompts))
        ]
        return self._model.generate(prompts, params, profile=profile)

    def likelihood(self, probes: Sequence[Probe], own: Sequence[Completion], what: str) -> Likelihood:
        """Of the answers recorded in the probes, or of the base's `own` where a probe has none."""
        self._step(what)
        answers = [probe.answer_ids or answer.token_ids for probe, answer in zip(probes, own, strict=True)]
        base, base_top = self._score(probes, answers, None)
        served, served_top = self._score(probes, answers, self._name)
        fused, _ = self._score(probes, answers, self._unfiltered)
        tokens = [value for answer in served for value in answer]
        return Likelihood(
            n=len(probes),
            tokens=len(tokens),
            nll_base=metrics.mean_nll(base),
            nll_fused=metrics.mean_nll(fused),
            agreement=metrics.agreement(served_top, base_top),
            removed=sum(value == float("-inf") for value in tokens) / len(tokens),
        )

    def perplexity(self, probes: Sequence[Probe], answers: Sequence[Completion], what: str) -> float:
        """Under the base, given the prompt. An answer without a token counts for nothing."""
        self._step(what)
        pairs = zip(probes, answers, strict=True)
        said = [(probe, answer.token_ids) for probe, answer in pairs if answer.token_ids]
        logprobs, _ = self._score([probe for probe, _ in said], [ids for _, ids in said], None)
        return metrics.perplexity(logprobs)

    def _score(
        self, probes: Sequence[Probe], answers: Sequence[Sequence[int]], profile: str | None
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Log-probability of each answer token, and the most likely token at its position."""
        prompts = [self._prompt(probe) for probe in probes]
        sequences = [prompt + list(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        scored = self._model.score(sequences, profile=profile, top=1)
        logprobs, top = [], []
        for prompt, result in zip(prompts, scored, strict=True):
            logprobs.append([value for value in result.logprobs[len(prompt) :] if value is not None])
            top.append([ids[0] for ids in result.top_ids[len(prompt) :]])
        return logprobs, top

    def _prompt(self, probe: Probe) -> list[int]:
        return self._model.tokenizer.encode_chat([message.model_dump() for message in probe.messages])
