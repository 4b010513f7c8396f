"""A model whose answers without a profile are made once: several profiles with the same probes have the same base
beside them. Called by `uld-serve profiles verify`."""

from __future__ import annotations

from collections.abc import Sequence

from uld_serve.engine.request import SamplingParams
from uld_serve.evaluation.verify import Encoder, Model
from uld_serve.llm import Completion, Scored

Ids = tuple[tuple[int, ...], ...]
Starts = tuple[int, ...] | None


class Remembering:
    """As the model that it wraps; what was asked without a profile is not asked again. Sound because an answer hangs on
    its prompt, its parameters and its seed alone."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._generated: dict[tuple[Ids, str], list[Completion]] = {}
        self._scored: dict[tuple[Ids, Starts, int], list[Scored]] = {}

    @property
    def tokenizer(self) -> Encoder:
        return self._model.tokenizer

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], *, profile: str | None = None
    ) -> list[Completion]:
        if profile is not None:
            return self._model.generate(prompts, params, profile=profile)
        key = (_frozen(prompts), repr(list(params)))
        if key not in self._generated:
            self._generated[key] = self._model.generate(prompts, params)
        return self._generated[key]

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        profile: str | None = None,
        starts: Sequence[int] | None = None,
        top: int = 1,
    ) -> list[Scored]:
        if profile is not None:
            return self._model.score(sequences, profile=profile, starts=starts, top=top)
        key = (_frozen(sequences), None if starts is None else tuple(starts), top)
        if key not in self._scored:
            self._scored[key] = self._model.score(sequences, starts=starts, top=top)
        return self._scored[key]


def _frozen(sequences: Sequence[Sequence[int]]) -> Ids:
    return tuple(tuple(sequence) for sequence in sequences)
