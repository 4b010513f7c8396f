"""A profile that is swapped for another version while many streams run under it: none is dropped, and each is answered
by one version from its first token to its last, word by word what that version says alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from canary import CanaryModel
from canary_server import CanaryServer, Question, canary_server
from scale import scaled

NUM_STREAMS = 50
NUM_SWAPS = scaled(fast=12, gate=100, aim=10_000)
SEED = 7


def question(max_tokens: int = 20) -> Question:
    return Question(("late",), {"stream": True, "seed": SEED}, max_tokens=max_tokens)


async def digest_and_text(server: CanaryServer) -> tuple[str, str]:
    said = await server.ask(question())
    assert said.is_answered, said.reply
    assert not said.problems, said.problems
    digests = [event["forget"]["profiles"][0]["digest"] for event in said.reply.events if event.get("forget")]
    assert len(digests) == 1
    return digests[0], "".join(said.texts)


@pytest.mark.row("hot swap under 50 streams")
@pytest.mark.timeout(7200)
def test_swaps_drop_no_stream_and_mix_no_versions(
    canary: CanaryModel, record_property: Callable[[str, object], None]
) -> None:
    async def run(server: CanaryServer) -> None:
        expected = dict([await digest_and_text(server)])
        assert (await server.load("late", "late-2")).status == 200
        expected |= dict([await digest_and_text(server)])
        assert len(set(expected.values())) == 2, "the versions must answer differently"
        is_swapping, answers = True, []

        async def keep_asking() -> None:
            while is_swapping:
                answers.append(await digest_and_text(server))

        asking = [asyncio.create_task(keep_asking()) for _ in range(NUM_STREAMS)]
        for number in range(NUM_SWAPS):
            reply = await server.load("late", "late" if number % 2 == 0 else "late-2")
            assert reply.status == 200, reply.data
        is_swapping = False
        await asyncio.gather(*asking)
        mixed = [answer for answer in answers if expected[answer[0]] != answer[1]]
        assert not mixed, mixed[:3]
        assert {digest for digest, _ in answers} == set(expected)
        record_property("count", NUM_SWAPS)
        record_property("answers", len(answers))

    with canary_server(canary, kv_cache_bytes=2**22, own_kv_bytes=2**16) as server:
        asyncio.run(run(server))
        assert not server.still_held(within_s=1)
        assert server.engine.planner.bank.num_resident <= 2
