"""What still runs while a server drains or a profile goes: counted whole, and once."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import FakeTokenizer, registry
from live_server import MODEL, LiveServer

from uld_serve.engine.plan import Decision
from uld_serve.errors import ProfileError
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.server.in_flight import InFlight
from uld_serve.server.leases import Leases
from uld_serve.server.loader import Change, Loader
from uld_serve.server.policy import DEVELOPMENT

ASK = {"model": MODEL, "prompt": "Hi"}


class NoHost:
    async def admit(self, version: ProfileVersion) -> None:
        raise AssertionError("nothing is loaded here")

    async def drop(self, version: ProfileVersion) -> None:
        pass


@pytest.fixture
def served(start_server: Callable[..., LiveServer]) -> LiveServer:
    return start_server(host=NoHost())


def test_draining_refuses_a_request_whose_body_was_on_its_way(served: LiveServer) -> None:
    body = json.dumps(ASK).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connection:
        connection.sendall(head.encode() + body[:5])
        time.sleep(0.1)
        drained = served.admin("POST", "/admin/drain", json={"wait_s": 5}).json()
        assert drained == {"is_draining": True, "num_running": 0}
        connection.sendall(body[5:])
        assert connection.recv(12) == b"HTTP/1.1 503"
    assert served.engine.calls == []


def test_draining_waits_for_a_request_that_has_not_reached_the_engine(
    served: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_encoding, may_go_on = threading.Event(), threading.Event()

    def encode(_tokenizer: object, text: str) -> list[int]:
        is_encoding.set()
        assert may_go_on.wait(10)
        return list(text.encode())

    monkeypatch.setattr(FakeTokenizer, "encode", encode)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.post, "/v1/completions", ASK | {"prompt": "x" * 5000, "max_tokens": 1})
        assert is_encoding.wait(5)
        try:
            assert served.admin("POST", "/admin/drain", json={}).json()["num_running"] == 1
        finally:
            may_go_on.set()
        asked.result(10)
    assert served.admin("POST", "/admin/drain", json={"wait_s": 5}).json()["num_running"] == 0


def test_a_request_that_takes_time_to_end_is_counted_once() -> None:
    """As one whose client reads nothing: the error cannot be sent yet."""

    async def unload() -> Change:
        known, leases, in_flight = registry(), Leases(), InFlight()
        decision = Decision.of_version(known.get("acme"))
        loader = Loader(known, (), NoHost(), leases, in_flight, policies=list)

        async def ask() -> None:
            with leases.held(decision), in_flight.entered(DEVELOPMENT, decision) as queue:
                assert isinstance(await queue.get(), ProfileError)
                await asyncio.sleep(0.35)

        asked = asyncio.create_task(ask())
        await asyncio.sleep(0)
        change = await loader.unload("acme", wait_s=0.05)
        await asked
        return change

    assert asyncio.run(unload()).num_ended == 1
