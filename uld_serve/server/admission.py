"""The only door to the engine. A route that generates depends on `Admit(RequestModel)`, which authenticates, parses
the body and resolves the policy; what it gets back can generate under that one Decision and no other.

No other route can reach the engine: it is held here, and no endpoint takes the raw Request (a test walks them).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import Delta
from uld_serve.errors import EngineStopped, InvalidRequest
from uld_serve.server.body import read_body
from uld_serve.server.catalog import Catalog, catalog_of, policy_of
from uld_serve.server.edge import holds_of
from uld_serve.server.generation import Answer, Choice, Generation
from uld_serve.server.in_flight import InFlight
from uld_serve.server.json_gate import parse_object
from uld_serve.server.leases import Leases
from uld_serve.server.policy import (
    KeyPolicy,
    Selection,
    profile_set,
    require_logprobs_allowed,
    resolve,
    select,
)
from uld_serve.server.protocol import (
    REFUSED,
    ChatRequest,
    CompletionRequest,
    ForgetRequest,
    ModelRequest,
)
from uld_serve.server.telemetry import Telemetry
from uld_serve.server.validation import Neutral, check_request
from uld_serve.server.watch import Facts

HEADER = "X-Forget-Profile"
BEHIND = "this replica cannot tell which profiles are active, and answers nothing until it can"

ModelT = TypeVar("ModelT", bound=ModelRequest)
RequestT = TypeVar("RequestT", CompletionRequest, ChatRequest)
ResultT = TypeVar("ResultT")


@dataclass(slots=True)
class Backend:
    """What generates, and who is told of it. `is_draining` turns true when the server is to take no more requests;
    `is_behind` tells whether this process may no longer know which profiles are active."""

    engine: AsyncEngine
    in_flight: InFlight = field(default_factory=InFlight)
    leases: Leases = field(default_factory=Leases)
    telemetry: Telemetry = field(default_factory=Telemetry)
    is_draining: bool = False
    is_behind: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Pulse:
    """Whether the engine lives; all that a status route may know of it."""

    is_alive: bool
    heartbeat_age_s: float
    is_draining: bool
    is_behind: bool


def pulse_of(request: Request) -> Pulse:
    backend = _backend_of(request)
    engine = backend.engine
    return Pulse(engine.is_alive, engine.heartbeat_age_s, backend.is_draining, backend.is_behind())


class Parse(Generic[ModelT]):
    """Dependency: the checked body of a route that does not generate. Authenticates first. `refused`: what OpenAI's API
    takes there and this server does not (validation.check_request)."""

    def __init__(
        self, model: type[ModelT], *, refused: Mapping[str, tuple[str, Neutral]] | None = None
    ) -> None:
        self.model = model
        self.refused = REFUSED.get(model, {}) if refused is None else refused

    async def __call__(self, request: Request) -> ModelT:
        policy_of(request)
        parsed = await _parsed(request, self.model, self.refused)
        catalog_of(request).profiles_of_model(parsed.model)
        return parsed


@dataclass(frozen=True, slots=True)
class Admitted(Generic[RequestT]):
    """A request with its Decision. `created` in Unix seconds."""

    id: str
    created: int
    request: RequestT
    decision: Decision
    policy: KeyPolicy
    catalog: Catalog
    _route: str
    _headers: Mapping[str, str]
    _backend: Backend
    _receive: Receive

    async def start(self, choices: Sequence[Choice], *, n: int) -> Generation:
        """Run the choices under this request's Decision; returns at the first Delta. Nothing runs that the audit log,
        if there is one, cannot record."""
        watch = self._backend.telemetry.begin(self._facts(choices, n=n), self._headers)
        return await self._unless_gone(
            Generation.start(
                self._backend.engine,
                choices,
                decision=self.decision,
                policy=self.policy,
                in_flight=self._backend.in_flight,
                timeout_s=self.catalog.limits.request_timeout_s,
                watch=watch,
                request_id=self.id,
                n=n,
            )
        )

    async def answers(self, generation: Generation) -> list[Answer]:
        """All choices, whole. Aborts them if the client leaves meanwhile."""
        return await self._unless_gone(self._collected(generation))

    async def deltas(self, generation: Generation) -> AsyncGenerator[tuple[int, Delta], None]:
        """The deltas of all choices."""
        async with aclosing(generation.deltas()) as deltas:
            async for index, delta in deltas:
                yield index, delta

    def _facts(self, choices: Sequence[Choice], *, n: int) -> Facts:
        return Facts(
            request_id=self.id,
            route=self._route,
            key=self.policy.name,
            user=self.request.user,
            model=self.request.model,
            decided=",".join(applied.version.ref for applied in self.decision.applied) or "none",
            prompt_tokens=sum(len(choice.prompt.token_ids) for choice in choices[::n]),
        )

    async def _collected(self, generation: Generation) -> list[Answer]:
        answers = [Answer() for _ in range(generation.num_choices)]
        async with aclosing(self.deltas(generation)) as deltas:
            async for index, delta in deltas:
                answers[index].add(delta)
        return answers

    async def _unless_gone(self, work: Coroutine[None, None, ResultT]) -> ResultT:
        """`work`'s result; ClientDisconnect, with `work` cancelled, if the client leaves first."""
        task = asyncio.create_task(work)
        gone = asyncio.create_task(wait_disconnected(self._receive))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


