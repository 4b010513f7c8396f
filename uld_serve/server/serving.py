"""What is loaded, put behind its two listeners: the API and, with a port for it, the operators'. Called by command;
knows no argument of the command line."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastapi import FastAPI

from uld_serve.assembly import Assembly
from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.server.admin import Desk, create_admin_app
from uld_serve.server.admission import Backend
from uld_serve.server.app import create_app
from uld_serve.server.audit import AuditLog
from uld_serve.server.catalog import Catalog
from uld_serve.server.fine_tuning.order import BaseChoice
from uld_serve.server.fine_tuning.premises import Premises
from uld_serve.server.fine_tuning.workshop import Workshop
from uld_serve.server.keys import KeyRing
from uld_serve.server.listener import Beside, Listener
from uld_serve.server.loader import EngineHost, Loader
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.reload import Reloader
from uld_serve.server.settings import ServerSettings
from uld_serve.server.telemetry import Telemetry
from uld_serve.server.tracing import Tracing


def telemetry_of(settings: ServerSettings) -> Telemetry:
    """Raises InvalidRequest for a log that cannot be written, and for traces without their packages."""
    return Telemetry(
        audit=None if settings.audit_log is None else AuditLog(settings.audit_log, settings.audit),
        tracing=Tracing.start() if settings.tracing else None,
    )


def catalog_from(assembly: Assembly, settings: ServerSettings, keys: KeyRing) -> Catalog:
    return Catalog(
        model=assembly.base.served_name,
        registry=assembly.registry,
        tokenizer=assembly.engine.tokenizer,
        max_model_len=assembly.engine.config.max_model_len,
        created=int(time.time()),
        keys=keys,
        limits=settings.limits,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """`reloader`: what SIGHUP does, if there is a file to read again; `admin_sock`: the operators' address, bound;
    `premises`: where profiles are made on request, if they are."""

    assembly: Assembly
    settings: ServerSettings
    catalog: Catalog
    telemetry: Telemetry
    admin_sock: socket.socket | None
    premises: Premises | None
    reloader: Reloader | None

    def listener(self, *, on_ready: Callable[[], None]) -> Listener:
        backend = Backend(AsyncEngine(self.assembly.engine), telemetry=self.telemetry)
        apps: list[FastAPI] = []

        def policies() -> Iterable[KeyPolicy]:
            keys: KeyRing = apps[0].state.catalog.keys
            return keys.policies.values()

        loader = self._loader(backend, policies)
        workshop = self._workshop(backend, loader, policies)
        apps.append(create_app(self.catalog, backend, workshop, playground=self.settings.playground))
        beside = None
        if self.admin_sock is not None:
            desk = Desk(backend, loader, self.settings.admin.unload_wait_s)
            apps.append(create_admin_app(self.catalog, desk))
            beside = Beside(apps[-1], self.settings.limits, self.admin_sock)
        listener = Listener(
            apps[0],
            backend,
            self.settings.limits,
            on_ready=on_ready,
            on_hangup=None if self.reloader is None else lambda: self._reload(apps, listener),
            beside=beside,
        )
        return listener

    def _reload(self, apps: list[FastAPI], listener: Listener) -> None:
        assert self.reloader is not None
        self.reloader.reload(apps, listener)

    def _loader(self, backend: Backend, policies: Callable[[], Iterable[KeyPolicy]]) -> Loader:
        premises = self.premises
        loader = Loader(
            registry=self.catalog.registry,
            roots=(*self.assembly.roots, *(() if premises is None else (premises.profiles,))),
            host=EngineHost(backend.engine, self.assembly.base),
            leases=backend.leases,
            in_flight=backend.in_flight,
            policies=policies,
        )
        if premises is not None:
            loader.record = premises.record
        return loader

    def _workshop(
        self, backend: Backend, loader: Loader, policies: Callable[[], Iterable[KeyPolicy]]
    ) -> Workshop | None:
        settings = self.settings.fine_tuning
        if settings is None or self.premises is None:
            return None
        base = BaseChoice(
            model=self.settings.model,
            dtype=self.settings.dtype,
            device=settings.device or self.settings.device,
        )
        return Workshop.of(
            settings,
            self.premises,
            base=base,
            loader=loader,
            policies=policies,
            telemetry=self.telemetry,
            is_draining=lambda: backend.is_draining,
        )
