"""One request and its answer for every route, as /openapi.json and docs/api.md show them. Tests hold them against the
models that parse and write them."""

from __future__ import annotations

from pydantic import JsonValue

from uld_serve.server.example import CREATED, DIGEST, MODEL, Example
from uld_serve.server.fine_tuning.examples import FINE_TUNING

FORGET: JsonValue = {
    "profiles": [
        {"name": "harry-potter", "digest": DIGEST, "rule": "relu_difference", "strength": 4.0},
    ],
    "engine": "0.1.0",
}
USAGE: JsonValue = {"prompt_tokens": 37, "completion_tokens": 9, "total_tokens": 46}
BASE_CARD: JsonValue = {
    "id": MODEL,
    "object": "model",
    "created": CREATED,
    "owned_by": "uld-serve",
    "parent": None,
}
PROFILE_CARD: JsonValue = {
    "id": f"{MODEL}:harry-potter",
    "object": "model",
    "created": CREATED,
    "owned_by": "uld-serve",
    "parent": MODEL,
}
QUESTION: JsonValue = [{"role": "user", "content": "What is the name of Harry Potter's school?"}]
SCHEMA: JsonValue = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


def _chat_event(delta: JsonValue, finish: str | None, **more: JsonValue) -> JsonValue:
    return {
        "id": "chatcmpl-8d0c",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": f"{MODEL}:harry-potter",
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
        **more,
    }


def _text_event(text: str, finish: str | None, **more: JsonValue) -> JsonValue:
    return {
        "id": "cmpl-41f7",
        "object": "text_completion",
        "created": CREATED,
        "model": MODEL,
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}],
        **more,
    }


EXAMPLES: dict[str, Example] = {
    "POST /v1/chat/completions": Example(
        requests={
            "forget, chosen by the model's name": {
                "model": f"{MODEL}:harry-potter",
                "messages": QUESTION,
                "max_tokens": 48,
                "temperature": 0,
            },
            "forget, chosen by a field, and streamed": {
                "model": MODEL,
                "messages": QUESTION,
                "forget_profile": ["harry-potter"],
                "forget_strength": 1.5,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            "an answer that keeps to a JSON schema": {
                "model": MODEL,
                "messages": [{"role": "user", "content": "Name a large city, as JSON."}],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "city", "strict": True, "schema": SCHEMA},
                },
            },
        },
        answer={
            "id": "chatcmpl-8d0c",
            "object": "chat.completion",
            "created": CREATED,
            "model": f"{MODEL}:harry-potter",
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": "I do not know that school.",
                        "refusal": None,
                    },
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": USAGE,
            "forget": FORGET,
        },
        events=(
            _chat_event({"role": "assistant", "content": ""}, None, forget=FORGET),
            _chat_event({"content": "I do not know"}, None),
            _chat_event({"content": " that school."}, "stop"),
        ),
    ),
    "POST /v1/completions": Example(
        requests={
            "two prompts": {"model": MODEL, "prompt": ["The sea is", "A railway is"], "max_tokens": 4},
            "scores of a prompt, as evaluation harnesses ask for them": {
                "model": f"{MODEL}:harry-potter",
                "prompt": [504, 3409, 314, 5719],
                "max_tokens": 0,
                "echo": True,
                "logprobs": 1,
            },
        },
        answer=_text_event(
            " calm and blue.", "stop", usage=USAGE, forget={"profiles": [], "engine": "0.1.0"}
        ),
        events=(
            _text_event(" calm and", None, forget={"profiles": [], "engine": "0.1.0"}),
            _text_event(" blue.", "stop"),
        ),
    ),
    "POST /v1/tokenize": Example(
        requests={
            "a text": {"model": MODEL, "prompt": "The sea is calm."},
            "a conversation": {"model": MODEL, "messages": QUESTION},
        },
        answer={"tokens": [504, 3409, 314, 5719, 30], "count": 5, "max_model_len": 8192},
    ),
    "POST /v1/detokenize": Example(
        requests={"token ids": {"model": MODEL, "tokens": [504, 3409, 314, 5719, 30]}},
        answer={"text": "The sea is calm."},
    ),
    "GET /v1/models": Example(answer={"object": "list", "data": [BASE_CARD, PROFILE_CARD]}),
    "GET /v1/models/{model_id}": Example(answer=PROFILE_CARD),
    "GET /v1/forget_profiles": Example(
        answer={
            "object": "list",
            "data": [
                {
                    "name": "harry-potter",
                    "object": "forget_profile",
                    "digest": DIGEST,
                    "method": "margin",
                    "rule": "relu_difference",
                    "strength": 4.0,
                    "model": f"{MODEL}:harry-potter",
                    "is_mandatory": False,
                }
            ],
            "key": {"allow_base": True, "logprobs": True},
        }
    ),
    **FINE_TUNING,
    "GET /health": Example(answer={"status": "ok"}),
    "GET /ready": Example(answer={"status": "ready"}),
    "GET /version": Example(answer={"version": "0.1.0"}),
    "GET /": Example(answer="<!doctype html>…", media="text/html"),
}

ERROR_EXAMPLE: JsonValue = {
    "error": {
        "message": "temperature must be less than or equal to 2",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": None,
    }
}
