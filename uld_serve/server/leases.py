"""Who holds which version of a profile: from the Decision to the last byte of its answer. Taken by admission, waited
for by whoever unloads. Event loop only; knows no HTTP and no engine."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from uld_serve.engine.plan import Decision


@dataclass(slots=True, eq=False)
class Leases:
    """To be taken in the moment in which the registry is read, so that nothing is unloaded in between."""

    _held: Counter[str] = field(default_factory=Counter)
    _given_back: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def held(self, decision: Decision) -> Iterator[None]:
        """A lease on every version of a decision."""
        digests = {applied.version.digest for applied in decision.applied}
        self._held.update(digests)
        try:
            yield
        finally:
            self._held.subtract(digests)
            self._given_back.set()

    def count(self, digest: str) -> int:
        return self._held[digest]

    @property
    def counts(self) -> dict[str, int]:
        """By digest, of those that are held."""
        return {digest: count for digest, count in self._held.items() if count}

    @property
    def total(self) -> int:
        return self._held.total()

    async def until_free(self, digest: str, *, timeout_s: float | None = None) -> bool:
        """Whether nobody holds the digest any more, as soon as that is so."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._held[digest]:
                    self._given_back.clear()
                    await self._given_back.wait()
        except TimeoutError:
            return False
        return True
