"""Cached prompts are shared within a key and not between keys: how fast an answer comes tells nobody what another
key has asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from live_server import MODEL, LiveServer
from tiny_base import Tiny

from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.server import key_sources
from uld_serve.server.keys import KeyRing, sha256_of
from uld_serve.server.settings import checked_settings

ENVIRONMENT = {key_sources.KEY_VARIABLE: "environment-key-of-32-characters"}
SECRETS = ("key-one", "key-two", ENVIRONMENT[key_sources.KEY_VARIABLE])


def ring(**cache: bool) -> KeyRing:
    keys = [
        {"name": name, "sha256": sha256_of(f"key-{name}".encode()).hex(), "allow_base": True}
        for name in ("one", "two")
    ]
    settings = checked_settings({"keys": keys, **({"cache": cache} if cache else {})}, source="test")
    return key_sources.key_ring(settings, ENVIRONMENT)


def salts(keys: KeyRing) -> list[str]:
    return [keys.policies[sha256_of(secret.encode())].cache_salt for secret in SECRETS]


def test_every_key_has_a_salt_of_its_own_that_holds_no_key() -> None:
    found = salts(ring())
    assert len(set(found)) == 3
    assert all(found)
    assert not any(secret in salt for secret in SECRETS for salt in found)
    assert salts(ring(share_between_keys=False)) == found == salts(ring())


def test_the_operator_may_let_keys_share() -> None:
    assert salts(ring(share_between_keys=True)) == ["", "", ""]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_request_runs_under_its_keys_salt(start_server: Callable[..., LiveServer], path: str) -> None:
    policies = {secret: ring().policies[sha256_of(secret.encode())] for secret in SECRETS}
    server = start_server(keys=policies)
    body = {"model": MODEL, "n": 2, "seed": 1}
    body |= {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    for secret in SECRETS:
        answer = server.post(path, body, headers={"Authorization": f"Bearer {secret}"})
        assert answer.status_code == 200
    assert [call.cache_salt for call in server.engine.calls] == [
        policy.cache_salt for policy in policies.values() for _ in range(2)
    ]


def test_a_server_without_keys_uses_no_salt(server: LiveServer) -> None:
    server.post("/v1/completions", {"model": MODEL, "prompt": "Hi"})
    assert [call.cache_salt for call in server.engine.calls] == [""]
    assert [call.tenant for call in server.engine.calls] == ["development"]


async def cached(engine: AsyncEngine, salt: str) -> int:
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    stream = engine.stream(
        list(b"the same long prompt"), params, Decision.base(), request_id="r", cache_salt=salt
    )
    last = [delta async for delta in stream][-1]
    assert last.usage is not None
    return last.usage.cached_tokens


def test_two_keys_share_no_block_and_one_key_does(tiny: Tiny, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(block_size=4)
    asynchronous = AsyncEngine(engine)
    asynchronous.start()
    one, two, _ = salts(ring())

    async def main() -> list[int]:
        return [await cached(asynchronous, salt) for salt in (one, two, one, two, "")]

    try:
        assert asyncio.run(main()) == [0, 0, 16, 16, 0]
    finally:
        asynchronous.stop()
    engine.check_integrity()
