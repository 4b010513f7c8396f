"""The real application behind a real socket, in a thread, over a fake engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from fake_engine import MAX_MODEL_LEN, FakeEngine, FakeTokenizer, registry
from fastapi import FastAPI
from openai import OpenAI

from uld_serve.profiles.registry import Registry
from uld_serve.server.admin import Desk, create_admin_app
from uld_serve.server.admission import Backend
from uld_serve.server.app import create_app
from uld_serve.server.catalog import Catalog
from uld_serve.server.fine_tuning.foreman import Runner
from uld_serve.server.fine_tuning.order import BaseChoice
from uld_serve.server.fine_tuning.premises import Premises
from uld_serve.server.fine_tuning.settings import FineTuningSettings
from uld_serve.server.fine_tuning.workshop import Workshop
from uld_serve.server.keys import KeyRing, sha256_of
from uld_serve.server.listener import Beside, Listener, bound_socket
from uld_serve.server.loader import Host, Loader
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.settings import Limits
from uld_serve.server.telemetry import Telemetry

MODEL = "tiny-llama"
CREATED = 1_700_000_000


def make_catalog(
    *,
    keys: dict[str, KeyPolicy] | None = None,
    limits: Limits | None = None,
    tokenizer: FakeTokenizer | None = None,
    profiles: Registry | None = None,
) -> Catalog:
    return Catalog(
        model=MODEL,
        registry=registry() if profiles is None else profiles,
        tokenizer=tokenizer or FakeTokenizer(),
        max_model_len=MAX_MODEL_LEN,
        created=CREATED,
        keys=KeyRing({sha256_of(key.encode()): policy for key, policy in (keys or {}).items()}),
        limits=limits or Limits(),
    )


@dataclass
class LiveServer:
    engine: FakeEngine
    backend: Backend
    listener: Listener
    thread: threading.Thread
    port: int
    admin_port: int | None = None
    loader: Loader | None = None
    apps: list[FastAPI] = field(default_factory=list)
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=10))

    @classmethod
    def start(
        cls,
        catalog: Catalog,
        engine: FakeEngine | None = None,
        telemetry: Telemetry | None = None,
        host: Host | None = None,
        roots: tuple[Path, ...] = (),
        unload_wait_s: float = 10.0,
        fine_tuning: FineTuningSettings | None = None,
        runner: Runner | None = None,
    ) -> LiveServer:
        """With a `host` there is an admin listener, which takes profiles from `roots`; with `fine_tuning` too, profiles
        are made on request, by `runner`."""
        engine = engine or FakeEngine()
        backend = Backend(engine, telemetry=telemetry or Telemetry())
        sock = bound_socket("127.0.0.1", 0)
        port = sock.getsockname()[1]
        is_ready = threading.Event()
        beside, loader, admin_port, workshop = None, None, None, None
        apps: list[FastAPI] = []

        def policies() -> Iterable[KeyPolicy]:
            return apps[0].state.catalog.keys.policies.values()

        if host is not None:
            loader = Loader(
                catalog.registry, roots, host, backend.leases, backend.in_flight, policies=policies
            )
        if fine_tuning is not None:
            assert loader is not None
            premises = Premises.open(fine_tuning)
            loader.roots, loader.record = (*roots, premises.profiles), premises.record
            workshop = Workshop.of(
                fine_tuning,
                premises,
                base=BaseChoice(model=None, dtype="float32", device="cpu"),
                loader=loader,
                policies=policies,
                telemetry=backend.telemetry,
                is_draining=lambda: backend.is_draining,
                runner=runner,
            )
        app = create_app(catalog, backend, workshop)
        apps.append(app)
        if loader is not None:
            admin_sock = bound_socket("127.0.0.1", 0)
            admin_port = admin_sock.getsockname()[1]
            apps.append(create_admin_app(catalog, Desk(backend, loader, unload_wait_s)))
            beside = Beside(apps[-1], catalog.limits, admin_sock)
        listener = Listener(app, backend, catalog.limits, on_ready=is_ready.set, beside=beside)
        thread = threading.Thread(target=listener.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        assert is_ready.wait(10)
        return cls(engine, backend, listener, thread, port, admin_port, loader, apps)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "any") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=10)

    def post(self, path: str, body: object = None, **kwargs: object) -> httpx.Response:
        return self.http.post(self.url + path, json=body, **kwargs)

    def get(self, path: str, **kwargs: object) -> httpx.Response:
        return self.http.get(self.url + path, **kwargs)

    def admin(self, method: str, path: str, key: str | None = None, **kwargs: object) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return self.http.request(
            method, f"http://127.0.0.1:{self.admin_port}{path}", headers=headers, **kwargs
        )

    def reset(self) -> None:
        """A fresh fake's behaviour, the same server."""
        fresh = FakeEngine(is_alive=True)
        for name in FakeEngine.__dataclass_fields__:
            setattr(self.engine, name, getattr(fresh, name))

    def stop(self) -> None:
        self.http.close()
        self.listener.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server did not stop"


def wait_until(is_so: object, *, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)
