"""The ledger as one named actor of a Ray cluster, with the operators' listener beside it, and the way to it. Found by
its name, so that replicas of whatever age mean the same one."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path

import ray
from ray.exceptions import RayActorError

from uld_serve.assembly import profile_roots
from uld_serve.errors import InvalidRequest
from uld_serve.fleet.active_set import first_set, read_set, same_directories
from uld_serve.fleet.fleet_desk import FleetDesk
from uld_serve.fleet.ledger import Ledger, Orders, Report
from uld_serve.fleet.replica import FleetPlan
from uld_serve.server import logs
from uld_serve.server.admin import create_admin_app
from uld_serve.server.catalog import Access
from uld_serve.server.listener import Beside, bound_socket
from uld_serve.server.serving import telemetry_of

NAME, NAMESPACE = "uld-serve-ledger", "uld-serve"
# Ray gives every head node a little of this; it is where the file is and where operators look for the listener.
HEAD_ONLY = {"node:__internal_head__": 0.001}


class LedgerHost:
    """What the actor runs. All its methods run in one event loop."""

    def __init__(self, plan: FleetPlan) -> None:
        settings, fleet = plan.settings_of("ledger"), plan.fleet
        logs.configure(settings.log)
        self._plan = plan
        active = read_set(fleet.active_file) or first_set(self._roots())
        self._ledger = Ledger(
            active, path=fleet.active_file, lease_s=fleet.lease_s, prepare_s=fleet.prepare_s
        )
        desk = FleetDesk(
            self._ledger, self._roots, lambda: self._plan.keys.policies.values(), telemetry_of(settings)
        )
        self._app = create_admin_app(Access(keys=plan.keys, limits=settings.limits), desk)
        self._listening: asyncio.Task[None] | None = None

    def _roots(self) -> list[Path]:
        roots = list(profile_roots(self._plan.settings.model, self._plan.settings.profiles))
        if twice := same_directories(roots):
            raise InvalidRequest(f"two profile folders of one name would be a guess: {', '.join(twice)}")
        return roots

    async def use(self, plan: FleetPlan) -> None:
        """The keys, limits and roots of the newest deployment hold for operators too."""
        if plan.fleet.active_file != self._plan.fleet.active_file:
            raise InvalidRequest(
                f"this fleet's active profiles are in {self._plan.fleet.active_file}; it has one such file for all its "
                "life"
            )
        if self._listening is None and plan.settings.admin.port is not None:
            admin = plan.settings.admin
            sock = bound_socket(admin.host, admin.port or 0)
            self._listening = asyncio.create_task(Beside(self._app, plan.settings.limits, sock).serve())
        if plan.made_s > self._plan.made_s:
            self._plan = plan
            access = self._app.state.catalog
            self._app.state.catalog = replace(access, keys=plan.keys, limits=plan.settings.limits)

    async def poll(self, report: Report, known: int, wait_s: float) -> Orders:
        return await self._ledger.poll(report, known=known, wait_s=wait_s)

    async def leave(self, replica: str) -> None:
        await self._ledger.leave(replica)


class LedgerSource:
    """The ledger as a Member sees it. An actor that is gone for good is made anew, from its file."""

    def __init__(self, plan: FleetPlan) -> None:
        self._plan = plan
        self._actor: ray.actor.ActorHandle | None = None

    async def poll(self, report: Report, *, known: int, wait_s: float) -> Orders:
        try:
            actor = await self._found()
            orders: Orders = await actor.poll.remote(report, known, wait_s)
        except RayActorError:
            self._actor = None
            raise
        return orders

    async def leave(self, replica: str) -> None:
        try:
            await (await self._found()).leave.remote(replica)
        except RayActorError:
            self._actor = None  # its lease ends by itself

    async def _found(self) -> ray.actor.ActorHandle:
        if self._actor is None:
            actor = open_ledger(self._plan)
            await actor.use.remote(self._plan)
            self._actor = actor
        return self._actor


def open_ledger(plan: FleetPlan) -> ray.actor.ActorHandle:
    return (
        ray.remote(LedgerHost)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=1000,
            num_cpus=0,
            resources=HEAD_ONLY,
        )
        .remote(plan)
    )


def close_ledger() -> None:
    """For good; what is active stays in its file."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(NAME, namespace=NAMESPACE))
