"""Builds the FastAPI application: routes, errors, OpenAPI document, engine start and stop. Called by command and by
tests. Knows no socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from fastapi import FastAPI

from uld_serve import __version__
from uld_serve.server import chat, completions, faults, files, fine_tuning_jobs, models, page, status, tokens
from uld_serve.server.admission import Backend
from uld_serve.server.catalog import Catalog
from uld_serve.server.edge import Edge
from uld_serve.server.fine_tuning.workshop import Workshop
from uld_serve.server.openapi import document
from uld_serve.server.responses import ERRORS

ROUTES = (completions, chat, tokens, models, files, fine_tuning_jobs, status, page)


def create_app(
    catalog: Catalog, backend: Backend, workshop: Workshop | None = None, *, playground: bool = True
) -> FastAPI:
    """The whole API over one engine, which starts and stops with the application, as the workshop does, and the page
    that tries it out."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        backend.engine.start()
        try:
            async with nullcontext() if workshop is None else workshop.open():
                yield
        finally:
            await asyncio.to_thread(backend.engine.stop)

    # Interactive docs would load their scripts from another host.
    app = FastAPI(
        title="uld-serve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        redirect_slashes=False,
    )
    app.state.catalog = catalog
    app.state.backend = backend
    app.state.workshop = workshop
    app.add_middleware(Edge, metrics=backend.telemetry.metrics)
    backend.telemetry.metrics.watch_engine(lambda: backend.engine.load)
    backend.telemetry.metrics.watch_profiles(catalog.registry.names, lambda: backend.leases.total)
    faults.install(app)
    for module in ROUTES:
        if playground or module is not page:
            module.add_routes(app)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app
