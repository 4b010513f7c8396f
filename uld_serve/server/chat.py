"""POST /v1/chat/completions: messages in, an assistant's message out, whole or streamed. Knows OpenAI's shape; the
Decision came with `admitted`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import Depends, FastAPI
from starlette.responses import Response

from uld_serve.engine.request import Delta
from uld_serve.server.admission import HEADER, Admit, Admitted
from uld_serve.server.generation import Answer, Choice, Generation, finish_reason
from uld_serve.server.logprobs import chat_logprobs, prompt_logprobs
from uld_serve.server.protocol import ChatRequest
from uld_serve.server.receipts import forget_body, usage_body
from uld_serve.server.responses import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatResponse,
    json_response,
)
from uld_serve.server.sampling import chat_choices
from uld_serve.server.sse import EventStream

ADMIT = Admit(ChatRequest, id_prefix="chatcmpl")


def add_routes(app: FastAPI) -> None:
    app.add_api_route(
        "/v1/chat/completions", create_chat_completion, methods=["POST"], response_model=ChatResponse
    )


async def create_chat_completion(admitted: Annotated[Admitted[ChatRequest], Depends(ADMIT)]) -> Response:
    """Answers a conversation, whole or streamed. Every answer says what was forgotten in it."""
    choices = await chat_choices(admitted.request, admitted.catalog)
    generation = await admitted.start(choices, n=admitted.request.n or 1)
    headers = {HEADER: generation.receipt.header, "X-Request-Id": admitted.id}
    if admitted.request.is_stream:
        return EventStream(_events(admitted, generation, choices[0]), source=generation, headers=headers)
    async with aclosing(generation):
        answers = await admitted.answers(generation)
    body = _whole(admitted, generation, answers)
    if admitted.request.return_token_ids:
        body.prompt_token_ids = choices[0].prompt.token_ids
    return json_response(body, headers=headers)


def _whole(admitted: Admitted[ChatRequest], generation: Generation, answers: list[Answer]) -> ChatResponse:
    body = ChatResponse(
        id=admitted.id,
        object="chat.completion",
        created=admitted.created,
        model=admitted.request.model,
        choices=[_choice(admitted, index, answer) for index, answer in enumerate(answers)],
        usage=usage_body(generation.totals),
        forget=forget_body(generation.receipt),
    )
    if admitted.request.prompt_logprobs is not None:
        body.prompt_logprobs = prompt_logprobs(
            answers[0].prompt_logprobs, top=admitted.request.prompt_logprobs
        )
    return body


def _choice(admitted: Admitted[ChatRequest], index: int, answer: Answer) -> ChatChoice:
    request, tokenizer = admitted.request, admitted.catalog.tokenizer
    choice = ChatChoice(
        index=index,
        message=AnswerMessage(role="assistant", content=answer.text, refusal=None),
        logprobs=chat_logprobs(answer.logprobs, tokenizer, top=request.top_logprobs or 0)
        if request.logprobs
        else None,
        finish_reason=answer.finish_reason,
    )
    if request.return_token_ids:
        choice.token_ids = answer.token_ids
    return choice


async def _events(
    admitted: Admitted[ChatRequest], generation: Generation, first: Choice
) -> AsyncGenerator[bytes, None]:
    request, begun, is_first = admitted.request, set[int](), True
    async with aclosing(admitted.deltas(generation)) as deltas:
        async for index, delta in deltas:
            if index not in begun:
                begun.add(index)
                opening = _chunk(admitted, generation, [_role_choice(index)])
                if is_first:
                    opening.forget, is_first = forget_body(generation.receipt), False
                    if request.return_token_ids:
                        opening.prompt_token_ids = first.prompt.token_ids
                if index == 0 and request.prompt_logprobs is not None:
                    opening.prompt_logprobs = prompt_logprobs(
                        delta.prompt_logprobs or (), top=request.prompt_logprobs
                    )
                yield opening.json_bytes()
            if (choice := _chunk_choice(admitted, index, delta)) is not None:
                yield _chunk(admitted, generation, [choice]).json_bytes()
    if request.wants_usage:
        last = _chunk(admitted, generation, [])
        last.usage = usage_body(generation.totals)
        yield last.json_bytes()


def _chunk(
    admitted: Admitted[ChatRequest], generation: Generation, choices: list[ChatChunkChoice]
) -> ChatChunk:
    request = admitted.request
    chunk = ChatChunk(
        id=admitted.id,
        object="chat.completion.chunk",
        created=admitted.created,
        model=request.model,
        choices=choices,
    )
    if request.wants_usage:
        chunk.usage = None
    if request.wants_continuous_usage:
        chunk.usage = usage_body(generation.totals)
    return chunk


def _role_choice(index: int) -> ChatChunkChoice:
    return ChatChunkChoice(
        index=index, delta=ChatDelta(role="assistant", content=""), logprobs=None, finish_reason=None
    )


def _chunk_choice(admitted: Admitted[ChatRequest], index: int, delta: Delta) -> ChatChunkChoice | None:
    """None when there is nothing to tell yet: text is held back until it is certain."""
    request, reason = admitted.request, finish_reason(delta)
    logprobs = None
    if request.logprobs and delta.logprobs:
        logprobs = chat_logprobs(delta.logprobs, admitted.catalog.tokenizer, top=request.top_logprobs or 0)
    has_ids = bool(request.return_token_ids and delta.token_ids)
    if not (delta.text or reason or logprobs or has_ids):
        return None
    content = ChatDelta(content=delta.text) if delta.text or logprobs else ChatDelta()
    choice = ChatChunkChoice(index=index, delta=content, logprobs=logprobs, finish_reason=reason)
    if has_ids:
        choice.token_ids = list(delta.token_ids)
    return choice
