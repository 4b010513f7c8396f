"""What a client sees when something goes wrong: the right status, an OpenAI error object, a stream that never ends
cleanly, and nothing left running."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import httpx
import openai
import pytest
from fake_engine import Call, FakeEngine
from live_server import MODEL, LiveServer, wait_until

from uld_serve.engine.request import Receipt, ReceiptEntry
from uld_serve.errors import EngineStopped, NumericalError, Overloaded, PromptTooLong, UldError
from uld_serve.server import generation
from uld_serve.server.sse import LAST_WORDS_S

ROUTES = {
    "/v1/completions": {"model": MODEL, "prompt": "Hi"},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
}
NAN = NumericalError("the assistant's scores are not finite; the request ends")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Overloaded("320 requests are in flight; try again later", retry_after_s=7), 429, "overloaded"),
        (PromptTooLong("the prompt is too long", param="prompt"), 400, "context_length_exceeded"),
        (EngineStopped("the engine is down"), 503, "engine_stopped"),
    ],
)
def test_refused_before_the_first_token_is_a_status(
    server: LiveServer, path: str, stream: bool, error: UldError, status: int, code: str
) -> None:
    server.engine.refuse = error
    response = server.post(path, ROUTES[path] | {"stream": stream})
    assert response.status_code == status
    assert response.json()["error"] == {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": code,
    }
    expected = {429: "7", 503: "5"}.get(status)
    assert response.headers.get("retry-after") == expected


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_failure_at_the_first_token_is_a_status(server: LiveServer, path: str, stream: bool) -> None:
    server.engine.fail_after = (0, NAN)
    response = server.post(path, ROUTES[path] | {"stream": stream})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "numerical_error"


@pytest.mark.parametrize("path", ROUTES)
def test_failure_in_the_middle_of_a_whole_answer_is_a_status(server: LiveServer, path: str) -> None:
    server.engine.fail_after = (3, NAN)
    assert server.post(path, ROUTES[path]).status_code == 500


def read_broken_stream(server: LiveServer, path: str) -> str:
    """The body as far as it came; the connection must break."""
    pieces: list[str] = []
    body = ROUTES[path] | {"stream": True}
    with httpx.stream("POST", server.url + path, json=body, timeout=10) as response:
        assert response.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            pieces.extend(response.iter_text())
    return "".join(pieces)


@pytest.mark.parametrize("path", ROUTES)
def test_failing_stream_sends_the_error_and_breaks_off(server: LiveServer, path: str) -> None:
    server.engine.fail_after = (3, NAN)
    text = read_broken_stream(server, path)
    last = text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "numerical_error"
    assert "[DONE]" not in text


def test_error_event_is_there_to_be_read_before_the_connection_breaks(server: LiveServer) -> None:
    """Or browsers throw it away with the connection."""
    server.engine.fail_after = (2, NAN)
    came = 0.0
    body = ROUTES["/v1/completions"] | {"stream": True}
    try:
        with server.http.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            for line in response.iter_lines():
                came = time.monotonic() if '"error"' in line else came
    except httpx.RemoteProtocolError:
        assert time.monotonic() - came >= LAST_WORDS_S / 2
        return
    raise AssertionError("the stream ended cleanly")


@pytest.mark.parametrize("how", ["crash_after", "vanish_after"])
def test_engine_that_breaks_its_word_fails_the_request(server: LiveServer, how: str) -> None:
    setattr(server.engine, how, 3)
    for path, body in ROUTES.items():
        response = server.post(path, body)
        assert response.status_code in (500, 503)
        assert "secret words" not in response.text
        text = read_broken_stream(server, path)
        assert '"error"' in text
        assert "secret words" not in text
        assert "[DONE]" not in text


def test_openai_client_raises_on_a_stream_that_fails(server: LiveServer) -> None:
    server.engine.fail_after = (3, NAN)
    with server.client() as client, pytest.raises(openai.APIError, match="not finite"):
        list(client.completions.create(model=MODEL, prompt="Hi", stream=True))


def test_one_failing_choice_ends_the_others(server: LiveServer) -> None:
    server.engine.hang_after = 5
    server.engine.refuse = None
    server.engine.fail_after = (4, NAN)
    assert server.post("/v1/completions", ROUTES["/v1/completions"] | {"n": 4}).status_code == 500
    wait_until(lambda: server.engine.num_running == 0)


@pytest.mark.parametrize("path", ROUTES)
def test_a_choice_that_fails_before_it_begins_ends_its_request(
    server: LiveServer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(generation, "_pump", fail)
    assert server.post(path, ROUTES[path]).status_code == 500
    assert len(server.backend.in_flight) == 0


WRONG: dict[str, Callable[[Call], Receipt | None]] = {
    "no receipt": lambda call: None,
    "the base's receipt": lambda call: Receipt((), "x"),
    "another profile": lambda call: Receipt(
        (ReceiptEntry("acme", "sha256:" + "f" * 64, "subtract", 2.0),), "x"
    ),
    "weaker": lambda call: Receipt(
        (ReceiptEntry("acme", "sha256:" + "a" * 64, "relu_difference", 0.5),), "x"
    ),
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_text_without_the_decided_receipt_is_never_sent(
    server: LiveServer, path: str, stream: bool, wrong: str
) -> None:
    server.engine.receipt_of = WRONG[wrong]
    response = server.post(path, ROUTES[path] | {"stream": stream, "forget_profile": "acme"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "receipt_mismatch"
    assert "FORGOT" not in response.text


def test_base_may_not_come_with_a_receipt_of_profiles(server: LiveServer) -> None:
    server.engine.receipt_of = WRONG["another profile"]
    assert server.post("/v1/completions", ROUTES["/v1/completions"]).status_code == 500


def send_and_leave(server: LiveServer, path: str, body: dict[str, object], *, read_bytes: int) -> None:
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(payload)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(head.encode() + payload)
        wait_until(lambda: server.engine.num_running > 0)
        if read_bytes:
            sock.recv(read_bytes)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("stream", "hang_after"), [(False, 0), (False, 2), (True, 0), (True, 2)])
@pytest.mark.parametrize("n", [1, 4])
def test_client_that_leaves_aborts_its_request(
    server: LiveServer, path: str, stream: bool, hang_after: int, n: int
) -> None:
    server.engine.hang_after = hang_after
    send_and_leave(
        server, path, ROUTES[path] | {"stream": stream, "n": n}, read_bytes=10 if stream and hang_after else 0
    )
    wait_until(lambda: server.engine.num_running == 0)
    assert len(server.engine.calls) == n
    assert all(call.is_aborted for call in server.engine.calls)
    wait_until(lambda: len(server.backend.in_flight) == 0)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/unheard-of", 404),
        ("GET", "/docs", 404),
        ("POST", "/v1/completions/", 404),
    ],
)
def test_routing_errors_have_the_shape(server: LiveServer, method: str, path: str, status: int) -> None:
    response = httpx.request(method, server.url + path, timeout=10)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"Content-Type": "text/plain"}, b"{}", 415),
        ({"Content-Type": "application/json; charset=utf-16"}, b"{}", 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, b"{}", 415),
        ({}, b"{}", 415),
        ({"Content-Type": "application/json"}, b"{", 400),
        ({"Content-Type": "application/json"}, b"", 400),
        ({"Content-Type": "application/json"}, b'{"a": "' + b"x" * 2**20 + b'"}', 413),
        (
            {"Content-Type": "Application/JSON; charset=UTF-8"},
            json.dumps(ROUTES["/v1/completions"]).encode(),
            200,
        ),
    ],
)
def test_body_is_json_of_a_bounded_size(
    server: LiveServer, headers: dict[str, str], content: bytes, status: int
) -> None:
    response = httpx.post(server.url + "/v1/completions", headers=headers, content=content, timeout=10)
    assert response.status_code == status, response.text


def test_size_is_counted_when_it_is_not_announced(server: LiveServer) -> None:
    pieces = (b"x" * 2**16 for _ in range(40))
    headers = {"Content-Type": "application/json"}
    response = httpx.post(server.url + "/v1/completions", headers=headers, content=pieces, timeout=10)
    assert response.status_code == 413


def test_health_and_ready_follow_the_engine(server: LiveServer) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
    server.engine.heartbeat_age_s = 1000.0
    assert server.get("/health").status_code == server.get("/ready").status_code == 503
    server.engine.heartbeat_age_s = 0.0
    server.engine.is_alive = False
    assert server.get("/health").status_code == server.get("/ready").status_code == 503
    server.engine.is_alive = True
    server.backend.is_draining = True
    assert (server.get("/health").status_code, server.get("/ready").status_code) == (200, 503)
    server.backend.is_draining = False


def test_tokens_there_and_back(server: LiveServer) -> None:
    tokens = server.post("/v1/tokenize", {"model": MODEL, "prompt": "Hé"}).json()
    assert tokens == {"tokens": [72, 195, 169], "count": 3, "max_model_len": 512}
    assert server.post("/v1/detokenize", {"model": MODEL, "tokens": [72, 195, 169]}).json() == {"text": "Hé"}
    chat = {"model": f"{MODEL}:acme", "messages": [{"role": "user", "content": "x"}]}
    assert bytes(server.post("/v1/tokenize", chat).json()["tokens"]) == b"<user>x<assistant>"
    assert server.post("/v1/tokenize", {"model": MODEL}).status_code == 400
    assert server.post("/v1/tokenize", {"model": "gpt-4", "prompt": "x"}).status_code == 404
    for token in (-1, 259, 10**18):
        assert server.post("/v1/detokenize", {"model": MODEL, "tokens": [token]}).status_code == 400
    assert server.engine.calls == []


def test_concurrent_streams_do_not_mix(server: LiveServer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    server.engine.step_s = 0.002
    profiles = ["acme", "harry-potter", "secret", None] * 4

    def ask(profile: str | None) -> str:
        with server.client() as client:
            model = MODEL if profile is None else f"{MODEL}:{profile}"
            stream = client.completions.create(model=model, prompt="Hi", stream=True, max_tokens=100)
            return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, profiles))
    assert texts == ["The capital is Paris." if p is None else f"FORGOT ['{p}']" for p in profiles]


def test_stopping_server_lets_requests_finish(start_server: Callable[..., LiveServer]) -> None:
    server = start_server(engine=FakeEngine(step_s=0.03))
    with server.client() as client:
        stream = client.completions.create(model=MODEL, prompt="Hi", stream=True, max_tokens=100)
        text = next(iter(stream)).choices[0].text
        server.listener.should_exit = True
        text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == "The capital is Paris."
    server.thread.join(10)
    assert not server.thread.is_alive()


def test_stopping_server_ends_with_an_error_what_outlasts_the_grace(
    start_server: Callable[..., LiveServer],
) -> None:
    from uld_serve.server.settings import Limits

    server = start_server(engine=FakeEngine(hang_after=2), limits=Limits(grace_s=0.2))
    with server.client() as client:
        stream = client.completions.create(model=MODEL, prompt="Hi", stream=True)
        next(iter(stream))
        started = time.monotonic()
        server.listener.should_exit = True
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
    server.thread.join(10)
    assert time.monotonic() - started < 3
    assert all(call.is_aborted for call in server.engine.calls)
