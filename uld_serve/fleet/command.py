"""`uld-serve ray`: a fleet of replicas on a Ray cluster, started here or joined, with one address in front. Called by
cli; everything that can be wrong with settings is refused before Ray is asked for anything."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from rich.console import Console

from uld_serve.errors import InvalidRequest
from uld_serve.fleet.settings import FleetSettings
from uld_serve.server.settings import ServerSettings, checked, read_settings

LOCAL = "local"
OPTIONS = {
    "min_replicas": ("N", int, "replicas at least (default: 1)"),
    "max_replicas": ("N", int, "replicas at most (default: as at least)"),
    "target_ongoing_requests": (
        "N",
        float,
        "requests on each replica above which there should be more of them",
    ),
    "max_ongoing_requests": ("N", int, "requests that a replica takes at once"),
    "max_queued_requests": ("N", int, "requests that wait; more are answered 429"),
    "num_cpus": ("N", float, "processor cores that Ray reserves for a replica"),
    "num_gpus": ("N", float, "GPUs that Ray reserves for a replica"),
    "routing": ("HOW", str, "'prefix' (default): what begins alike goes to one replica; 'load': to any"),
    "prefix_chars": ("N", int, "how much of a prompt's beginning decides where it goes"),
    "slack": ("N", int, "requests that the preferred replica may have more than the least loaded one"),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("ray", help="serve from many replicas on Ray", description=__doc__)
    parser.add_argument(
        "--config", type=Path, metavar="server.toml", help="settings and keys, as for `serve`"
    )
    parser.add_argument(
        "--active",
        type=Path,
        required=True,
        metavar="FILE",
        help="where the head node keeps which profiles are active; begun from the configured profiles",
    )
    parser.add_argument(
        "--address",
        default=LOCAL,
        metavar="HOST:PORT",
        help="of a running Ray cluster, or 'auto' (default: a new one of this machine, ended with the command)",
    )
    for name, (unit, kind, what) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=unit, help=what)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C. Raises UldError when it cannot start."""
    settings = read_settings(args.config) if args.config is not None else ServerSettings()
    fleet = fleet_of(args)
    try:
        from uld_serve.fleet import ray_app, ray_service
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InvalidRequest("`uld-serve ray` needs Ray: pip install 'uld-serve[ray]'") from None
    plan = ray_app.plan_of(fleet, settings)
    address = None if args.address == LOCAL else args.address
    console = Console(stderr=True, highlight=False)
    stopped = stop_signal()
    with ray_service.cluster(address), ray_service.running(plan, is_ours=address is None):
        console.print(f"ready  http://{settings.host}:{settings.port}/v1")
        if settings.admin.port is not None:
            console.print(f"admin  http://{settings.admin.host}:{settings.admin.port}")
        stopped.wait()
    return 0


def fleet_of(args: argparse.Namespace) -> FleetSettings:
    """Raises InvalidRequest."""
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    given.setdefault("max_replicas", given.get("min_replicas", 1))
    named = {"active_file": args.active.absolute(), "config": args.config}
    return checked(FleetSettings, named | given, source="command line")


def stop_signal() -> threading.Event:
    """Set by SIGTERM and Ctrl-C, from now on."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopped.set())
    return stopped
