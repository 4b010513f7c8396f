"""Sockets that misbehave: silent, trickling, garbage, too large, or not reading."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import pytest
from fake_engine import FakeEngine
from live_server import MODEL, LiveServer, wait_until

from uld_serve.server.settings import Limits

BODY = json.dumps({"model": MODEL, "prompt": "Hi"}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def hasty(start_server: Callable[..., LiveServer]) -> LiveServer:
    return start_server(limits=Limits(read_timeout_s=0.4, write_timeout_s=0.4))


def connect(server: LiveServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=5)


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", HEAD % len(BODY) + BODY[:5]])
def test_half_a_request_is_cut_off(hasty: LiveServer, sent: bytes) -> None:
    with connect(hasty) as sock:
        sock.sendall(sent)
        started = time.monotonic()
        answer = read_all(sock)
        assert time.monotonic() - started < 3
    assert b" 200 " not in answer
    if BODY[:5] in sent:
        assert b"408 Request Timeout" in answer


def trickle(sock: socket.socket) -> None:
    for _ in range(100):
        sock.sendall(b"a")
        time.sleep(0.05)


@pytest.mark.parametrize("start", [b"GET /version HTTP/1.1\r\nX-A: ", HEAD % 10_000])
def test_trickling_does_not_reset_the_clock(hasty: LiveServer, start: bytes) -> None:
    with connect(hasty) as sock:
        sock.sendall(start)
        started = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            trickle(sock)
        assert time.monotonic() - started < 3


def test_connection_is_kept_for_the_next_request(hasty: LiveServer) -> None:
    with connect(hasty) as sock:
        for _ in range(3):
            sock.sendall(HEAD % len(BODY) + BODY)
            answer = b""
            while not answer.endswith(b"}}"):
                answer += sock.recv(65536)
            assert b"200 OK" in answer
            time.sleep(0.25)


def test_answers_do_not_wait_for_a_delayed_acknowledgement(server: LiveServer) -> None:
    took = []
    for _ in range(20):
        started = time.perf_counter()
        assert server.get("/version").status_code == 200
        took.append(time.perf_counter() - started)
    assert min(took) < 0.03  # with Nagle's algorithm on, none is below 0.04


def test_slow_generation_is_not_taken_for_a_silent_socket(start_server: Callable[..., LiveServer]) -> None:
    server = start_server(limits=Limits(read_timeout_s=0.1), engine=FakeEngine(step_s=0.05))
    assert server.post("/v1/completions", json.loads(BODY)).status_code == 200


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\x01", b"nonsense\r\n\r\n", b"GET / HTTP/x\r\n\r\n"]
)
def test_garbage_is_400_in_our_shape(server: LiveServer, garbage: bytes) -> None:
    with connect(server) as sock:
        sock.sendall(garbage + b"\r\n\r\n")
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert b" 400 " in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_header_block_is_bounded(server: LiveServer) -> None:
    with connect(server) as sock:
        try:
            sock.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 200_000)
            assert b" 400 " in read_all(sock)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it hung up before all was sent


def test_stalled_reader_is_aborted(start_server: Callable[..., LiveServer]) -> None:
    engine = FakeEngine(text_of=lambda call: "x" * 100_000)
    server = start_server(limits=Limits(write_timeout_s=0.3), engine=engine)
    body = json.dumps({"model": MODEL, "prompt": "Hi", "stream": True, "max_tokens": 100_000}).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(5)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(HEAD % len(body) + body)
        wait_until(lambda: engine.num_running == 1)
        wait_until(lambda: engine.num_running == 0, timeout_s=20)
    assert all(call.is_aborted for call in engine.calls)
