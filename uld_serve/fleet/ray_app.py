"""The fleet as a Ray Serve application: doors in front of replicas. `build` is the import path of Serve's config files;
`uld-serve ray` calls it too."""

from __future__ import annotations

import logging
import time

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from uld_serve.errors import EngineStopped, InvalidRequest, Overloaded, UldError
from uld_serve.fleet.door import Batches, Door
from uld_serve.fleet.forwarded import Forwarded
from uld_serve.fleet.ray_ledger import LedgerSource
from uld_serve.fleet.replica import FleetPlan, Replica
from uld_serve.fleet.settings import FleetSettings
from uld_serve.server.faults import internal_error
from uld_serve.server.key_sources import safe_keys
from uld_serve.server.settings import ServerSettings, checked, read_settings

logger = logging.getLogger(__name__)

APPLICATION = "uld-serve"
ROUTER = "uld_serve.fleet.router:AffinityRouter"
ENDING_S = 5.0  # beyond the grace of running requests


class ReplicaDeployment:
    """Ready when the replica is; replaced when it says that it is not."""

    async def __init__(self, plan: FleetPlan) -> None:  # type: ignore[misc] # Ray awaits it
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(plan, name, LedgerSource(plan))
        try:
            await self._replica.start()
        except BaseException:
            await self._replica.stop()
            raise

    async def answer(self, request: Forwarded) -> Batches:
        async for batch in self._replica.answer(request):
            yield batch

    async def check_health(self) -> None:
        await self._replica.check()

    async def __del__(self) -> None:  # Ray awaits it, when no request is left
        if hasattr(self, "_replica"):
            await self._replica.stop()


class DoorDeployment:
    def __init__(self, plan: FleetPlan, replicas: DeploymentHandle) -> None:
        self._replicas = replicas
        self._plan = plan

    def __serve_build_asgi_app__(self) -> Door:
        return Door(
            self._send_to,
            self._error_of,
            limits=self._plan.settings.limits,
            prefix_chars=self._plan.fleet.prefix_chars,
        )

    async def _send_to(self, key: str, request: Forwarded) -> Batches:
        batches = self._replicas.options(stream=True, session_id=key).answer.remote(request)
        is_over = False
        try:
            async for batch in batches:
                yield batch
            is_over = True
        finally:
            if not is_over:
                batches.cancel()  # so that its replica hears that the client is gone

    def _error_of(self, error: Exception) -> UldError:
        if isinstance(error, BackPressureError):
            return Overloaded(
                "every replica is busy and the queue is full; send it again later",
                retry_after_s=self._plan.fleet.retry_after_s,
            )
        if isinstance(error, DeploymentUnavailableError | RayActorError):
            return EngineStopped("the replica that had this request is gone; send it again")
        logger.error("a request failed between door and replica: %s", type(error).__name__)
        return internal_error()


def build(args: dict[str, object]) -> serve.Application:
    """From a Serve config file's `args`, which are FleetSettings. Its HTTP options are not seen here, so there must be
    keys. Raises UldError."""
    fleet = checked(FleetSettings, args, source="the application's args")
    plan = plan_of(fleet, read_settings(fleet.config) if fleet.config is not None else ServerSettings())
    if plan.keys.is_open:
        raise InvalidRequest(
            "a fleet from a Serve config needs keys: add [[keys]] to server.toml, or set ULD_SERVE_API_KEY"
        )
    return application_of(plan)


def plan_of(fleet: FleetSettings, settings: ServerSettings) -> FleetPlan:
    """Raises UldError for what a server alone would refuse, too."""
    return FleetPlan(settings, safe_keys(settings), fleet, made_s=time.time())


def _router_of(fleet: FleetSettings) -> RequestRouterConfig:
    if fleet.routing == "load":
        return RequestRouterConfig()
    return RequestRouterConfig(request_router_class=ROUTER, request_router_kwargs={"slack": fleet.slack})


def application_of(plan: FleetPlan) -> serve.Application:
    fleet, grace_s = plan.fleet, plan.settings.limits.grace_s + ENDING_S
    replicas = serve.deployment(
        ReplicaDeployment,
        name="replica",
        max_ongoing_requests=fleet.max_ongoing_requests,
        max_queued_requests=fleet.max_queued_requests,
        autoscaling_config=AutoscalingConfig(
            min_replicas=fleet.min_replicas,
            max_replicas=fleet.max_replicas,
            initial_replicas=fleet.min_replicas,
            target_ongoing_requests=fleet.target_ongoing_requests,
            upscale_delay_s=fleet.upscale_delay_s,
            downscale_delay_s=fleet.downscale_delay_s,
        ),
        request_router_config=_router_of(fleet),
        ray_actor_options={"num_cpus": fleet.num_cpus, "num_gpus": fleet.num_gpus},
        graceful_shutdown_timeout_s=grace_s,
        health_check_period_s=fleet.lease_s / 2,
        health_check_timeout_s=fleet.lease_s,
    )
    doors = serve.deployment(
        serve.ingress()(DoorDeployment),
        name="door",
        num_replicas=fleet.num_doors,
        max_ongoing_requests=fleet.door_ongoing_requests,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=grace_s,
    )
    return doors.bind(plan, replicas.bind(plan))
