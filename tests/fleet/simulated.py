"""A fleet in one event loop: real ledger, members and loaders over engines that only remember what they took."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fake_engine import FakeEngine, profile_version

from uld_serve.engine.plan import Applied, Decision
from uld_serve.errors import NotFound, ProfileMismatch, UldError
from uld_serve.fleet.active_set import ActiveSet, Entry
from uld_serve.fleet.ledger import Ledger, Orders, Report
from uld_serve.fleet.member import Member
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.registry import Registry
from uld_serve.server.admission import Backend
from uld_serve.server.loader import Loader

LEASE_S, POLL_S = 0.4, 0.1


def entry(digit: str) -> Entry:
    return Entry(digest="sha256:" + digit * 64, directory=f"folder-{digit}")


FIRST = ActiveSet(number=1, entries={"acme": entry("a"), "secret": entry("c")})


@dataclass
class Engine:
    """Admits versions, or refuses with `error`, or takes `admit_s`."""

    error: UldError | None = None
    admit_s: float = 0.0
    admitted: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    async def admit(self, version: ProfileVersion) -> None:
        await asyncio.sleep(self.admit_s)
        if self.error is not None:
            raise self.error
        self.admitted.append(version.digest)

    async def drop(self, version: ProfileVersion) -> None:
        self.dropped.append(version.digest)


@dataclass
class Disk(Loader):
    """A loader whose folders are made up: `folder-a` holds a version with digest aaa… of whatever name is asked, and
    those in `known` have the digest there."""

    missing: set[str] = field(default_factory=set)
    known: dict[str, str] = field(default_factory=dict)

    async def read(self, name: str, *, directory: str | None, digest: str | None) -> ProfileVersion:
        assert directory is not None
        if directory in self.missing:
            raise NotFound(f"no configured root has a profile folder of that name for '{name}'")
        version = profile_version(name, digit=directory[-1])
        if directory in self.known:
            version = replace(version, digest=self.known[directory])
        if version.digest != digest:
            raise ProfileMismatch(f"profile '{name}' there is {version.digest}, not the one asked for")
        return version


@dataclass
class Wire:
    """The way to a ledger, which can be cut."""

    ledger: Ledger
    is_cut: bool = False

    async def poll(self, report: Report, *, known: int, wait_s: float) -> Orders:
        if self.is_cut:
            raise ConnectionError("cut")
        orders = await self.ledger.poll(report, known=known, wait_s=wait_s)
        if self.is_cut:
            raise ConnectionError("cut")
        return orders

    async def leave(self, replica: str) -> None:
        if not self.is_cut:
            await self.ledger.leave(replica)


@dataclass
class Node:
    member: Member
    wire: Wire
    engine: Engine
    loader: Disk
    backend: Backend

    @property
    def digests(self) -> dict[str, str]:
        return {version.name: version.digest for version in self.loader.registry}

    @contextmanager
    def request(self, name: str):
        version = self.loader.registry.get(name)
        with self.backend.leases.held(Decision.forgetting([Applied(version, 1.0)])):
            yield version.digest


@dataclass
class Fleet:
    ledger: Ledger
    nodes: dict[str, Node] = field(default_factory=dict)
    _until: AsyncExitStack = field(default_factory=AsyncExitStack)

    def make(self, name: str, active: ActiveSet | None = None) -> Node:
        """A node that serves `active` (default: what the ledger says) and has not started to follow."""
        active = active or self.ledger.active
        versions = [profile_version(n, digit=one.directory[-1]) for n, one in active.entries.items()]
        backend, engine = Backend(FakeEngine()), Engine()
        loader = Disk(Registry(versions), (), engine, backend.leases, backend.in_flight, policies=tuple)
        wire = Wire(self.ledger)
        member = Member(
            name,
            wire,
            loader,
            backend,
            active,
            lease_s=LEASE_S,
            poll_s=POLL_S,
            unload_wait_s=0.2,
            metrics=lambda: f"# {name}\n".encode(),
        )
        self.nodes[name] = Node(member, wire, engine, loader, backend)
        return self.nodes[name]

    async def start(self, name: str, active: ActiveSet | None = None) -> Node:
        node = self.make(name, active)
        await node.member.start(timeout_s=5)
        self._until.push_async_callback(node.member.stop)
        return node


@asynccontextmanager
async def fleet(
    path: Path, *names: str, active: ActiveSet = FIRST, prepare_s: float = 5.0
) -> AsyncIterator[Fleet]:
    made = Fleet(Ledger(active, path=path, lease_s=LEASE_S, prepare_s=prepare_s))
    try:
        for name in names:
            await made.start(name)
        yield made
    finally:
        await made._until.aclose()


async def until(is_so: object, *, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_so():
            await asyncio.sleep(0.01)
