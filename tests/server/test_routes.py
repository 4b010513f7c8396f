"""A route that can reach the engine without resolve() fails here, whoever adds it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from live_server import make_catalog
from starlette.routing import BaseRoute

import uld_serve.server
from uld_serve.server.admission import Admit, Backend, Parse, pulse_of
from uld_serve.server.app import create_app
from uld_serve.server.catalog import catalog_of, policy_of
from uld_serve.server.door import Enter, Receive

# The only callables that may see the raw request, and through it the application's state. Admit resolves; Parse, the
# door to files and jobs and the others hand out nothing that generates.
TRUSTED_FUNCTIONS = {catalog_of, policy_of, pulse_of}
TRUSTED_CLASSES = (Admit, Parse, Enter, Receive)
GENERATING = {"/v1/completions", "/v1/chat/completions"}


@pytest.fixture
def app() -> FastAPI:
    return create_app(make_catalog(), Backend(FakeEngine()))


def dependants(dependant: Dependant) -> Iterator[Dependant]:
    yield dependant
    for inner in dependant.dependencies:
        yield from dependants(inner)


def is_trusted(call: object) -> bool:
    return call in TRUSTED_FUNCTIONS if inspect.isfunction(call) else isinstance(call, TRUSTED_CLASSES)


def takes_the_raw_request(dependant: Dependant) -> bool:
    names = (
        dependant.request_param_name,
        dependant.http_connection_param_name,
        dependant.websocket_param_name,
    )
    return any(name is not None for name in names)


def faults(routes: list[BaseRoute]) -> list[str]:
    found = []
    for route in routes:
        if not isinstance(route, APIRoute):
            if getattr(route, "path", None) != "/openapi.json":
                found.append(f"{route!r} is not an API route: nothing checks what it reaches")
            continue
        if takes_the_raw_request(route.dependant):
            found.append(f"{route.path} takes the raw request")
        for inner in dependants(route.dependant):
            if inner is not route.dependant and takes_the_raw_request(inner) and not is_trusted(inner.call):
                found.append(f"{route.path} depends on {inner.call!r}, which takes the raw request")
    return found


def admitting(routes: list[BaseRoute]) -> set[str]:
    return {
        route.path
        for route in routes
        if isinstance(route, APIRoute) and any(isinstance(d.call, Admit) for d in dependants(route.dependant))
    }


def test_every_route_reaches_the_engine_through_resolve_or_not_at_all(app: FastAPI) -> None:
    assert faults(app.routes) == []
    assert admitting(app.routes) == GENERATING


async def takes_request(request: Request) -> None: ...


@pytest.mark.parametrize("kind", ["endpoint", "dependency", "mount", "included"])
def test_the_walk_sees_a_way_around(app: FastAPI, kind: str) -> None:
    from fastapi import APIRouter, Depends

    async def endpoint() -> None: ...

    if kind == "endpoint":
        app.add_api_route("/v1/raw", takes_request)
    elif kind == "dependency":
        app.add_api_route("/v1/raw", endpoint, dependencies=[Depends(takes_request)])
    elif kind == "mount":
        app.mount("/v1/raw", FastAPI())
    else:
        router = APIRouter()
        router.add_api_route("/v1/raw", endpoint)
        app.include_router(router)
    assert len(faults(app.routes)) == 1


def test_only_admission_touches_the_backend_and_only_policy_makes_decisions() -> None:
    folder = Path(uld_serve.server.__file__).parent
    users: dict[str, set[str]] = {"backend": set(), "stream": set(), "Decision": set()}
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            if node.attr == "backend" and isinstance(owner, ast.Attribute) and owner.attr == "state":
                users["backend"].add(file.name)
            if node.attr == "stream" and isinstance(owner, ast.Name) and owner.id == "engine":
                users["stream"].add(file.name)
            if isinstance(owner, ast.Name) and owner.id == "Decision":
                users["Decision"].add(file.name)
    assert users == {
        "backend": {"admission.py", "app.py"},
        "stream": {"generation.py"},
        "Decision": {"policy.py"},
    }


def test_openapi_shows_bodies_and_answers(app: FastAPI) -> None:
    document = app.openapi()
    posts = {path: item["post"] for path, item in document["paths"].items() if "post" in item}
    jobs = "/v1/fine_tuning/jobs"
    cancel, upload = posts.pop(f"{jobs}/{{job_id}}/cancel"), posts.pop("/v1/files")
    assert "requestBody" not in cancel
    assert upload["requestBody"]["content"]["multipart/form-data"]["schema"]["additionalProperties"] is False
    assert set(posts) == {*GENERATING, "/v1/tokenize", "/v1/detokenize", jobs}
    schemas = document["components"]["schemas"]
    for operation in posts.values():
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
        assert schemas[name]["additionalProperties"] is False
        assert "429" in operation["responses"]
    assert "forget_profile" in schemas["ChatRequest"]["properties"]
    assert "forget" in schemas["ChatResponse"]["properties"]
    assert references(document) <= {f"#/components/schemas/{name}" for name in schemas}


def references(node: object) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(references(value) for value in node))
    return set()
