"""The OpenAPI document: every route and field is explained, every example is one that the server takes or gives, and
docs/api.md is made of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from fake_engine import FakeEngine
from fastapi.routing import APIRoute
from live_server import LiveServer, make_catalog

from uld_serve.server.admin import Desk, create_admin_app
from uld_serve.server.admission import Backend
from uld_serve.server.app import create_app
from uld_serve.server.examples import ERROR_EXAMPLE, EXAMPLES
from uld_serve.server.field_notes import FIELD_NOTES
from uld_serve.server.openapi import body_model, document, example_key
from uld_serve.server.protocol import REFUSED
from uld_serve.server.responses import ChatChunk, ChatResponse, CompletionResponse, ErrorResponse
from uld_serve.server.validation import check_request

ROOT = Path(__file__).parent.parent.parent
APP = create_app(make_catalog(), Backend(FakeEngine()))
ROUTES = {
    example_key(route, method): route
    for route in APP.routes
    if isinstance(route, APIRoute) and route.include_in_schema
    for method in route.methods
}
CHUNKS = {ChatResponse: ChatChunk, CompletionResponse: CompletionResponse}


def operations() -> Iterator[tuple[str, dict[str, object]]]:
    for path, item in document(APP)["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation


def test_every_route_has_an_example_and_no_other_has() -> None:
    assert EXAMPLES.keys() == ROUTES.keys()
    assert {name for name, _ in operations()} == ROUTES.keys()


@pytest.mark.parametrize("key", EXAMPLES)
def test_example_requests_are_taken(key: str) -> None:
    model = body_model(ROUTES[key])
    requests = EXAMPLES[key].requests
    assert (model is None) == (requests is None)
    for request in (requests or {}).values():
        check_request(model, request, refused=REFUSED.get(model, {}))


@pytest.mark.parametrize("key", EXAMPLES)
def test_example_answers_are_whole_and_of_the_shape(key: str) -> None:
    shape = ROUTES[key].response_model
    example = EXAMPLES[key]
    if example.media != "application/json":
        assert shape is None
        assert isinstance(example.answer, str)
        return
    assert shape.model_validate(example.answer).model_dump(exclude_unset=True) == example.answer
    for event in example.events:
        assert CHUNKS[shape].model_validate(event).model_dump(exclude_unset=True) == event


def test_example_error_is_of_the_shape() -> None:
    assert ErrorResponse.model_validate(ERROR_EXAMPLE).model_dump() == ERROR_EXAMPLE


def test_document_shows_the_examples() -> None:
    for key, operation in operations():
        example = EXAMPLES[key]
        answer = operation["responses"]["200"]["content"]
        assert answer[example.media]["example"] == example.answer
        assert ("text/event-stream" in answer) == bool(example.events)
        if example.requests is not None:
            shown = operation["requestBody"]["content"]["application/json"]["examples"]
            assert {what: one["value"] for what, one in shown.items()} == example.requests


def test_every_operation_and_field_is_explained() -> None:
    assert [key for key, operation in operations() if not operation.get("description")] == []
    schemas = document(APP)["components"]["schemas"]
    bodies = {name: schema for name, schema in schemas.items() if schema.get("additionalProperties") is False}
    assert {"ChatRequest", "CompletionRequest", "StreamOptions", "ResponseFormat"} <= bodies.keys()
    bare = [
        f"{name}.{field}"
        for name, schema in bodies.items()
        if name not in ("Message", "TextPart")  # shown by example
        for field, shape in schema["properties"].items()
        if "description" not in shape
    ]
    assert bare == []


def test_every_note_belongs_to_a_field() -> None:
    schemas = document(APP)["components"]["schemas"].values()
    shown = {
        shape.get("description") for schema in schemas for shape in schema.get("properties", {}).values()
    }
    assert {name for name, note in FIELD_NOTES.items() if note not in shown} == set()


def test_only_the_page_and_the_status_routes_need_no_key() -> None:
    assert {key for key, operation in operations() if "security" not in operation} == {
        "GET /",
        "GET /health",
        "GET /ready",
        "GET /version",
    }


def test_errors_are_json_whatever_the_answer_is() -> None:
    for key, operation in operations():
        errors = [answer["content"] for status, answer in operation["responses"].items() if status != "200"]
        assert {media for content in errors for media in content} == {"application/json"}, key


def test_operators_have_a_document_too() -> None:
    app = create_admin_app(make_catalog(), Desk(Backend(FakeEngine()), None, 0.0))
    made = document(app)
    shown = {
        path: operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        for path, item in made["paths"].items()
        for operation in item.values()
        if "requestBody" in operation
    }
    assert shown == {
        "/admin/forget_profiles/{name}/load": "LoadRequest",
        "/admin/drain": "DrainRequest",
    }
    assert all("security" in operation for item in made["paths"].values() for operation in item.values())
    assert app.openapi() is made


def test_document_is_served(server: LiveServer) -> None:
    served = server.get("/openapi.json").json()
    assert served["paths"].keys() == document(APP)["paths"].keys()


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_api", ROOT / "docs" / "generate_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_fresh() -> None:
    module = generator()
    assert module.PAGE.read_text() == module.rendered(), "docs/api.md is stale; run: make api-docs"
