"""A replica's side of the agreement: follows the ledger, prepares candidates beside the requests that run, and changes
what its names mean in one moment. Built by replica; knows no Ray and no HTTP.

It may serve only while `is_current`: it knows the active set, and asked no longer than a lease ago.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from uld_serve.errors import EngineStopped, UldError
from uld_serve.fleet.active_set import ActiveSet
from uld_serve.fleet.ledger import Orders, Report
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.server.admission import Backend
from uld_serve.server.loader import Loader

logger = logging.getLogger(__name__)

RETRY_S = 0.5
AT_ONCE = -1


class Source(Protocol):
    """The ledger, however far away."""

    async def poll(self, report: Report, *, known: int, wait_s: float) -> Orders: ...

    async def leave(self, replica: str) -> None: ...


@dataclass(slots=True, eq=False)
class Member:
    """`active`: what the loader's registry holds when this is made. `poll_s` must be well below `lease_s`."""

    name: str
    source: Source
    loader: Loader
    backend: Backend
    active: ActiveSet
    lease_s: float
    poll_s: float
    unload_wait_s: float
    metrics: Callable[[], bytes]
    clock: Callable[[], float] = time.monotonic
    _lease_end_s: float = -math.inf
    _known: int = AT_ONCE
    _versions: dict[str, ProfileVersion] = field(default_factory=dict)
    _prepared: ActiveSet | None = None
    _refused: tuple[int, str] | None = None
    _candidate: ActiveSet | None = None
    _preparing: asyncio.Task[None] | None = None
    _freeing: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _num_ended: dict[str, int] = field(default_factory=dict)
    _following: asyncio.Task[None] | None = None

    @property
    def is_current(self) -> bool:
        return self.clock() < self._lease_end_s

    async def start(self, *, timeout_s: float) -> None:
        """Follow from now on. Raises EngineStopped when the active profiles could not be had in time."""
        self._versions = {version.digest: version for version in self.loader.registry}
        self.backend.is_behind = lambda: not self.is_current
        self._following = asyncio.create_task(self._follow())
        deadline_s = self.clock() + timeout_s
        while not self.is_current:
            if self.clock() > deadline_s:
                await self.stop()
                raise EngineStopped(
                    f"replica {self.name} could not take the active profiles: {self._refused}"
                )
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        self._lease_end_s = -math.inf
        tasks = [
            task for task in (self._following, self._preparing, *self._freeing.values()) if task is not None
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.source.leave(self.name)

    async def _follow(self) -> None:
        while True:
            try:
                await self._ask(known=self._known, wait_s=self.poll_s)
            except Exception as error:  # noqa: BLE001 - whatever it is, the lease ends unless the next try succeeds
                logger.warning("the ledger was not reached or not followed: %s", type(error).__name__)
                await asyncio.sleep(RETRY_S)

    async def _ask(self, *, known: int, wait_s: float) -> None:
        asked_s, report = self.clock(), self._report()
        orders = await self.source.poll(report, known=known, wait_s=wait_s)
        self._known = orders.version
        await self._obey(orders)
        # As the ledger counts it: a lease is on what was said to be served, not on what is served since.
        if orders.active == report.active == self.active:
            self._lease_end_s = max(self._lease_end_s, asked_s + self.lease_s)

    async def _obey(self, orders: Orders) -> None:
        if orders.is_draining and not self.backend.is_draining:
            self.backend.is_draining = True
            self._known = AT_ONCE  # tell at once
        if orders.active != self.active:
            # From here to the change there is nothing to wait for where it was prepared: no request sees half of it.
            if self._prepared != orders.active:
                await self._catch_up(orders.active)
            self._activate(orders.active)
            self._known = AT_ONCE  # tell at once
        if orders.candidate != self._candidate:
            self._consider(orders.candidate)

    async def _catch_up(self, active: ActiveSet) -> None:
        self._lease_end_s = -math.inf
        try:
            await self._prepare(active)
        except UldError as error:
            self._refused = (active.number, error.message)
            self._known = AT_ONCE
            raise

    def _activate(self, active: ActiveSet) -> None:
        """In one go: no coroutine runs in between."""
        before = {version.name: version for version in self.loader.registry}
        for entry in active.entries.values():
            self.loader.put(self._versions[entry.digest])
            task = self._freeing.pop(entry.digest, None)
            if task is not None:
                task.cancel()
        for name in before.keys() - active.entries.keys():
            version = self.loader.registry.remove(name)
            self._freeing[version.digest] = asyncio.create_task(self._free(version))
        self.active, self._prepared = active, None
        self._versions = {version.digest: version for version in self.loader.registry}

    async def _free(self, version: ProfileVersion) -> None:
        self._num_ended[version.digest] = await self.loader.free(version, wait_s=self.unload_wait_s)

    def _consider(self, candidate: ActiveSet | None) -> None:
        """A new candidate is prepared beside the requests; one that was given up is forgotten."""
        if self._preparing is not None:
            self._preparing.cancel()
        self._candidate, self._preparing = candidate, None
        self._prepared = self._refused = None
        if candidate is not None:
            self._preparing = asyncio.create_task(self._judge(candidate))
        else:
            self._preparing = asyncio.create_task(self._drop_unused())

    async def _judge(self, candidate: ActiveSet) -> None:
        try:
            await self._prepare(candidate)
            self._prepared = candidate
        except UldError as error:
            self._refused = (candidate.number, error.message)
        except Exception:
            logger.exception("a profile could not be prepared")
            self._refused = (candidate.number, "it could not be prepared; the replica's log says why")
        try:  # what is ordered by now, _follow is told too
            await self.source.poll(self._report(), known=AT_ONCE, wait_s=0.0)
        except Exception as error:  # noqa: BLE001 - _follow will say it
            logger.warning("the ledger was not told of a candidate: %s", type(error).__name__)

    async def _prepare(self, wanted: ActiveSet) -> None:
        """Raises UldError for what cannot be served here exactly as wanted."""
        for name, entry in wanted.entries.items():
            if entry.digest not in self._versions:
                version = await self.loader.read(name, directory=entry.directory, digest=entry.digest)
                await self.loader.admit(version)
                self._versions[version.digest] = version

    async def _drop_unused(self) -> None:
        for version in self._unused():
            del self._versions[version.digest]
            await self.loader.host.drop(version)

    def _unused(self) -> Iterable[ProfileVersion]:
        kept = self.active.digests
        return [version for digest, version in self._versions.items() if digest not in kept]

    def _report(self) -> Report:
        held = self.loader.leases.counts
        for digest, task in self._freeing.items():
            if not task.done():
                held.setdefault(digest, 1)  # until it is known how many had to be ended
        return Report(
            replica=self.name,
            active=self.active,
            prepared=self._prepared,
            refused=self._refused,
            held=held,
            num_ended=dict(self._num_ended),
            is_draining=self.backend.is_draining,
            num_running=self.backend.in_flight.num_admitted,
            metrics=self.metrics(),
        )
