"""Seeded mutations of good requests, as bytes on a socket: every answer is below 500 or a closed
connection, and the server answers a good request afterwards."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable

import pytest
from live_server import MODEL, LiveServer
from scale import scaled

from uld_serve.server.settings import Limits

SEED, CASES = 20_240_611, scaled(fast=500, gate=20_000, aim=1_000_000)
GOOD = [
    (
        "/v1/completions",
        {"model": MODEL, "prompt": "Hi", "max_tokens": 2, "logprobs": 1, "echo": True, "n": 2},
    ),
    (
        "/v1/completions",
        {"model": f"{MODEL}:acme", "prompt": [[1, 2], [3]], "stream": True, "logit_bias": {"5": 1}},
    ),
    (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    ),
    (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    ),
    ("/v1/tokenize", {"model": MODEL, "prompt": "Hé"}),
    ("/v1/detokenize", {"model": MODEL, "tokens": [72, 105]}),
]
WORDS: list[object] = [
    None, True, -1, 0, 1e308, -0.0, 2**63, 10**30, "", "\x00", "\ud800", "none", "🜁" * 50, [], {}, [[]], [None],
    {"a": {"b": []}}, [1] * 200, "acme", float("nan"), float("inf"),
]  # fmt: skip

ODD_HEADERS = [
    b"X-Forget-Profile: \xff",
    b"X-Forget-Profile: acme",
    b"X: " + b"a" * 9000,
    b"bad",
    b"Transfer-Encoding: chunked",
]


def mutated(value: object, rng: random.Random) -> object:
    """One place in the value, replaced, removed, doubled or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key, made = rng.choice(list(value)), dict(value)
        action = rng.randrange(5)
        if action == 0:
            del made[key]
        elif action == 1:
            made[rng.choice(["forget_profile", "stop", "seed", "top_k", key + "x", "", "tools"])] = (
                rng.choice(WORDS)
            )
        else:
            made[key] = mutated(value[key], rng)
        return made
    if isinstance(value, list) and value and rng.random() < 0.6:
        index = rng.randrange(len(value))
        return [*value[:index], mutated(value[index], rng), *value[index + rng.randrange(2) :]]
    return rng.choice([*WORDS, [value], {"x": value}])


def raw_request(rng: random.Random) -> bytes:
    path, body = rng.choice(GOOD)
    data = json.dumps(mutated(body, rng), ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        data = scrambled(data, rng)
    length = len(data) if rng.random() < 0.9 else rng.choice([0, 1, len(data) + 5, -1, 10**20])
    head = [
        f"POST {path} HTTP/1.1".encode(),
        b"Host: x",
        b"Content-Type: application/json",
        f"Content-Length: {length}".encode(),
        b"Connection: close",
    ]
    if rng.random() < 0.2:
        head.insert(rng.randrange(1, 5), rng.choice(ODD_HEADERS))
    made = b"\r\n".join(head) + b"\r\n\r\n" + data
    return scrambled(made, rng) if rng.random() < 0.15 else made


def scrambled(data: bytes, rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        position = rng.randrange(len(made) + 1)
        match rng.randrange(3):
            case 0:
                made[position:position] = rng.randbytes(rng.randrange(1, 4))
            case 1:
                del made[position : position + rng.randrange(1, 9)]
            case _:
                made[position : position + 1] = rng.choice(
                    [b'"', b"{", b"}", b",", b"\x00", b"\\", b"\xff", b"\n"]
                )
    return bytes(made)


def status_of(server: LiveServer, request: bytes) -> int | None:
    """None when the server closed the connection without an answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        try:
            sock.sendall(request)
            line = sock.makefile("rb").readline()
        except (BrokenPipeError, ConnectionResetError):
            return None
    return int(line.split(b" ")[1]) if line else None


@pytest.mark.row("raw HTTP mutation")
@pytest.mark.timeout(36000)
def test_mutated_requests_never_give_a_5xx(
    start_server: Callable[..., LiveServer], record_property: Callable[[str, object], None]
) -> None:
    server = start_server(limits=Limits(read_timeout_s=0.1))  # many promise more bytes than they send
    rng = random.Random(SEED)
    statuses: dict[int | None, int] = {}
    for case in range(CASES):
        request = raw_request(rng)
        status = status_of(server, request)
        if status is not None and status >= 500:
            pytest.fail(f"case {case} gave {status}: {request!r}")
        statuses[status] = statuses.get(status, 0) + 1
    assert statuses.get(200, 0) >= 10, statuses  # some mutations are harmless: the fuzz does reach the engine
    assert statuses.get(400, 0) > 100, statuses
    assert server.post("/v1/completions", {"model": MODEL, "prompt": "Hi"}).status_code == 200
    record_property("count", CASES)
    record_property("statuses", {str(status): n for status, n in statuses.items()})
