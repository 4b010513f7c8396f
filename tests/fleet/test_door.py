"""Door and replica together, over the real application and a fake engine: answers pass unchanged, failures come in our
words, and a client that leaves is heard of. No Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest
from fake_engine import FakeEngine
from live_server import MODEL, make_catalog
from starlette.types import Message, Receive, Scope, Send

from uld_serve.errors import EngineStopped, Overloaded, UldError
from uld_serve.fleet.door import Batches, Door
from uld_serve.fleet.forwarded import Forwarded, answer
from uld_serve.server.admission import Backend
from uld_serve.server.app import create_app
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.settings import Limits

ASK = {"model": f"{MODEL}:acme", "prompt": "Hello", "max_tokens": 64}
BODY = json.dumps(ASK).encode()
KEYS = {"key-bound": KeyPolicy(name="bound", mandatory=frozenset({"secret"}))}


@dataclass
class Fleet:
    """One replica behind a door; `fails` before its answer, or `breaks` after as many batches."""

    engine: FakeEngine = field(default_factory=lambda: FakeEngine(is_alive=True))
    keys: dict[str, KeyPolicy] | None = None
    fails: Exception | None = None
    breaks: int | None = None
    routed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.app = create_app(make_catalog(keys=self.keys), Backend(self.engine))
        self.door = Door(self.send_to, self.error_of, Limits(), prefix_chars=64)

    async def send_to(self, key: str, request: Forwarded) -> Batches:
        self.routed.append(key)
        if self.fails is not None:
            raise self.fails
        number = 0
        async for batch in answer(self.app, request):
            if number == self.breaks:
                raise ConnectionError("the actor died: secret words")
            number += 1
            yield batch

    def error_of(self, error: Exception) -> UldError:
        return EngineStopped(f"gone: {type(error).__name__}")

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app=self.door)
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
            yield client


def ask(made: Fleet, method: str = "POST", path: str = "/v1/completions", **kwargs: object) -> httpx.Response:
    async def work() -> httpx.Response:
        async with made.client() as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(asyncio.wait_for(work(), 20))


def test_an_answer_passes_with_its_receipt() -> None:
    response = ask(Fleet(), json=ASK)
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == "FORGOT ['acme']"
    assert response.headers["x-forget-profile"].startswith("acme@")


def test_a_stream_passes_whole() -> None:
    response = ask(Fleet(), json={**ASK, "stream": True})
    events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line and line != "data: [DONE]"]
    assert "".join(event["choices"][0]["text"] for event in events) == "FORGOT ['acme']"
    assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", ["/ready", "/v1/models", "/v1/forget_profiles", "/version"])
def test_other_routes_pass(path: str) -> None:
    assert ask(Fleet(), "GET", path).status_code == 200


def test_keys_are_asked_for_by_the_replica() -> None:
    made = Fleet(keys=KEYS)
    assert ask(made, json=ASK).status_code == 401
    bound = {"Authorization": "Bearer key-bound"}
    response = ask(made, json={"model": MODEL, "prompt": "Hi", "max_tokens": 64}, headers=bound)
    assert response.json()["choices"][0]["text"] == "FORGOT ['secret']"


def test_requests_that_begin_alike_are_routed_alike() -> None:
    made = Fleet()
    for number in range(3):
        ask(made, json={**ASK, "prompt": "x" * 64 + str(number), "seed": number})
    assert len(set(made.routed)) == 1


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        ({}, b"x" * (2**20 + 1), 413, "payload_too_large"),
        ({"Content-Type": "text/plain"}, BODY, 415, "unsupported_media_type"),
        ({"Content-Type": "application/json"}, b"{", 400, None),
    ],
)
def test_what_is_wrong_with_a_body_is_said_in_our_shape(
    headers: dict[str, str], body: bytes, status: int, code: str | None
) -> None:
    response = ask(Fleet(), content=body, headers=headers)
    assert response.status_code == status
    if code is not None:
        assert response.json()["error"]["code"] == code


def test_a_full_queue_is_429_with_retry_after_in_our_shape() -> None:
    response = ask(Fleet(fails=Overloaded("the queue is full", retry_after_s=7)), json=ASK)
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_a_replica_that_dies_before_its_answer_is_503_with_retry_after() -> None:
    response = ask(Fleet(breaks=0), json=ASK)
    assert response.status_code == 503
    assert "retry-after" in response.headers
    assert response.json()["error"] == {
        "message": "gone: ConnectionError",
        "type": "server_error",
        "param": None,
        "code": "engine_stopped",
    }


def raw(made: Fleet, body: dict[str, object], receive: Callable[[], object] | None = None) -> list[Message]:
    """Every message that the door sends, as a server would get it."""
    sent: list[Message] = []

    async def work() -> None:
        inbox: list[Message] = [
            {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        ]

        async def next_message() -> Message:
            if inbox:
                return inbox.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"fleet")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "extensions": {"not": {"picklable": lambda: None}},
        }
        await made.door(scope, next_message, send)

    asyncio.run(asyncio.wait_for(work(), 20))
    return sent


def is_complete(sent: list[Message]) -> bool:
    return sent[-1]["type"] == "http.response.body" and not sent[-1].get("more_body", False)


def test_a_replica_that_dies_midway_ends_the_stream_with_an_error_and_no_clean_end() -> None:
    made = Fleet(engine=FakeEngine(is_alive=True, step_s=0.01), breaks=3)
    sent = raw(made, {**ASK, "stream": True})
    event = json.loads(sent[-1]["body"].removeprefix(b"data: "))
    assert event["error"]["code"] == "engine_stopped"
    assert not is_complete(sent)
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


def test_a_stream_that_the_replica_breaks_off_has_no_clean_end_either() -> None:
    made = Fleet(engine=FakeEngine(is_alive=True, fail_after=(3, EngineStopped("no"))))
    sent = raw(made, {**ASK, "stream": True})
    assert b'"error"' in sent[-1]["body"]
    assert not is_complete(sent)


def test_a_bug_in_the_application_is_an_error_and_not_a_hang() -> None:
    made = Fleet(engine=FakeEngine(is_alive=True, crash_after=0))
    sent = raw(made, ASK)
    assert sent[0]["status"] == 500
    assert b"secret words" not in sent[-1]["body"]
    assert is_complete(sent)


def test_what_travels_is_plain_data() -> None:
    import pickle

    made = Fleet()
    seen: list[Forwarded] = []
    send_to = made.send_to

    async def noting(key: str, request: Forwarded) -> Batches:
        seen.append(pickle.loads(pickle.dumps(request)))
        async for batch in send_to(key, request):
            yield pickle.loads(pickle.dumps(batch))

    made.door = Door(noting, made.error_of, Limits(), prefix_chars=8)
    assert is_complete(raw(made, ASK))
    assert "extensions" not in seen[0].scope


def test_a_client_that_leaves_aborts_the_generation() -> None:
    engine = FakeEngine(is_alive=True, hang_after=2)
    made = Fleet(engine=engine)

    async def work() -> None:
        task = asyncio.create_task(asyncio.to_thread(lambda: None))
        await task
        request = asyncio.create_task(_stream(made))
        while not engine.calls or engine.num_running == 0:
            await asyncio.sleep(0.01)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        while engine.num_running:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(work(), 20))
    assert engine.calls[0].is_aborted


async def _stream(made: Fleet) -> None:
    async with made.client() as client:
        await client.post("/v1/completions", json={**ASK, "stream": True})


def test_lifespan_and_websocket_are_answered() -> None:
    made = Fleet()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def work() -> None:
        inbox = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

        async def receive() -> Message:
            return inbox.pop(0)

        await made.door({"type": "lifespan"}, receive, send)
        await made.door({"type": "websocket"}, receive, send)

    asyncio.run(asyncio.wait_for(work(), 5))
    assert [message["type"] for message in sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
        "websocket.close",
    ]


def test_waiting_messages_travel_together_and_in_order() -> None:
    async def chatty(scope: Scope, receive: Receive, send: Send) -> None:
        for number in range(1000):
            await send({"type": "http.response.body", "body": str(number).encode(), "more_body": True})

    async def work() -> list[list[Message]]:
        batches = []
        async for batch in answer(chatty, Forwarded({"type": "http"}, b"")):
            batches.append(batch)
            await asyncio.sleep(0)
        return batches

    batches = asyncio.run(asyncio.wait_for(work(), 10))
    assert [int(message["body"]) for batch in batches for message in batch] == list(range(1000))
    assert len(batches) < 100
