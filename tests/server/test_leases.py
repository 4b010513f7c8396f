"""Leases: each version counted once a request, given back whatever happens, and waited for."""

from __future__ import annotations

import asyncio

import pytest
from fake_engine import profile_version

from uld_serve.engine.plan import Applied, Decision
from uld_serve.server.leases import Leases

ACME, SECRET = profile_version("acme", digit="a"), profile_version("secret", digit="c")
BOTH = Decision.forgetting([Applied(ACME), Applied(SECRET), Applied(ACME, 2.0)])


def test_a_request_holds_each_version_once_and_gives_all_back() -> None:
    leases = Leases()
    with leases.held(BOTH), leases.held(Decision.of_version(ACME)), leases.held(Decision.base()):
        assert leases.counts == {ACME.digest: 2, SECRET.digest: 1}
        assert (leases.count(ACME.digest), leases.count("unheard-of"), leases.total) == (2, 0, 3)
    assert (leases.counts, leases.total) == ({}, 0)


def test_a_request_that_fails_gives_its_leases_back() -> None:
    leases = Leases()
    with pytest.raises(RuntimeError, match="on purpose"), leases.held(BOTH):
        raise RuntimeError("on purpose")
    assert leases.total == 0


def test_what_nobody_holds_is_free_at_once() -> None:
    assert asyncio.run(Leases().until_free(ACME.digest, timeout_s=0)) is True


def test_waiting_ends_with_the_last_holder_and_not_before() -> None:
    async def run() -> list[str]:
        leases, seen = Leases(), []

        async def hold(seconds: float, name: str) -> None:
            with leases.held(Decision.of_version(ACME)):
                await asyncio.sleep(seconds)
                seen.append(name)

        holders = [asyncio.create_task(hold(0.01, "first")), asyncio.create_task(hold(0.05, "last"))]
        await asyncio.sleep(0)
        assert await leases.until_free(ACME.digest) is True
        seen.append("free")
        await asyncio.gather(*holders)
        return seen

    assert asyncio.run(run()) == ["first", "last", "free"]


def test_another_versions_end_is_no_end_of_the_wait() -> None:
    async def run() -> bool:
        leases = Leases()
        with leases.held(Decision.of_version(ACME)):
            with leases.held(Decision.of_version(SECRET)):
                waiting = asyncio.create_task(leases.until_free(ACME.digest, timeout_s=0.05))
                await asyncio.sleep(0)
            return await waiting

    assert asyncio.run(run()) is False
