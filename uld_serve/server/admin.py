"""The operators' application, on a listener and keys of its own: profiles come and go, the server drains, Prometheus
reads. Built by command; its routes generate nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Generic, Literal, Protocol, TypeVar

from fastapi import Depends, FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from uld_serve import __version__
from uld_serve.errors import Forbidden, InvalidRequest
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.server import faults
from uld_serve.server.admission import Backend
from uld_serve.server.body import read_body
from uld_serve.server.catalog import Access, access_of, policy_of
from uld_serve.server.edge import Edge
from uld_serve.server.json_gate import parse_object
from uld_serve.server.loader import Change, Loader
from uld_serve.server.metrics import CONTENT_TYPE
from uld_serve.server.openapi import document
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.responses import ERRORS, Shape, json_response
from uld_serve.server.telemetry import Telemetry
from uld_serve.server.validation import check_request

ModelT = TypeVar("ModelT", bound=BaseModel)
_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
DRAIN_INTERVAL_S = 0.05


class LoadRequest(BaseModel):
    """`directory`: a folder's name under a configured root, not a path; `digest`: what must be found there."""

    model_config = _STRICT

    directory: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] = None
    digest: Annotated[str | None, Field(pattern=r"^sha256:[0-9a-f]{64}$")] = None


class DrainRequest(BaseModel):
    """`wait_s`: how long the answer may wait for running requests to end."""

    model_config = _STRICT

    wait_s: Annotated[float, Field(ge=0, le=3600)] = 0.0


class ProfileState(Shape):
    name: str
    object: Literal["forget_profile"]
    digest: str | None
    previous: str | None
    num_leases: int
    num_ended: int


class ProfileStates(Shape):
    object: Literal["list"]
    data: list[ProfileState]


class DrainState(Shape):
    is_draining: bool
    num_running: int


class Operations(Protocol):
    """What operators can do, to one server or to many that are one."""

    @property
    def telemetry(self) -> Telemetry: ...

    def states(self) -> list[ProfileState]: ...

    async def load(self, name: str, request: LoadRequest) -> ProfileState: ...

    async def unload(self, name: str) -> ProfileState: ...

    async def drain(self, wait_s: float) -> DrainState: ...

    def metrics(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Desk:
    """Operations on this process. `unload_wait_s`: how long an unloaded version may be held."""

    backend: Backend
    loader: Loader
    unload_wait_s: float

    @property
    def telemetry(self) -> Telemetry:
        return self.backend.telemetry

    def states(self) -> list[ProfileState]:
        held = self.loader.leases.count
        return [_state(one.name, Change(None, one, held(one.digest))) for one in self.loader.registry]

    async def load(self, name: str, request: LoadRequest) -> ProfileState:
        change = await self.loader.load(name, directory=request.directory, digest=request.digest)
        return _state(name, change)

    async def unload(self, name: str) -> ProfileState:
        return _state(name, await self.loader.unload(name, wait_s=self.unload_wait_s))

    async def drain(self, wait_s: float) -> DrainState:
        self.backend.is_draining = True
        try:
            async with asyncio.timeout(wait_s):
                while self.backend.in_flight.num_admitted:
                    await asyncio.sleep(DRAIN_INTERVAL_S)
        except TimeoutError:
            pass  # the answer says how many still run
        return DrainState(is_draining=True, num_running=self.backend.in_flight.num_admitted)

    def metrics(self) -> bytes:
        return self.telemetry.metrics.text()


@dataclass(frozen=True, slots=True)
class Operator:
    """Who asks, and what they may work on."""

    policy: KeyPolicy
    desk: Operations

    def record(self, event: str, **fields: str | int | None) -> None:
        """Raises AuditUnavailable: what cannot be recorded is not done."""
        audit = self.desk.telemetry.audit
        if audit is not None:
            audit.write(event, key=self.policy.name, **fields)


def operator_of(request: Request) -> Operator:
    """Raises Unauthenticated, or Forbidden for a key that is not an admin's."""
    policy = policy_of(request)
    if not policy.is_admin:
        raise Forbidden("this key is not for the admin listener")
    return Operator(policy, request.app.state.desk)


def reader_of(request: Request) -> Operations:
    """Raises Unauthenticated, or Forbidden for a key that may not read metrics."""
    if not policy_of(request).may_read_metrics:
        raise Forbidden("this key may not read metrics")
    desk: Operations = request.app.state.desk
    return desk


class Body(Generic[ModelT]):
    """Dependency: an operator's checked body. It must say that it is JSON, which no web page can without asking."""

    def __init__(self, model: type[ModelT]) -> None:
        self.model = model

    async def __call__(self, request: Request) -> ModelT:
        operator_of(request)
        if request.url.query:
            raise InvalidRequest("this route takes no query parameters; put the fields into the body")
        limits = access_of(request).limits
        body = await read_body(request, max_bytes=limits.body_bytes, timeout_s=limits.read_timeout_s)
        return check_request(self.model, parse_object(body), refused={})


LOAD, DRAIN = Body(LoadRequest), Body(DrainRequest)
TheOperator = Annotated[Operator, Depends(operator_of)]


def create_admin_app(access: Access, desk: Operations) -> FastAPI:
    app = FastAPI(
        title="uld-serve admin",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        responses=ERRORS,
        redirect_slashes=False,
    )
    app.state.catalog, app.state.desk = access, desk
    app.add_middleware(Edge, metrics=desk.telemetry.metrics)
    faults.install(app)
    app.add_api_route("/admin/forget_profiles", list_profiles, methods=["GET"], response_model=ProfileStates)
    one = "/admin/forget_profiles/{name}"
    app.add_api_route(f"{one}/load", load_profile, methods=["POST"], response_model=ProfileState)
    app.add_api_route(one, unload_profile, methods=["DELETE"], response_model=ProfileState)
    app.add_api_route("/admin/drain", drain, methods=["POST"], response_model=DrainState)
    app.add_api_route("/metrics", metrics, methods=["GET"], response_class=PlainTextResponse)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


async def list_profiles(operator: TheOperator) -> Response:
    return json_response(ProfileStates(object="list", data=operator.desk.states()))


async def load_profile(
    name: str, operator: TheOperator, request: Annotated[LoadRequest, Depends(LOAD)]
) -> Response:
    operator.record("loading", profile=name, directory=request.directory, digest=request.digest)
    state = await operator.desk.load(name, request)
    operator.record("loaded", profile=name, digest=state.digest, previous=state.previous)
    return json_response(state)


async def unload_profile(name: str, operator: TheOperator) -> Response:
    operator.record("unloading", profile=name)
    state = await operator.desk.unload(name)
    operator.record("unloaded", profile=name, previous=state.previous, ended=state.num_ended)
    return json_response(state)


async def drain(operator: TheOperator, request: Annotated[DrainRequest, Depends(DRAIN)]) -> Response:
    """No new request is taken; those that run go on. There is no way back but a restart."""
    operator.record("draining")
    return json_response(await operator.desk.drain(request.wait_s))


async def metrics(desk: Annotated[Operations, Depends(reader_of)]) -> Response:
    return Response(desk.metrics(), headers={"Content-Type": CONTENT_TYPE})


def _state(name: str, change: Change) -> ProfileState:
    return ProfileState(
        name=name,
        object="forget_profile",
        digest=_digest(change.now),
        previous=_digest(change.before),
        num_leases=change.num_leases,
        num_ended=change.num_ended,
    )


def _digest(version: ProfileVersion | None) -> str | None:
    return None if version is None else version.digest
