"""The one source of truth of a fleet: which profiles are active, agreed on in two phases. Replicas poll it; operators
change it. Runs in an event loop; knows no Ray, no HTTP and no engine.

A change is a candidate first: every replica that lives verifies and prepares it, or says why not, and then nothing has
happened. When all are ready it is written to the file, and from then on it is what is active. A replica holds a lease
on the active set that it knows, and answers only while it does: so when a change is answered, every replica has taken
it or answers nothing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from uld_serve.errors import EngineStopped, ProfileError, UnknownProfile
from uld_serve.fleet.active_set import ActiveSet, Entry, write_set

# Two clocks may differ in speed, and a replica counts its lease from earlier than we do.
MARGIN = 1.2


@dataclass(frozen=True, slots=True)
class Report:
    """Of one replica. `active`: what it serves, None before it serves anything; `prepared`: the candidate that it could
    serve at once; `refused`: the number of one that it cannot serve, and why; `held`: requests by the digest of the
    version that they run under; `num_ended`: by an unloaded digest, those that were ended."""

    replica: str
    active: ActiveSet | None = None
    prepared: ActiveSet | None = None
    refused: tuple[int, str] | None = None
    held: Mapping[str, int] = field(default_factory=dict)
    num_ended: Mapping[str, int] = field(default_factory=dict)
    num_running: int = 0
    is_draining: bool = False
    metrics: bytes = b""


@dataclass(frozen=True, slots=True)
class Orders:
    """`version` counts all changes of the rest."""

    version: int
    active: ActiveSet
    candidate: ActiveSet | None = None
    is_draining: bool = False


@dataclass(slots=True)
class _Seen:
    report: Report
    granted_s: float


class Ledger:
    def __init__(
        self,
        active: ActiveSet,
        *,
        path: Path,
        lease_s: float,
        prepare_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`prepare_s`: how long replicas may take to verify a change. Writes `active` to `path`."""
        write_set(path, active)
        self._path = path
        self._lease_s = lease_s * MARGIN
        self._prepare_s = prepare_s
        self._clock = clock
        self._started_s = clock()
        self._orders = Orders(1, active)
        self._number = active.number
        self._replicas: dict[str, _Seen] = {}
        self._changing = asyncio.Lock()
        self._ordered = asyncio.Condition()
        self._reported = asyncio.Condition()

    @property
    def active(self) -> ActiveSet:
        return self._orders.active

    @property
    def serving(self) -> list[Report]:
        """Of every replica that may be answering requests now."""
        now_s = self._clock()
        return [
            seen.report
            for seen in self._replicas.values()
            if seen.report.active is not None and now_s < seen.granted_s + self._lease_s
        ]

    async def poll(self, report: Report, *, known: int, wait_s: float) -> Orders:
        """What is ordered, as soon as it is not the version `known` any more, or after `wait_s`. Who serves what is
        active in the answer may go on doing so for lease_s from the moment in which it asked."""
        async with self._reported:
            before = self._replicas.get(report.replica)
            self._replicas[report.replica] = _Seen(report, -math.inf if before is None else before.granted_s)
            self._reported.notify_all()
        try:
            async with asyncio.timeout(wait_s), self._ordered:
                await self._ordered.wait_for(lambda: self._orders.version != known)
        except TimeoutError:
            pass
        if report.active == self.active and report.replica in self._replicas:
            self._replicas[report.replica].granted_s = self._clock()
        return self._orders

    async def leave(self, replica: str) -> None:
        """It answers nothing any more."""
        async with self._reported:
            self._replicas.pop(replica, None)
            self._reported.notify_all()

    async def put(self, name: str, entry: Entry) -> None:
        """Serve `name` as `entry`, everywhere. Raises ProfileError, with nothing changed, where a replica cannot."""
        async with self._changing:
            await self._change({**self.active.entries, name: entry})

    async def remove(self, name: str) -> str:
        """Serve no profile of that name anywhere; the digest that it had. Requests that hold it may still run."""
        async with self._changing:
            entries = dict(self.active.entries)
            removed = entries.pop(name, None)
            if removed is None:
                raise UnknownProfile(
                    f"there is no such profile here; known: {', '.join(sorted(entries)) or 'none'}"
                )
            await self._change(entries)
        return removed.digest

    async def until_free(self, digest: str) -> None:
        """Until no replica has a request under that version."""
        await self._until(lambda: self.num_held(digest) == 0)

    def num_held(self, digest: str) -> int:
        """Requests under that version, as replicas last said."""
        return sum(report.held.get(digest, 0) for report in self.serving)

    async def drain(self, *, wait_s: float) -> int:
        """No replica takes a request any more when this returns; how many run after at most `wait_s`."""
        await self._order(is_draining=True)
        await self._until(lambda: all(report.is_draining for report in self.serving))
        try:
            async with asyncio.timeout(wait_s):
                await self._until(lambda: self._num_running() == 0)
        except TimeoutError:
            pass
        return self._num_running()

    def _num_running(self) -> int:
        return sum(report.num_running for report in self.serving)

    async def _change(self, entries: Mapping[str, Entry]) -> None:
        await self._settled()
        self._number += 1
        candidate = ActiveSet(number=self._number, entries=entries)
        await self._order(candidate=candidate)
        try:
            await self._prepared(candidate)
            write_set(self._path, candidate)
        except BaseException:
            await self._order(candidate=None)
            raise
        # From here on it is so, whatever becomes of the one who asked.
        await self._order(active=candidate, candidate=None)
        await self._until(lambda: all(report.active == candidate for report in self.serving))
        here = {report.replica for report in self.serving}
        self._replicas = {name: seen for name, seen in self._replicas.items() if name in here}

    async def _settled(self) -> None:
        """Replicas that knew an earlier ledger have told this one, or their leases have ended."""
        await asyncio.sleep(max(0.0, self._started_s + self._lease_s - self._clock()))
        if not self.serving:
            raise EngineStopped("no replica is up, and nothing is activated that none has verified")

    async def _prepared(self, candidate: ActiveSet) -> None:
        def is_decided() -> bool:
            reports = self.serving
            return all(one.prepared == candidate for one in reports) or any(
                one.refused is not None and one.refused[0] == candidate.number for one in reports
            )

        try:
            async with asyncio.timeout(self._prepare_s):
                await self._until(is_decided)
        except TimeoutError:
            raise ProfileError(
                f"not every replica could prepare this within {self._prepare_s:g} s; nothing was changed"
            ) from None
        for report in self.serving:
            if report.refused is not None and report.refused[0] == candidate.number:
                raise ProfileError(
                    f"replica {report.replica} refuses: {report.refused[1]}; nothing was changed"
                )
        if not self.serving:
            raise EngineStopped("every replica has gone meanwhile; nothing was changed")

    async def _order(self, **changes: object) -> None:
        async with self._ordered:
            self._orders = replace(self._orders, version=self._orders.version + 1, **changes)  # type: ignore[arg-type]
            self._ordered.notify_all()

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """A lease that ends is nobody's report, so the clock is asked too."""
        async with self._reported:
            while not is_so():
                try:
                    async with asyncio.timeout(self._lease_s / 4):
                        await self._reported.wait()
                except TimeoutError:
                    continue
