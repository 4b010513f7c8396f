"""GET /health, /ready and /version, for probes and load balancers: no key needed, nothing of a request told."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI
from starlette.responses import Response

from uld_serve import __version__
from uld_serve.errors import EngineStopped
from uld_serve.server.admission import BEHIND, Pulse, pulse_of
from uld_serve.server.catalog import Catalog, catalog_of
from uld_serve.server.responses import Status, Version, json_response

TheCatalog = Annotated[Catalog, Depends(catalog_of)]
ThePulse = Annotated[Pulse, Depends(pulse_of)]


def add_routes(app: FastAPI) -> None:
    app.add_api_route("/health", health, methods=["GET"], response_model=Status)
    app.add_api_route("/ready", ready, methods=["GET"], response_model=Status)
    app.add_api_route("/version", version, methods=["GET"], response_model=Version)


async def health(pulse: ThePulse, catalog: TheCatalog) -> Response:
    """200 while the step loop turns; 503 means that only a restart helps."""
    _require_beating(pulse, catalog)
    return json_response(Status(status="ok"))


async def ready(pulse: ThePulse, catalog: TheCatalog) -> Response:
    """200 only when a request sent now would be served."""
    if pulse.is_draining:
        raise EngineStopped("the server is draining: it finishes what it has and takes no more")
    if pulse.is_behind:
        raise EngineStopped(BEHIND)
    _require_beating(pulse, catalog)
    return json_response(Status(status="ready"))


async def version() -> Response:
    """Of this server."""
    return json_response(Version(version=__version__))


def _require_beating(pulse: Pulse, catalog: Catalog) -> None:
    if not pulse.is_alive:
        raise EngineStopped("the engine is down")
    if pulse.heartbeat_age_s > catalog.limits.heartbeat_timeout_s:
        raise EngineStopped(f"the engine has not finished a step for {pulse.heartbeat_age_s:.0f} s")
