"""A Ray cluster and Serve on it for as long as a fleet is to run. Called by command, and by tests and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatus

from uld_serve.errors import EngineStopped
from uld_serve.fleet.ray_app import APPLICATION, application_of
from uld_serve.fleet.ray_ledger import NAMESPACE, close_ledger
from uld_serve.fleet.replica import FleetPlan


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """The cluster at `address`, or a new one of this machine alone. Ray lets no cluster listen on 127.0.0.1 only: its
    own ports are open to whoever reaches this machine and has the cluster's token (in ~/.ray, made by Ray)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of every cluster
    if address is None:
        ray.init(namespace=NAMESPACE, log_to_driver=False, include_dashboard=False)
    else:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def running(plan: FleetPlan, *, is_ours: bool) -> Iterator[None]:
    """The fleet, ready. `is_ours`: nothing else is served on this cluster, so Serve ends with the fleet. Raises
    EngineStopped when it does not become ready."""
    settings = plan.settings
    serve.start(
        proxy_location=ProxyLocation.HeadOnly if is_ours else ProxyLocation.EveryNode,
        http_options=HTTPOptions(host=settings.host, port=settings.port),
    )
    try:
        try:
            serve.run(application_of(plan), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise EngineStopped(f"the fleet did not become ready: {_first_failure() or error}") from None
        yield
    finally:
        serve.delete(APPLICATION)
        close_ledger()
        if is_ours:
            serve.shutdown()


def _first_failure() -> str:
    application = serve.status().applications.get(APPLICATION)
    if application is None or application.status == ApplicationStatus.RUNNING:
        return ""
    messages = [one.message for one in application.deployments.values() if one.message]
    lines = [line for message in messages for line in message.strip().splitlines() if "Error" in line]
    return str(lines[-1].strip() if lines else application.message)
