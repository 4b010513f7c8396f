"""Runs the choices of one admitted request at once and checks what the engine says it applied against what was
decided. Called by completions and chat through Admitted; knows no JSON.

Nothing is handed on from a choice whose receipt is missing or differs: it fails, whatever its text is.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import Delta, Receipt, SamplingParams, TokenLogprob
from uld_serve.errors import EngineStopped, RequestTimeout, UldError
from uld_serve.server.in_flight import InFlight, Item
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.responses import FinishReason
from uld_serve.server.watch import GONE, OK, Watch


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` as the client wrote it; None when it came as token ids or was made from messages."""

    token_ids: list[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    prompt: Prompt
    params: SamplingParams


def choices_of(
    prompts: Sequence[Prompt], params: SamplingParams, *, n: int, seed: int | None
) -> list[Choice]:
    """Choice prompt_index * n + sample_index, each with its own seed."""
    root = secrets.randbits(63) if seed is None else seed
    return [
        Choice(prompt, replace(params, seed=choice_seed(root, index * n + sample)))
        for index, prompt in enumerate(prompts)
        for sample in range(n)
    ]


def choice_seed(root: int, index: int) -> int:
    """Choice 0 has the request's seed itself, so that n = 1 and n = 4 share their first answer."""
    if index == 0:
        return root
    return int.from_bytes(hashlib.sha256(f"{root}:{index}".encode()).digest()[:8], "big") >> 1


@dataclass(slots=True)
class Answer:
    """One choice, whole."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: FinishReason = "stop"

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs or ()
        self.finish_reason = finish_reason(delta) or self.finish_reason


@dataclass(slots=True)
class Totals:
    """Counts over all choices so far. A prompt counts once, however many choices are drawn from it."""

    prompt_tokens: int
    completion_tokens: int = 0

    def add(self, delta: Delta) -> None:
        self.completion_tokens += len(delta.token_ids)


@dataclass(frozen=True, slots=True)
class Generation:
    """A request that has begun: its receipt is known, its deltas come as (choice index, Delta)."""

    receipt: Receipt
    totals: Totals
    num_choices: int
    _first: tuple[int, Delta]
    _rest: AsyncGenerator[tuple[int, Delta], None]

    @classmethod
    async def start(
        cls,
        engine: AsyncEngine,
        choices: Sequence[Choice],
        *,
        decision: Decision,
        policy: KeyPolicy,
        in_flight: InFlight,
        timeout_s: float,
        watch: Watch,
        request_id: str,
        n: int,
    ) -> Generation:
        """Submit every choice and wait for the first Delta of any. Raises what the engine refuses with, and
        RequestTimeout when not all choices have finished in time."""
        streams = [
            engine.stream(
                choice.prompt.token_ids,
                choice.params,
                decision,
                request_id=f"{request_id}-{index}",
                tenant=policy.name,
                cache_salt=policy.cache_salt,
            )
            for index, choice in enumerate(choices)
        ]
        merged = _merged(streams, policy=policy, decision=decision, in_flight=in_flight, timeout_s=timeout_s)
        rest = _watched(_checked(merged, decision), watch)
        first = await anext(rest)
        receipt = first[1].receipt
        assert receipt is not None, "_checked lets no first Delta pass without one"
        totals = Totals(sum(len(choice.prompt.token_ids) for choice in choices[::n]))
        return cls(receipt, totals, len(choices), first, rest)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Until every choice has finished. Closing it aborts those that have not."""
        async with aclosing(self._rest):
            self.totals.add(self._first[1])
            yield self._first
            async for index, delta in self._rest:
                self.totals.add(delta)
                yield index, delta

    async def aclose(self) -> None:
        await self._rest.aclose()


def finish_reason(delta: Delta) -> FinishReason | None:
    reason = delta.finish_reason
    return reason if reason in ("stop", "length") else None


async def _merged(
    streams: Sequence[AsyncIterator[Delta]],
    *,
    policy: KeyPolicy,
    decision: Decision,
    in_flight: InFlight,
    timeout_s: float,
) -> AsyncGenerator[tuple[int, Delta], None]:
    """Deltas of all streams as they come. The first failure ends all of them."""
    with in_flight.entered(policy, decision) as queue:
        late = RequestTimeout(
            f"the request did not end within {timeout_s:g} s; ask for fewer tokens or choices"
        )
        timer = asyncio.get_running_loop().call_later(timeout_s, queue.put_nowait, late)
        pumps = [_pumping(index, stream, queue) for index, stream in enumerate(streams)]
        try:
            running = set(range(len(pumps)))
            while running:
                item = await queue.get()
                if isinstance(item, UldError):
                    raise item
                index, delta = item
                if delta is None:
                    await pumps[index]  # raises what ended it
                    if index in running:
                        raise EngineStopped(
                            "the engine ended this request without finishing it; send it again"
                        )
                    continue
                if delta.finish_reason is not None:
                    running.remove(index)
                yield index, delta
        finally:
            timer.cancel()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


def _pumping(index: int, stream: AsyncIterator[Delta], queue: asyncio.Queue[Item]) -> asyncio.Task[None]:
    """However it ends, also before it has begun, the queue is told."""
    task = asyncio.create_task(_pump(index, stream, queue))
    task.add_done_callback(lambda _: queue.put_nowait((index, None)))
    return task


async def _pump(index: int, stream: AsyncIterator[Delta], queue: asyncio.Queue[Item]) -> None:
    # Cancelling this task raises inside the stream, which aborts its request.
    async for delta in stream:
        queue.put_nowait((index, delta))


async def _checked(
    deltas: AsyncGenerator[tuple[int, Delta], None], decision: Decision
) -> AsyncGenerator[tuple[int, Delta], None]:
    seen: set[int] = set()
    async with aclosing(deltas):
        async for index, delta in deltas:
            if delta.finish_reason in ("error", "abort"):
                raise delta.error or EngineStopped("the server ended this request; send it again")
            if (delta.receipt is None and index not in seen) or not _is_as_decided(delta.receipt, decision):
                raise UldError(
                    "what was applied is not what was decided; nothing is answered", code="receipt_mismatch"
                )
            seen.add(index)
            yield index, delta


async def _watched(
    deltas: AsyncGenerator[tuple[int, Delta], None], watch: Watch
) -> AsyncGenerator[tuple[int, Delta], None]:
    """Nothing is handed on that was not seen, and however it ends is told once."""
    outcome = GONE
    try:
        async with aclosing(deltas):
            async for index, delta in deltas:
                watch.saw(index, delta)
                yield index, delta
        outcome = OK
    except Exception as error:
        outcome = (error.code or error.type) if isinstance(error, UldError) else "internal_error"
        raise
    finally:
        watch.end(outcome)


def _is_as_decided(receipt: Receipt | None, decision: Decision) -> bool:
    if receipt is None:
        return True
    decided = {a.version.digest: a.scale * a.version.profile.rule.strength for a in decision.applied}
    applied = {entry.digest: entry.strength for entry in receipt.profiles}
    return decided.keys() == applied.keys() and all(
        math.isclose(applied[digest], decided[digest], rel_tol=1e-6) for digest in decided
    )
