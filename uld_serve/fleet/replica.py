"""One replica of a fleet: the same application that `serve` listens with, over exactly the profiles that the ledger
says are active. Held by a Ray Serve deployment; knows no Ray.

Whatever is missing or differs ends its start: a replica that is not like the others never becomes ready.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field

from fastapi import FastAPI

from uld_serve.assembly import Assembly, assemble, profile_roots
from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.errors import EngineStopped, InvalidRequest, ProfileMismatch
from uld_serve.fleet.active_set import ActiveSet
from uld_serve.fleet.door import Batches
from uld_serve.fleet.forwarded import Forwarded, answer
from uld_serve.fleet.ledger import Report
from uld_serve.fleet.member import AT_ONCE, Member, Source
from uld_serve.fleet.settings import FleetSettings
from uld_serve.profiles.registry import Registry
from uld_serve.server import logs
from uld_serve.server.admission import Backend
from uld_serve.server.app import create_app
from uld_serve.server.keys import KeyRing
from uld_serve.server.loader import EngineHost, Loader, find_version
from uld_serve.server.serving import catalog_from, telemetry_of
from uld_serve.server.settings import ServerSettings, check_profiles_exist


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """The same for every replica, because it is made once: settings, the keys' hashes, and when that was, in Unix
    seconds."""

    settings: ServerSettings
    keys: KeyRing
    fleet: FleetSettings
    made_s: float

    def __post_init__(self) -> None:
        """Raises InvalidRequest for a setting that a fleet has no place for."""
        if self.settings.fine_tuning is not None:
            raise InvalidRequest(
                "[fine_tuning] is for one server: its jobs lie in one folder and go live in one process. Leave it out "
                "of the fleet's settings, make profiles elsewhere, and load them through the admin listener"
            )
        if self.settings.tensor_parallel is not None:
            raise InvalidRequest(
                "tensor_parallel is for one server: a replica of a fleet is one process. Leave it out of the settings"
            )

    def settings_of(self, replica: str) -> ServerSettings:
        """With an audit log of its own: two processes that append to one and rotate it would lose lines."""
        path = self.settings.audit_log
        if path is None:
            return self.settings
        named = path.with_name(f"{path.stem}.{replica}{path.suffix}")
        return self.settings.model_copy(update={"audit_log": named})


@dataclass(slots=True, eq=False)
class Replica:
    plan: FleetPlan
    name: str
    source: Source
    _app: FastAPI | None = None
    _backend: Backend | None = None
    _until_stop: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start(self) -> None:
        """Ready when this returns. Raises UldError, or what reaching the ledger raises."""
        settings, fleet = self.plan.settings_of(self.name), self.plan.fleet
        logs.configure(settings.log)
        orders = await self.source.poll(Report(self.name), known=AT_ONCE, wait_s=0.0)
        assembly = await asyncio.to_thread(assemble_active, settings, orders.active)
        check_profiles_exist(settings.keys, assembly.registry)
        telemetry = telemetry_of(settings)
        catalog = catalog_from(assembly, settings, self.plan.keys)
        self._backend = Backend(AsyncEngine(assembly.engine), telemetry=telemetry)
        self._app = create_app(catalog, self._backend, playground=settings.playground)
        await self._until_stop.enter_async_context(self._app.router.lifespan_context(self._app))
        member = Member(
            self.name,
            self.source,
            loader_of(assembly, self._backend, self.plan.keys),
            self._backend,
            orders.active,
            lease_s=fleet.lease_s,
            poll_s=fleet.poll_s,
            unload_wait_s=settings.admin.unload_wait_s,
            metrics=telemetry.metrics.text,
        )
        await member.start(timeout_s=fleet.start_s)
        self._until_stop.push_async_callback(member.stop)

    def answer(self, request: Forwarded) -> Batches:
        assert self._app is not None, "requests come after start"
        return answer(self._app, request)

    async def check(self) -> None:
        """What /ready says; what /health says of a replica that drains, which is not to be replaced for it. Raises
        EngineStopped."""
        assert self._backend is not None
        path = "/health" if self._backend.is_draining else "/ready"
        scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": path}
        request = Forwarded({**scope, "query_string": b"", "root_path": "", "headers": []}, b"")
        async with aclosing(self.answer(request)) as batches:
            first = (await anext(batches))[0]
        if first["status"] != 200:
            raise EngineStopped(f"{path} of replica {self.name} answers {first['status']}")

    async def stop(self) -> None:
        await self._until_stop.aclose()


def assemble_active(settings: ServerSettings, active: ActiveSet) -> Assembly:
    """Base, engine and exactly the active versions, each found by its folder and compared by its digest. Raises
    ProfileError or NotFound."""
    roots = profile_roots(settings.model, settings.profiles)
    registry = Registry()
    for name, entry in active.entries.items():
        version = find_version(roots, name, entry.directory)
        if version.digest != entry.digest:
            raise ProfileMismatch(
                f"profile '{name}' in folder '{entry.directory}' is {version.digest}, but {entry.digest} is active"
            )
        registry.add(version)
    return assemble(
        settings.model,
        profiles=settings.profiles,
        dtype=settings.dtype,
        device=settings.device,
        settings=settings.engine,
        registry=registry,
    )


def loader_of(assembly: Assembly, backend: Backend, keys: KeyRing) -> Loader:
    return Loader(
        registry=assembly.registry,
        roots=assembly.roots,
        host=EngineHost(backend.engine, assembly.base),
        leases=backend.leases,
        in_flight=backend.in_flight,
        policies=keys.policies.values,
    )
