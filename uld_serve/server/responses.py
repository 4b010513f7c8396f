"""The answers' shapes, as clients parse them and as /openapi.json shows them. A field that is not set is left out;
one that is set to None is written as null. Knows no engine."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel
from starlette.responses import Response

FinishReason = Literal["stop", "length"]


class Shape(BaseModel):
    def json_bytes(self) -> bytes:
        return self.model_dump_json(exclude_unset=True).encode()


class ForgetEntry(Shape):
    name: str
    digest: str
    rule: str
    strength: float


class Forget(Shape):
    """The receipt: what the sampler applied, not what the request asked for."""

    profiles: list[ForgetEntry]
    engine: str


class UsageBody(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Shape):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class CompletionResponse(Shape):
    """A completion, and each chunk of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None
    forget: Forget | None = None


class TopLogprob(Shape):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Shape):
    content: list[ChatLogprob]
    refusal: None


class AnswerMessage(Shape):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Shape):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class ChatResponse(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    forget: Forget
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChatDelta(Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Shape):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class ChatChunk(Shape):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageBody | None = None
    forget: Forget | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ModelCard(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard]


class ForgetProfileCard(Shape):
    """`is_mandatory`: added to every request of this key, named or not."""

    name: str
    object: Literal["forget_profile"]
    digest: str
    method: str
    rule: str
    strength: float
    model: str
    is_mandatory: bool


class KeyViews(Shape):
    """What the asking key may see beside its profiles."""

    allow_base: bool
    logprobs: bool


class ForgetProfileList(Shape):
    object: Literal["list"]
    data: list[ForgetProfileCard]
    key: KeyViews


class TokenizeResponse(Shape):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(Shape):
    text: str


class Status(Shape):
    status: str


class Version(Shape):
    version: str


class ErrorDetail(Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Shape):
    error: ErrorDetail


# Of every route, for the OpenAPI document.
ERRORS: dict[int | str, dict[str, object]] = {
    code: {"model": ErrorResponse} for code in (400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503)
}


def json_response(body: Shape, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body.json_bytes(), status_code=status, headers=headers, media_type="application/json")
