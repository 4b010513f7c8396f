"""Loads and unloads profiles while requests run. Called by admin. A request keeps the version that it began with; the
next one gets the new version; what somebody holds is let go of when nobody does."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from uld_serve.assembly import facts_of, load_models
from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.live_profiles import admit_live, drop_live, missing_models
from uld_serve.errors import NotFound, ProfileError, ProfileMismatch
from uld_serve.model.loading import Base
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.registry import Registry, check_base, profile_directories
from uld_serve.profiles.store import read_profile
from uld_serve.server.in_flight import InFlight
from uld_serve.server.leases import Leases
from uld_serve.server.policy import KeyPolicy

END_INTERVAL_S = 0.1


class Host(Protocol):
    """Where versions run."""

    async def admit(self, version: ProfileVersion) -> None:
        """All checks that a start makes. Raises ProfileError or Overloaded."""

    async def drop(self, version: ProfileVersion) -> None:
        """Forget what is kept in memory of a version that nobody uses."""


@dataclass(frozen=True, slots=True)
class EngineHost:
    engine: AsyncEngine
    base: Base

    async def admit(self, version: ProfileVersion) -> None:
        check_base(version, facts_of(self.base))
        missing = await missing_models(self.engine, version)
        models = await asyncio.to_thread(load_models, [version], self.base) if missing else {}
        await admit_live(self.engine, version, models)

    async def drop(self, version: ProfileVersion) -> None:
        await drop_live(self.engine, version)


@dataclass(frozen=True, slots=True)
class Change:
    """What a name meant before and means now. `num_leases`: requests that hold what it meant before; `num_ended`: those
    that were ended because they held it for too long."""

    before: ProfileVersion | None
    now: ProfileVersion | None
    num_leases: int = 0
    num_ended: int = 0


@dataclass(slots=True, eq=False)
class Loader:
    """`policies` are the keys' as they are when asked: what they must apply is not unloaded. `record` is told what a
    name is about to mean, None for nothing; if it raises, everything stays as it was."""

    registry: Registry
    roots: tuple[Path, ...]
    host: Host
    leases: Leases
    in_flight: InFlight
    policies: Callable[[], Iterable[KeyPolicy]]
    record: Callable[[str, ProfileVersion | None], None] = lambda _name, _version: None
    _locks: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    _releases: set[asyncio.Task[None]] = field(default_factory=set)

    async def load(
        self,
        name: str,
        *,
        directory: str | None = None,
        digest: str | None = None,
        still: Callable[[], None] = lambda: None,
    ) -> Change:
        """Serve profile `name` as it lies in the folder `directory` (default: of its own name) of a configured root;
        refuse another `digest` if one is given. What served before goes on serving until this one has passed. `still`
        raises if the name may no longer be given: asked last, as others may have taken it while this one was checked.

        Raises NotFound for no such folder, ProfileError for what is in it.
        """
        async with self._locks[name]:
            version = await self.read(name, directory=directory, digest=digest)
            before = self.registry.get(name) if name in self.registry.names() else None
            if before is not None and before.digest == version.digest:
                return Change(before, before, self.leases.count(before.digest))
            await self.admit(version)
            try:
                still()
                self.record(name, version)
            except BaseException:
                await self.host.drop(version)
                raise
            self.put(version)
        return Change(before, version, 0 if before is None else self.leases.count(before.digest))

    async def unload(self, name: str, *, wait_s: float) -> Change:
        """From now on there is no profile `name`. Requests that hold it have `wait_s` to end; then they are ended with
        an error, and never go on without it.

        Raises UnknownProfile, and ProfileError where a key must apply it.
        """
        async with self._locks[name]:
            self.registry.get(name)
            require_unneeded(name, self.policies())
            self.record(name, None)
            version = self.registry.remove(name)
            num_leases = self.leases.count(version.digest)
            num_ended = await self.free(version, wait_s=wait_s)
        return Change(version, None, num_leases, num_ended)

    async def read(self, name: str, *, directory: str | None, digest: str | None) -> ProfileVersion:
        """The verified version in that folder. Raises as `load` does; nothing is served with it yet."""
        version = await asyncio.to_thread(find_version, self.roots, name, directory or name)
        if digest not in (None, version.digest):
            raise ProfileMismatch(f"profile '{name}' there is {version.digest}, not the one asked for")
        return version

    async def admit(self, version: ProfileVersion) -> None:
        """All checks of a start, on the running engine. What fails leaves nothing in memory."""
        try:
            await self.host.admit(version)
        except BaseException:
            await self.host.drop(version)
            raise

    def put(self, version: ProfileVersion) -> None:
        """From now on its name means this version, which was admitted; what it meant before ends with its requests."""
        before = self.registry.replace(version)
        if before is not None and before.digest != version.digest:
            self._release_when_free(before)

    async def free(self, version: ProfileVersion, *, wait_s: float) -> int:
        """Let go of a version that no name means; how many requests were ended because they held it for longer than
        `wait_s`."""
        num_ended = 0
        error = ProfileError(f"profile '{version.name}' was unloaded; nothing is answered without it")
        error.code = "profile_unloaded"
        is_free = await self.leases.until_free(version.digest, timeout_s=wait_s)
        while not is_free:
            num_ended += self.in_flight.end_those_with(version.digest, error)
            is_free = await self.leases.until_free(version.digest, timeout_s=END_INTERVAL_S)
        await self.host.drop(version)
        return num_ended

    def _release_when_free(self, version: ProfileVersion) -> None:
        task = asyncio.create_task(self._release(version))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _release(self, version: ProfileVersion) -> None:
        await self.leases.until_free(version.digest)
        if all(current.digest != version.digest for current in self.registry):
            await self.host.drop(version)


def find_version(roots: Iterable[Path], name: str, directory: str) -> ProfileVersion:
    """The profile `name` in the folder of that name under any root. Raises NotFound or ProfileError."""
    found = [path for root in roots for path in profile_directories(root) if path.name == directory]
    if not found:
        raise NotFound(f"no configured root has a profile folder of that name for '{name}'")
    version = read_profile(found[0])
    if version.name != name:
        raise ProfileMismatch(f"the profile in that folder is not named '{name}'")
    return version


def require_unneeded(name: str, policies: Iterable[KeyPolicy]) -> None:
    """Raise ProfileError where a key must apply profile `name`."""
    needing = sorted(one.name for one in policies if name in one.mandatory | one.default)
    if needing:
        raise ProfileError(
            f"keys apply profile '{name}': {', '.join(needing)}; change them first", code="profile_needed"
        )
