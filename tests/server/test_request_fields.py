"""Every field of a request reaches the engine, or is refused by its name. A field added to the models without a row
here fails."""

from __future__ import annotations

import pytest
from live_server import MODEL, LiveServer

from uld_serve.server.protocol import REFUSED, ChatRequest, CompletionRequest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
REQUIRED = {COMPLETIONS: {"prompt": "Hi"}, CHAT: {"messages": [{"role": "user", "content": "Hi"}]}}

# field, a value that is not the default, the SamplingParams that it must become
SAMPLING: list[tuple[str, object, dict[str, object]]] = [
    ("max_tokens", 5, {"max_tokens": 5}),
    ("temperature", 0, {"temperature": 0.0}),
    ("temperature", 1.5, {"temperature": 1.5}),
    ("top_p", 0.5, {"top_p": 0.5}),
    ("top_k", 7, {"top_k": 7}),
    ("top_k", -1, {"top_k": 0}),
    ("min_p", 0.25, {"min_p": 0.25}),
    ("seed", 2**62, {"seed": 2**62}),
    ("stop", "x", {"stop": ("x",)}),
    ("stop", ["x", "yy"], {"stop": ("x", "yy")}),
    ("stop_token_ids", [3, 4], {"stop_token_ids": (3, 4)}),
    ("presence_penalty", -1.5, {"presence_penalty": -1.5}),
    ("frequency_penalty", 1.5, {"frequency_penalty": 1.5}),
    ("repetition_penalty", 1.25, {"repetition_penalty": 1.25}),
    ("logit_bias", {"7": -100, "8": 2.5}, {"logit_bias": {7: -100.0, 8: 2.5}}),
    ("min_tokens", 3, {"min_tokens": 3}),
    ("ignore_eos", True, {"ignore_eos": True}),
    ("prompt_logprobs", 3, {"prompt_logprobs": 3}),
]
COMPLETION_ONLY: list[tuple[str, object, dict[str, object]]] = [("logprobs", 4, {"logprobs": 4})]
OBJECT = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"const": "é"}}}
CHAT_ONLY: list[tuple[str, object, dict[str, object]]] = [
    ("response_format", {"type": "text"}, {"json_schema": None}),
    ("response_format", {"type": "json_object"}, {"json_schema": '{"type":"object"}'}),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": OBJECT}},
        {"json_schema": '{"type":"object","properties":{"b":{"type":"null"},"a":{"const":"é"}}}'},
    ),
]
# Tested by what the answer looks like, here or in the other files.
BY_ANSWER = {
    "model",
    "forget_profile",
    "forget_strength",
    "n",
    "stream",
    "stream_options",
    "return_token_ids",
    "user",
}
COMPLETION_BY_ANSWER = {"prompt", "echo"}
CHAT_BY_ANSWER = {"messages", "max_completion_tokens", "logprobs", "top_logprobs"}


def test_every_field_has_a_test() -> None:
    sampled = {name for name, _, _ in SAMPLING}
    assert set(CompletionRequest.model_fields) == sampled | {"logprobs"} | BY_ANSWER | COMPLETION_BY_ANSWER
    assert set(ChatRequest.model_fields) == sampled | {"response_format"} | BY_ANSWER | CHAT_BY_ANSWER


@pytest.mark.parametrize(
    ("path", "field", "value", "expected"),
    [(path, *row) for path in (COMPLETIONS, CHAT) for row in SAMPLING]
    + [(COMPLETIONS, *row) for row in COMPLETION_ONLY]
    + [(CHAT, *row) for row in CHAT_ONLY],
)
def test_field_reaches_the_engine(
    server: LiveServer, path: str, field: str, value: object, expected: dict[str, object]
) -> None:
    response = server.post(path, {"model": MODEL, **REQUIRED[path], field: value})
    assert response.status_code == 200, response.text
    params = server.engine.calls[-1].params
    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_null_means_the_default(server: LiveServer, path: str) -> None:
    plain = {"model": MODEL, **REQUIRED[path], "seed": 1}
    nullable = [name for name, _, _ in SAMPLING if name != "seed"] + [
        "n",
        "stream",
        "stream_options",
        "return_token_ids",
        "user",
    ]
    assert server.post(path, plain).status_code == 200
    assert server.post(path, plain | dict.fromkeys(nullable)).status_code == 200
    assert server.engine.calls[0].params == server.engine.calls[1].params


