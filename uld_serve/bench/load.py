"""An open-loop load: requests come when a Poisson process says so, whether or not earlier ones are done. Called by
serve. Knows nothing of servers being started or of reports.

Latency counts from when a request was due, not from when a free place let it be sent, so that a slow server cannot
slow the load down and look better for it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from uld_serve.bench.http_stream import RequestFailed, Streamed, stream_completion

# Ids of plain bytes in every vocabulary that we know of: no control token is among them.
PROMPT_IDS = range(32, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`models` are dealt to the requests in turn; `rate` is requests a second."""

    models: tuple[str, ...]
    rate: float
    num_requests: int
    concurrency_cap: int
    prompt_tokens: int
    max_tokens: int
    timeout_s: float
    seed: int = 0

    def due_times(self) -> list[float]:
        """Seconds from the start at which requests are due; the first at once."""
        draw = random.Random(self.seed)
        times, now = [], 0.0
        for _ in range(self.num_requests):
            times.append(now)
            now += draw.expovariate(self.rate)
        return times

    def body(self, number: int) -> dict[str, object]:
        draw = random.Random(f"{self.seed} {number}")
        return {
            "model": self.models[number % len(self.models)],
            "prompt": draw.choices(PROMPT_IDS, k=self.prompt_tokens),
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }


@dataclass(frozen=True, slots=True)
class Record:
    """One request: when it was due, and what came of it. `failure` is what errors are counted by."""

    model: str
    due: float
    end: float
    streamed: Streamed | None = None
    failure: str | None = None

    @property
    def first_token_s(self) -> float:
        assert self.streamed is not None
        return self.streamed.event_times[0] - self.due

    @property
    def gaps_s(self) -> list[float]:
        assert self.streamed is not None
        return self.streamed.gaps_s

    @property
    def total_s(self) -> float:
        return self.end - self.due


@dataclass(slots=True)
class Run:
    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0


def drive(url: str, load: Load, *, headers: Mapping[str, str], on_done: Callable[[], None]) -> Run:
    """Send the load to `url` (ending in /v1) and wait for its last answer."""
    return asyncio.run(_drive(url, load, headers, on_done))


async def _drive(url: str, load: Load, headers: Mapping[str, str], on_done: Callable[[], None]) -> Run:
    run, places = Run(), asyncio.Semaphore(load.concurrency_cap)
    start = time.perf_counter()

    async def one(number: int, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        async with places:
            run.records.append(await _request(url, load, number, due, headers))
        on_done()

    dues: Sequence[float] = [start + offset for offset in load.due_times()]
    await asyncio.gather(*(one(number, due) for number, due in enumerate(dues)))
    run.seconds = time.perf_counter() - start
    return run


async def _request(url: str, load: Load, number: int, due: float, headers: Mapping[str, str]) -> Record:
    body = load.body(number)
    model, streamed, failure = str(body["model"]), None, None
    try:
        async with asyncio.timeout(load.timeout_s):
            streamed = await stream_completion(f"{url}/completions", body, headers)
    except RequestFailed as error:
        failure = error.kind
    except TimeoutError:
        failure = "timeout"
    except OSError:
        failure = "connection"
    return Record(model, due, time.perf_counter(), streamed, failure)
