"""The questions a profile carries to be checked with: probes.json. Read by store, replayed by the engine
at load, asked by evaluation.verify. Knows nothing of models or of how an answer is judged.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=4096)]

_FROZEN = ConfigDict(
    frozen=True,
    extra="forbid",
    allow_inf_nan=False,
    serialize_by_alias=True,
    validate_by_name=True,
    validate_by_alias=True,
)


class Message(BaseModel):
    """One chat message; only text."""

    model_config = _FROZEN

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1, max_length=8192)]


class Probe(BaseModel):
    """A held-out prompt. `answer_ids` is the base's own greedy answer where training recorded it.

    `form` says what kind of prompt it is ("question", "completion", "story", ...), for reports by kind.
    """

    model_config = _FROZEN

    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=32)]
    answer_ids: TokenIds | None = None
    form: Annotated[str, Field(min_length=1, max_length=64)]


class ReplayProbe(BaseModel):
    """A prompt and an answer with the mean negative log-likelihood per answer token, in nats.

    Training measured it under the base and under the profile. The engine computes `nll_fused` again at load
    and refuses the profile if it is off.
    """

    model_config = _FROZEN

    prompt_ids: TokenIds
    answer_ids: TokenIds
    nll_base: Annotated[float, Field(ge=0)]
    nll_fused: Annotated[float, Field(ge=0)]


class Probes(BaseModel):
    """probes.json. `keywords` are the words whose appearance in an answer means that it still tells."""

    model_config = _FROZEN

    schema_version: Literal[1] = Field(default=1, alias="schema")
    keywords: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(max_length=1024)
    ] = ()
    forget: Annotated[tuple[Probe, ...], Field(max_length=4096)] = ()
    retain: Annotated[tuple[Probe, ...], Field(max_length=4096)] = ()
    replay: Annotated[tuple[ReplayProbe, ...], Field(max_length=256)] = ()

    @model_validator(mode="after")
    def _forget_probes_need_keywords(self) -> Self:
        if self.forget and not self.keywords:
            raise ValueError("forget probes need keywords to judge their answers by")
        return self

    def max_token_id(self) -> int:
        """The largest token id that any probe mentions; -1 if there is none."""
        answers = [probe.answer_ids or () for probe in self.forget + self.retain]
        replayed = [probe.prompt_ids + probe.answer_ids for probe in self.replay]
        return max((max(ids) for ids in answers + replayed if ids), default=-1)