@pytest.mark.parametrize(
    ("path", "field"),
    [(COMPLETIONS, name) for name in REFUSED[CompletionRequest]]
    + [(CHAT, name) for name in REFUSED[ChatRequest]],
)
def test_unsupported_field_is_refused_by_name(server: LiveServer, path: str, field: str) -> None:
    response = server.post(path, {"model": MODEL, **REQUIRED[path], field: {"type": "json_object"}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert response.json()["error"]["code"] == "unsupported_parameter"
    assert server.engine.calls == []
    assert server.post(path, {"model": MODEL, **REQUIRED[path], field: None}).status_code == 200


def test_values_that_ask_for_nothing_are_let_through(server: LiveServer) -> None:
    harmless = {"tools": [], "tool_choice": "none", "store": False}
    assert server.post(CHAT, {"model": MODEL, **REQUIRED[CHAT], **harmless}).status_code == 200
    assert server.post(CHAT, {"model": MODEL, **REQUIRED[CHAT], "store": 0}).status_code == 400


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("forget_profiles", "forget_profile"),
        ("forgetprofile", "forget_profile"),
        ("temprature", "temperature"),
    ],
)
def test_misspelt_field_is_refused_with_a_hint(server: LiveServer, field: str, hint: str) -> None:
    error = server.post(COMPLETIONS, {"model": MODEL, "prompt": "Hi", field: "acme"}).json()["error"]
    assert error["param"] == field
    assert error["code"] == "unknown_parameter"
    assert f"did you mean {hint}?" in error["message"]
    assert server.engine.calls == []


TOO_MANY = {str(i): 1 for i in range(301)}
BAD: list[tuple[str, str, object]] = [
    *(
        (path, field, value)
        for path in (COMPLETIONS, CHAT)
        for field, values in {
            "max_tokens": [-1, 1.5, "5", True, 2**31],
            "temperature": [-0.1, 2.1, "1", True],
            "top_p": [0, 1.1],
            "top_k": [-2, 1.0],
            "min_p": [-0.1, 1.1],
            "n": [0, 129, True],
            "seed": [-1, 2**63, 0.5],
            "stop": ["", ["a"] * 5, "x" * 65, [1], 3],
            "stop_token_ids": [[0] * 65, ["1"]],
            "presence_penalty": [2.1],
            "frequency_penalty": [-2.1],
            "repetition_penalty": [0, 11],
            "logit_bias": [
                {"a": 1},
                {"07": 1},
                {"-1": 1},
                {"1": 101},
                {"1": True},
                {"1": "1"},
                [1],
                {"²": 1},
                TOO_MANY,
            ],
            "min_tokens": [-1],
            "ignore_eos": [1, "true"],
            "prompt_logprobs": [-1, 21],
            "stream": ["yes", 1],
            "return_token_ids": ["yes", 1],
            "stream_options": [True, {"include_usage": True}],
            "user": ["x" * 257, 5],
            "forget_strength": [-0.1, 2.1, 1],
            "model": [None, 5, "x" * 2049],
        }.items()
        for value in values
    ),
    *(
        (COMPLETIONS, "prompt", value)
        for value in (None, [], [[]], [1, "a"], [True], [1.0], {"a": 1}, [[1], "a"])
    ),
    *((COMPLETIONS, "logprobs", value) for value in (-1, 6, True)),
    (COMPLETIONS, "echo", 1),
    *((CHAT, "messages", value) for value in ([], None, "Hi", [{"role": "user", "content": "x"}] * 257)),
    (CHAT, "max_completion_tokens", 0),
    (CHAT, "top_logprobs", 3),
    *(
        (CHAT, "response_format", value)
        for value in (
            "json_object",
            {},
            {"type": "xml"},
            {"type": "json_schema"},
            {"type": "json_object", "json_schema": {"name": "n", "schema": {}}},
            {"type": "json_schema", "json_schema": {"name": "n"}},
            {"type": "json_schema", "json_schema": {"schema": {}}},
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": True}},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": "yes"}},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "lax": 1}},
        )
    ),
]


@pytest.mark.parametrize(("path", "field", "value"), BAD)
def test_bad_value_is_400_and_names_the_field(
    server: LiveServer, path: str, field: str, value: object
) -> None:
    response = server.post(path, {"model": MODEL, **REQUIRED[path], field: value})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].split(".")[0].split("[")[0] == field
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert server.engine.calls == []


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content",
        ),
        ({"role": "user", "content": "x", "name": "bob"}, "messages.name"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages.tool_calls"),
        ({"role": "user", "content": "x", "colour": "red"}, "messages[0].colour"),
    ],
)
def test_bad_message_is_400_and_says_where(
    server: LiveServer, message: dict[str, object], param: str
) -> None:
    response = server.post(CHAT, {"model": MODEL, "messages": [message]})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


def test_limits_that_disagree_are_400(server: LiveServer) -> None:
    body = {"model": MODEL, **REQUIRED[CHAT], "max_tokens": 3, "max_completion_tokens": 4}
    assert server.post(CHAT, body).json()["error"]["param"] == "max_completion_tokens"


def test_too_many_choices_are_400(server: LiveServer) -> None:
    response = server.post(COMPLETIONS, {"model": MODEL, "prompt": ["a"] * 65, "n": 2})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"


def test_error_never_repeats_a_value(server: LiveServer) -> None:
    response = server.post(COMPLETIONS, {"model": MODEL, "prompt": "Hi", "temperature": "xyzzy-secret"})
    assert "xyzzy" not in response.text
