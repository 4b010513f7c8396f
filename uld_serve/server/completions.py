"""POST /v1/completions: prompts in, texts out, whole or streamed. Knows OpenAI's shape; the Decision came with
`admitted`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import Depends, FastAPI
from starlette.responses import Response

from uld_serve.engine.request import Delta
from uld_serve.engine.tokenizer import Tokenizer
from uld_serve.server.admission import HEADER, Admit, Admitted
from uld_serve.server.generation import Answer, Choice, Generation, Prompt, finish_reason
from uld_serve.server.logprobs import CompletionLogprobRows, joined, prompt_logprobs
from uld_serve.server.protocol import CompletionRequest
from uld_serve.server.receipts import forget_body, usage_body
from uld_serve.server.responses import CompletionChoice, CompletionLogprobs, CompletionResponse, json_response
from uld_serve.server.sampling import completion_choices
from uld_serve.server.sse import EventStream

ADMIT = Admit(CompletionRequest, id_prefix="cmpl")


def add_routes(app: FastAPI) -> None:
    app.add_api_route(
        "/v1/completions", create_completion, methods=["POST"], response_model=CompletionResponse
    )


async def create_completion(admitted: Annotated[Admitted[CompletionRequest], Depends(ADMIT)]) -> Response:
    """Goes on from texts or token ids, whole or streamed. Every answer says what was forgotten in it."""
    choices = await completion_choices(admitted.request, admitted.catalog)
    generation = await admitted.start(choices, n=admitted.request.n or 1)
    writers = [_Writer(admitted, choice, index) for index, choice in enumerate(choices)]
    headers = {HEADER: generation.receipt.header, "X-Request-Id": admitted.id}
    if admitted.request.is_stream:
        return EventStream(_events(admitted, generation, writers), source=generation, headers=headers)
    async with aclosing(generation):
        answers = await admitted.answers(generation)
    body = _body(admitted)
    body.choices = [writer.whole(answer) for writer, answer in zip(writers, answers, strict=True)]
    body.usage = usage_body(generation.totals)
    body.forget = forget_body(generation.receipt)
    return json_response(body, headers=headers)


async def _events(
    admitted: Admitted[CompletionRequest], generation: Generation, writers: list[_Writer]
) -> AsyncGenerator[bytes, None]:
    request, is_first = admitted.request, True
    async with aclosing(admitted.deltas(generation)) as deltas:
        async for index, delta in deltas:
            choice = writers[index].chunk(delta, must_write=is_first)
            if choice is None:
                continue
            body = _body(admitted)
            body.choices = [choice]
            if request.wants_usage:
                body.usage = None
            if request.wants_continuous_usage:
                body.usage = usage_body(generation.totals)
            if is_first:
                body.forget, is_first = forget_body(generation.receipt), False
            yield body.json_bytes()
    if request.wants_usage:
        last = _body(admitted)
        last.usage = usage_body(generation.totals)
        yield last.json_bytes()


def _body(admitted: Admitted[CompletionRequest]) -> CompletionResponse:
    return CompletionResponse(
        id=admitted.id,
        object="text_completion",
        created=admitted.created,
        model=admitted.request.model,
        choices=[],
    )


class _Writer:
    """One choice as OpenAI writes it: at once, or chunk by chunk."""

    def __init__(self, admitted: Admitted[CompletionRequest], choice: Choice, index: int) -> None:
        request = admitted.request
        self._index = index
        self._prompt_ids = choice.prompt.token_ids
        self._top = request.logprobs
        self._prompt_top = request.prompt_logprobs
        self._has_ids = bool(request.return_token_ids)
        self._rows = CompletionLogprobRows(admitted.catalog.tokenizer, top=request.logprobs or 0)
        self._echo = _echo_text(choice.prompt, admitted.catalog.tokenizer) if request.echo else None
        self._has_begun = False

    def whole(self, answer: Answer) -> CompletionChoice:
        delta = Delta(
            request_id="",
            text=answer.text,
            token_ids=tuple(answer.token_ids),
            logprobs=tuple(answer.logprobs),
            prompt_logprobs=answer.prompt_logprobs,
            finish_reason=answer.finish_reason,
        )
        chunk = self.chunk(delta, must_write=True)
        assert chunk is not None
        return chunk

    def chunk(self, delta: Delta, *, must_write: bool) -> CompletionChoice | None:
        """None when there is nothing to tell yet, as while text is held back until it is certain."""
        is_first, self._has_begun = not self._has_begun, True
        text = (self._echo or "") + delta.text if is_first else delta.text
        reason = finish_reason(delta)
        logprobs = None if self._top is None else self._logprobs(delta, is_first=is_first)
        wants_prompt = self._prompt_top is not None and is_first
        has_more = wants_prompt or (logprobs and logprobs.tokens) or (self._has_ids and delta.token_ids)
        if not (must_write or text or reason or has_more):
            return None
        made = CompletionChoice(index=self._index, text=text, logprobs=logprobs, finish_reason=reason)
        if wants_prompt:
            made.prompt_logprobs = prompt_logprobs(delta.prompt_logprobs or (), top=self._prompt_top or 0)
        if self._has_ids:
            made.token_ids = list(delta.token_ids)
            if is_first:
                made.prompt_token_ids = self._prompt_ids
        return made

    def _logprobs(self, delta: Delta, *, is_first: bool) -> CompletionLogprobs:
        if self._echo is None or not is_first:
            return self._rows.drawn(delta.logprobs or ())
        prompt = self._rows.prompt(self._prompt_ids, delta.prompt_logprobs or ())
        return joined(prompt, self._rows.drawn(delta.logprobs or ()))


def _echo_text(prompt: Prompt, tokenizer: Tokenizer) -> str:
    return (
        tokenizer.decode(prompt.token_ids, skip_special_tokens=False) if prompt.text is None else prompt.text
    )
