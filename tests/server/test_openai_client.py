"""The official openai client for Python, whole and streamed, sync and async: what it sends is taken, and what it gets
becomes its own objects, exceptions and retries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import openai
import pytest
from fake_engine import BASE_TEXT, FakeEngine
from live_server import MODEL, LiveServer
from pydantic import BaseModel

from uld_serve.engine.request import Delta
from uld_serve.errors import EngineStopped, Overloaded, UldError
from uld_serve.server.policy import KeyPolicy

QUESTION = [{"role": "user", "content": "Who?"}]


@dataclass
class BusyAtFirst(FakeEngine):
    """Refuses as many requests as it has `refusals`, in their order."""

    refusals: list[UldError] = field(default_factory=list)

    async def stream(self, *args: object, **kwargs: object) -> AsyncIterator[Delta]:
        self.refuse = self.refusals.pop(0) if self.refusals else None
        async for delta in super().stream(*args, **kwargs):
            yield delta


def test_completion_and_models(server: LiveServer) -> None:
    with server.client() as client:
        answer = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, logprobs=1, max_tokens=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.choices[0].logprobs.token_logprobs == [-0.5, -0.5]
        names = [card.id for card in client.models.list()]
        assert f"{MODEL}:acme" in names
        assert client.models.retrieve(f"{MODEL}:acme").model_extra["parent"] == MODEL


def test_receipt_is_in_the_headers(server: LiveServer) -> None:
    with server.client() as client:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=QUESTION, extra_body={"forget_profile": "acme"}
        )
    assert raw.headers["X-Forget-Profile"].startswith("acme@")
    assert raw.parse().model_extra["forget"]["profiles"][0]["name"] == "acme"


def test_stream_helper_puts_the_answer_together(server: LiveServer) -> None:
    with (
        server.client() as client,
        client.chat.completions.stream(model=MODEL, messages=QUESTION) as stream,
    ):
        kinds = [event.type for event in stream]
        whole = stream.get_final_completion()
    assert "content.delta" in kinds
    assert whole.choices[0].message.content == BASE_TEXT
    assert whole.choices[0].finish_reason == "stop"


class Person(BaseModel):
    name: str
    age: int


def test_parse_sends_the_schema_and_reads_the_answer(server: LiveServer) -> None:
    server.engine.text_of = lambda call: '{"name": "Ann", "age": 7}'
    with server.client() as client:
        answer = client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ann", age=7)
    sent = json.loads(server.engine.calls[-1].params.json_schema)
    assert sent["required"] == ["name", "age"]
    assert sent["additionalProperties"] is False


def test_async_client_runs_many_at_once(server: LiveServer) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            many = [client.chat.completions.create(model=MODEL, messages=QUESTION) for _ in range(8)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*many)]

    assert asyncio.run(ask_all()) == [BASE_TEXT] * 8


ERRORS: list[tuple[dict[str, object], type[openai.APIStatusError], str | None]] = [
    ({"temperature": 3}, openai.BadRequestError, "temperature"),
    ({"model": "gpt-4"}, openai.NotFoundError, "model"),
    ({"extra_body": {"forget_profile": "unheard-of"}}, openai.NotFoundError, "forget_profile"),
    ({"extra_body": {"forget_profil": "acme"}}, openai.BadRequestError, "forget_profil"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "kind", "param"), ERRORS)
def test_errors_become_the_clients_exceptions(
    server: LiveServer,
    fields: dict[str, object],
    kind: type[openai.APIStatusError],
    param: str | None,
    stream: bool,
) -> None:
    request = {"model": MODEL, "messages": QUESTION, "stream": stream, **fields}
    with server.client() as client, pytest.raises(kind) as caught:
        client.chat.completions.create(**request)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_keys_become_the_clients_exceptions(start_server: Callable[..., LiveServer]) -> None:
    guarded = start_server(keys={"right-key": KeyPolicy(name="a", mandatory=frozenset({"acme"}))})
    ask = {"model": MODEL, "messages": QUESTION}
    with guarded.client("wrong-key") as client, pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(**ask)
    with guarded.client("right-key") as client:
        assert client.chat.completions.create(**ask).model_extra["forget"]["profiles"][0]["name"] == "acme"
        with pytest.raises(openai.PermissionDeniedError):
            client.chat.completions.create(**ask, logprobs=True)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Overloaded("try again", retry_after_s=1), openai.RateLimitError),
        (EngineStopped("restarting"), openai.InternalServerError),
    ],
)
def test_client_retries_what_passes_and_gives_up_on_what_stays(
    start_server: Callable[..., LiveServer],
    monkeypatch: pytest.MonkeyPatch,
    error: UldError,
    kind: type[openai.APIStatusError],
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    engine = BusyAtFirst(refusals=[error])
    server = start_server(engine=engine)
    ask = {"model": MODEL, "messages": QUESTION}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=1) as client:
        assert client.chat.completions.create(**ask).choices[0].message.content == BASE_TEXT
        # The client waits as long as Retry-After says.
        assert waits == [{429: 1.0, 503: 5.0}[error.status]]
        engine.refusals = [error, error]
        with pytest.raises(kind):
            client.chat.completions.create(**ask)
