"""Clients that leave at any moment, whatever they asked: nothing that was held for them is left a second later."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from canary import NAMES, CanaryModel
from canary_server import CHAT, COMPLETIONS, CanaryServer, Question, canary_server
from raw_client import ask, request_bytes
from scale import scaled

NUM_ABORTS = scaled(fast=120, gate=1000, aim=10_000)
AT_ONCE = 40
LONGEST_STAY_S = 0.3


def a_question(rng: random.Random) -> Question:
    names = tuple(rng.sample(NAMES[:4], rng.randrange(3))) or (rng.choice(NAMES),)
    body = {"n": rng.choice([1, 4]), "stream": rng.random() < 0.6}
    return Question(names, body, path=rng.choice([COMPLETIONS, CHAT]), max_tokens=60)


async def ask_and_leave(server: CanaryServer, rng: random.Random) -> None:
    """Between the first byte of a request and the end of its answer."""
    question = a_question(rng)
    stay_s = rng.random() ** 2 * LONGEST_STAY_S
    if rng.random() < 0.1:  # within the request itself
        data = request_bytes(question.path, question.json)
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(data[: rng.randrange(len(data))])
        await asyncio.sleep(stay_s / 10)
        writer.close()
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(stay_s):
            said = await server.ask(question)
            assert not said.problems, said.problems


async def held_now(server: CanaryServer) -> dict[str, int]:
    """What is held, asked on a connection of its own, which is counted each time alike."""
    reply = await ask(server.port, "/tasks", b"", method="GET")
    return {**server.held(), "tasks": reply.json["tasks"], "descriptors": len(os.listdir("/proc/self/fd"))}


async def settled(server: CanaryServer, baseline: dict[str, int]) -> dict[str, tuple[int, int]]:
    """What is above the baseline after a second; {} is right."""
    deadline = time.monotonic() + 1
    while (now := await held_now(server)) != baseline and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return {name: (baseline[name], n) for name, n in now.items() if n > baseline[name]}


@pytest.mark.row("aborts at any point")
@pytest.mark.timeout(7200)
def test_clients_that_leave_at_any_point_leave_nothing_behind(
    canary: CanaryModel, record_property: Callable[[str, object], None]
) -> None:
    rng = random.Random(3)

    async def tasks() -> dict[str, int]:
        return {"tasks": len(asyncio.all_tasks())}

    async def run(server: CanaryServer) -> None:
        server.live.apps[0].add_api_route("/tasks", tasks)
        await server.ask_all([Question((name,)) for name in NAMES])
        await asyncio.sleep(0.2)
        baseline = await held_now(server)
        for _ in range(NUM_ABORTS // AT_ONCE):
            await asyncio.gather(*(ask_and_leave(server, rng) for _ in range(AT_ONCE)))
            assert not (left := await settled(server, baseline)), left
        await server.asynchronous.between_steps(lambda engine: engine.check_integrity())
        said = await server.ask_all([replace(a_question(rng), max_tokens=6) for _ in range(8)])
        assert all(one.is_answered and not one.problems for one in said)
        record_property("count", NUM_ABORTS)
        record_property("leaked", 0)

    with canary_server(canary, kv_cache_bytes=2**20, own_kv_bytes=2**19) as server:
        asyncio.run(run(server))
