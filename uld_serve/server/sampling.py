"""From a request's fields to what the engine runs: prompts as token ids, SamplingParams, choices. Used by completions
and chat. Knows the model's tokenizer and length, no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from uld_serve.engine.request import SamplingParams
from uld_serve.engine.tokenizer import Tokenizer
from uld_serve.errors import InvalidRequest
from uld_serve.server.catalog import Catalog
from uld_serve.server.generation import Choice, Prompt, choices_of
from uld_serve.server.protocol import MAX_CHOICES, ChatRequest, CompletionRequest, GenerationRequest, Message

# Longer texts are encoded beside the event loop, which would stand still meanwhile (1 MiB takes about a second).
LONG_TEXT_CHARS = 4096


async def completion_choices(request: CompletionRequest, catalog: Catalog) -> list[Choice]:
    prompts = await _prompts(request, catalog.tokenizer)
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    if max_tokens == 0 and any(len(prompt.token_ids) == 1 for prompt in prompts):
        # Neither drawn nor scored: there would be no receipt to answer with.
        raise InvalidRequest("max_tokens 0 needs prompts of two tokens or more to score", param="max_tokens")
    asked = [
        n for n in (request.logprobs if request.echo else None, request.prompt_logprobs) if n is not None
    ]
    params = _params(
        request,
        max_tokens=max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=max(asked, default=None),
    )
    return choices_of(prompts, params, n=request.n or 1, seed=request.seed)


async def chat_choices(request: ChatRequest, catalog: Catalog) -> list[Choice]:
    prompt_ids = await encode_chat(catalog.tokenizer, request.messages)
    room = max(
        1, catalog.max_model_len - len(prompt_ids)
    )  # a prompt that leaves none is the engine's to refuse
    params = _params(
        request,
        max_tokens=room if request.limit is None else request.limit,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        json_schema=request.schema_text,
    )
    return choices_of([Prompt(prompt_ids)], params, n=request.n or 1, seed=request.seed)


async def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    if len(text) < LONG_TEXT_CHARS:
        return tokenizer.encode(text)
    return await asyncio.to_thread(tokenizer.encode, text)


async def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Raises InvalidRequest when the model has no chat template."""
    turns = [{"role": message.template_role, "content": message.text} for message in messages]
    if sum(len(turn["content"]) for turn in turns) < LONG_TEXT_CHARS:
        return tokenizer.encode_chat(turns)
    return await asyncio.to_thread(tokenizer.encode_chat, turns)


async def _prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
    given, n = _listed(request), request.n or 1
    if len(given) * n > MAX_CHOICES:
        raise InvalidRequest(f"{len(given)} prompts x n {n} is more than {MAX_CHOICES} choices", param="n")
    return [
        Prompt(await encode(tokenizer, prompt), prompt) if isinstance(prompt, str) else Prompt(prompt)
        for prompt in given
    ]


def _listed(request: CompletionRequest) -> list[str | list[int]]:
    """str | [str] | [int] | [[int]] as a list of prompts."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    token_ids = [item for item in prompt if isinstance(item, int)]
    return [token_ids] if token_ids else [item for item in prompt if not isinstance(item, int)]


def _params(
    request: GenerationRequest,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    json_schema: str | None = None,
) -> SamplingParams:
    """null means the default. The seed is each choice's own, so it is not set here."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        stop=tuple(request.stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias=request.logit_bias,
        min_tokens=request.min_tokens or 0,
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        json_schema=json_schema,
    )
