"""A Ray cluster and Serve on it for as long as a fleet is to run. Called by command, and by tests and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatus

from uld_serve.errors import EngineStopped
from uld_serve.fleet.ray_app import APPLICATION, application_of
from uld_serve.fleet.ray_ledger import NAMESPACE, close_ledger
from uld_serve.fleet.replica import FleetPlan

LOOPBACK = "127.0.0.1"


@contextmanager
def cluster(address: str | None, *, num_nodes: int = 1, num_cpus: int | None = None) -> Iterator[None]:
    """A cluster of this machine alone, which nobody else can reach, or the one at `address`. `num_nodes` and the
    `num_cpus` of each (default: this machine's) are of the first kind."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of every cluster
    with ExitStack() as until:
        if address is None:
            address = until.enter_context(_local(num_nodes, num_cpus or os.cpu_count() or 1))
        ray.init(address, namespace=NAMESPACE, log_to_driver=False)
        until.callback(ray.shutdown)
        yield


@contextmanager
def _local(num_nodes: int, num_cpus: int) -> Iterator[str]:
    """Its address. `ray.init` and `ray start` replace 127.0.0.1 with an address that others can reach, and listen
    there; a cluster that is made with it listens on it alone."""
    node = {"node_ip_address": LOOPBACK, "num_cpus": num_cpus, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(num_nodes - 1):
            made.add_node(node_ip_address=LOOPBACK, num_cpus=num_cpus)
        yield made.address
    finally:
        made.shutdown()


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
