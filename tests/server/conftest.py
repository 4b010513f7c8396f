"""Fixtures of the server tests: one live server for most, `start_server` for those that need their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from live_server import LiveServer, make_catalog


@pytest.fixture(scope="session")
def _shared_server() -> Iterator[LiveServer]:
    server = LiveServer.start(make_catalog())
    yield server
    server.stop()


@pytest.fixture
def server(_shared_server: LiveServer) -> LiveServer:
    """In development mode: no keys. Its engine's behaviour is reset for each test."""
    _shared_server.reset()
    return _shared_server


@pytest.fixture
def start_server() -> Iterator[Callable[..., LiveServer]]:
    started: list[LiveServer] = []

    def start(**catalog: object) -> LiveServer:
        engine = catalog.pop("engine", None)
        rest = {
            name: catalog.pop(name)
            for name in ("telemetry", "host", "roots", "unload_wait_s", "fine_tuning", "runner")
            if name in catalog
        }
        started.append(LiveServer.start(make_catalog(**catalog), engine, **rest))
        return started[-1]

    yield start
    for server in started:
        server.stop()
