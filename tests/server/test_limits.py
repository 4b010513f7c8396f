"""Every limit of server.toml does what it says: each is tried with a value at which something else happens than at its
default."""

from __future__ import annotations

import socket
from collections.abc import Callable

import httpx
import pytest
from fake_engine import FakeEngine
from live_server import MODEL, LiveServer, wait_until

from uld_serve.server.settings import Limits

COMPLETION = {"model": MODEL, "prompt": "Hi"}
ROUTES = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
}
ELSEWHERE = {"write_timeout_s", "grace_s"}
"""test_listener's stalled reader, test_failures' stopping server."""


def sent_long_body(server: LiveServer) -> bool:
    return server.post("/v1/tokenize", {"model": MODEL, "prompt": "x" * 2000}).status_code == 200


def sent_long_header(server: LiveServer) -> bool:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 4000)
        sock.settimeout(0.3)
        try:
            sock.recv(100)
        except TimeoutError:
            return True
        return False  # an answer, or the end, before the header has ended


def waits_for_a_silent_sender(server: LiveServer) -> bool:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.settimeout(0.8)
        try:
            return sock.recv(1) != b""
        except TimeoutError:
            return True


def takes_a_slow_step_for_life(server: LiveServer) -> bool:
    server.engine.heartbeat_age_s = 30.0
    return server.get("/health").status_code == 200


def lets_a_request_run(server: LiveServer) -> bool:
    server.engine.step_s = 0.05
    return server.post("/v1/completions", COMPLETION).status_code == 200


CASES: list[tuple[str, float, Callable[[LiveServer], bool]]] = [
    ("body_bytes", 1024, sent_long_body),
    ("header_bytes", 1024, sent_long_header),
    ("read_timeout_s", 0.2, waits_for_a_silent_sender),
    ("heartbeat_timeout_s", 5.0, takes_a_slow_step_for_life),
    ("request_timeout_s", 0.2, lets_a_request_run),
]


@pytest.mark.parametrize(("name", "value", "is_let_through"), CASES)
def test_limit_refuses_what_its_default_lets_through(
    start_server: Callable[..., LiveServer],
    name: str,
    value: float,
    is_let_through: Callable[[LiveServer], bool],
) -> None:
    assert is_let_through(start_server())
    assert not is_let_through(start_server(limits=Limits.model_validate({name: value})))


def test_every_limit_has_a_case() -> None:
    assert {name for name, _, _ in CASES} | ELSEWHERE == set(Limits.model_fields)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("n", [1, 3])
def test_request_that_runs_too_long_ends_with_an_error_and_runs_no_more(
    start_server: Callable[..., LiveServer], path: str, n: int
) -> None:
    server = start_server(engine=FakeEngine(hang_after=2), limits=Limits(request_timeout_s=0.3))
    whole = server.post(path, ROUTES[path] | {"n": n})
    assert whole.status_code == 503
    error = whole.json()["error"]
    assert (error["code"], error["message"]) == (
        "request_timeout",
        "the request did not end within 0.3 s; ask for fewer tokens or choices",
    )
    wait_until(lambda: server.engine.num_running == 0)
    assert len(server.backend.in_flight) == 0
    assert all(call.is_aborted for call in server.engine.calls)


def test_stream_that_runs_too_long_sends_what_it_has_and_then_the_error(
    start_server: Callable[..., LiveServer],
) -> None:
    server = start_server(engine=FakeEngine(hang_after=2), limits=Limits(request_timeout_s=0.3))
    pieces: list[str] = []
    with (
        server.http.stream(
            "POST", f"{server.url}/v1/completions", json=COMPLETION | {"stream": True}
        ) as response,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        pieces.extend(response.iter_text())
    events = "".join(pieces).strip().split("\n\n")
    assert '"text":"T"' in events[0]
    assert '"request_timeout"' in events[-1]
    wait_until(lambda: server.engine.num_running == 0)
