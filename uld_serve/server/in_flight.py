"""The generations that run now: each key's share of them, and how to end them all when the server must stop.
Used by generation, admission and admin; knows no HTTP."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from uld_serve.engine.plan import Decision
from uld_serve.engine.request import Delta
from uld_serve.errors import Overloaded, UldError
from uld_serve.server.policy import KeyPolicy

# (choice index, its next delta); None: that choice's stream has ended; an error: all of them must end.
Item: TypeAlias = tuple[int, Delta | None] | UldError


@dataclass(slots=True, eq=False)
class InFlight:
    _queues: dict[asyncio.Queue[Item], frozenset[str]] = field(default_factory=dict)
    _by_key: Counter[str] = field(default_factory=Counter)
    _ended: set[asyncio.Queue[Item]] = field(default_factory=set)
    num_admitted: int = 0
    """Requests between their admission and the last byte of their answer."""

    def __len__(self) -> int:
        return len(self._queues)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        self.num_admitted += 1
        try:
            yield
        finally:
            self.num_admitted -= 1

    @contextmanager
    def entered(self, policy: KeyPolicy, decision: Decision) -> Iterator[asyncio.Queue[Item]]:
        """A queue for one request's deltas, for as long as it runs. Raises Overloaded at the key's limit."""
        if policy.max_concurrency is not None and self._by_key[policy.name] >= policy.max_concurrency:
            raise Overloaded(f"this key may run {policy.max_concurrency} requests at once")
        queue: asyncio.Queue[Item] = asyncio.Queue()
        self._queues[queue] = frozenset(applied.version.digest for applied in decision.applied)
        self._by_key[policy.name] += 1
        try:
            yield queue
        finally:
            del self._queues[queue]
            self._ended.discard(queue)
            self._by_key[policy.name] -= 1

    def end_all(self, error: UldError) -> None:
        """Every running request ends with `error`; clients of streams get it as an event."""
        for queue in self._queues:
            queue.put_nowait(error)

    def end_those_with(self, digest: str, error: UldError) -> int:
        """The same for the requests that run under one version of a profile; how many that had not been told yet."""
        found = [q for q, digests in self._queues.items() if digest in digests and q not in self._ended]
        for queue in found:
            queue.put_nowait(error)
        self._ended.update(found)
        return len(found)