class Admit(Generic[RequestT]):
    """Dependency: authenticate, parse, resolve."""

    def __init__(self, model: type[RequestT], *, id_prefix: str) -> None:
        self.model: type[RequestT] = model
        self.id_prefix = id_prefix

    async def __call__(self, request: Request) -> Admitted[RequestT]:
        policy, catalog, backend = policy_of(request), catalog_of(request), _backend_of(request)
        _require_open(backend)
        parsed = await _parsed(request, self.model, REFUSED.get(self.model, {}))
        _require_open(backend)  # a body may take its time
        selection = _selection(parsed, catalog, request)
        require_logprobs_allowed(policy, parsed.logprob_fields)
        decision = resolve(policy, selection, catalog.registry)
        holds = holds_of(request)
        holds.enter_context(backend.in_flight.admitted())
        holds.enter_context(backend.leases.held(decision))
        return Admitted(
            id=f"{self.id_prefix}-{uuid.uuid4().hex}",
            created=int(time.time()),
            request=parsed,
            decision=decision,
            policy=policy,
            catalog=catalog,
            _route=request.url.path,
            _headers=request.headers,
            _backend=backend,
            _receive=request.receive,
        )


async def wait_disconnected(receive: Receive) -> None:
    """Until the client is gone; call it once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _backend_of(request: Request) -> Backend:
    backend = request.app.state.backend
    assert isinstance(backend, Backend)
    return backend


def _require_open(backend: Backend) -> None:
    if backend.is_draining:
        raise EngineStopped("the server is draining: it finishes what it has and takes no more")
    if backend.is_behind():
        raise EngineStopped(BEHIND)


async def _parsed(
    request: Request, model: type[ModelT], refused: Mapping[str, tuple[str, Neutral]]
) -> ModelT:
    if request.url.query:
        # A ?forget_profile=... that nobody reads must not look as if it had worked.
        raise InvalidRequest("this route takes no query parameters; put the fields into the body")
    limits = catalog_of(request).limits
    body = await read_body(request, max_bytes=limits.body_bytes, timeout_s=limits.read_timeout_s)
    return check_request(model, parse_object(body), refused=refused)


def _selection(parsed: ForgetRequest, catalog: Catalog, request: Request) -> Selection:
    named = parsed.forget_profile
    body = profile_set([named] if isinstance(named, str) else named, param="forget_profile")
    return select(
        body=[body] if parsed.names_profile else [],
        suffix=catalog.profiles_of_model(parsed.model),
        header=_header_profiles(request),
        strength=parsed.forget_strength,
    )


def _header_profiles(request: Request) -> list[frozenset[str]]:
    """What X-Forget-Profile names: one name, or several joined by commas or "+". A header that only looks like it
    is refused: a misspelt one must not mean "forget nothing"."""
    values = []
    for name, value in request.headers.items():
        if name == HEADER.lower():
            values.append(value)
        elif "forget" in name:
            raise InvalidRequest(f"unknown header; the one that names profiles is {HEADER}", param=HEADER)
    if len(values) > 1:
        raise InvalidRequest(f"{HEADER} is given twice", param=HEADER)
    return [
        profile_set([name.strip() for name in value.replace("+", ",").split(",")], param=HEADER)
        for value in values
    ]
