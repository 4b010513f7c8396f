"""The OpenAPI document: FastAPI's, plus the request bodies, which our own gate parses instead of FastAPI, and examples.
Served at /openapi.json by app; docs/api.md is made of it. The operators' application has one too, for tests."""

from __future__ import annotations

import json
from typing import Protocol, cast, runtime_checkable

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, JsonValue

from uld_serve.server.admission import HEADER, Admit
from uld_serve.server.door import Enter, Receive
from uld_serve.server.example import Example
from uld_serve.server.examples import ERROR_EXAMPLE, EXAMPLES
from uld_serve.server.field_notes import FIELD_NOTES

_REF = "#/components/schemas/{model}"
_OPEN = ("/", "/health", "/ready", "/version")
Json = dict[str, JsonValue]


@runtime_checkable
class Reader(Protocol):
    """A dependency that parses a body: Admit, Parse, and the operators' Body."""

    model: type[BaseModel]


def document(app: FastAPI) -> dict[str, object]:
    """Made once and kept: routes do not change while the server runs."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = made["components"]
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for route in app.routes:
            if isinstance(route, APIRoute) and route.include_in_schema:
                for method in sorted(route.methods or ()):
                    operation = made["paths"][route.path_format][method.lower()]
                    components["schemas"].update(_describe(operation, route, method))
        app.openapi_schema = made
    return app.openapi_schema


def body_model(route: APIRoute) -> type[BaseModel] | None:
    """The model of the body that a route's dependency parses; None for a route without a body."""
    found = _reader(route)
    return None if found is None else found.model


def example_key(route: APIRoute, method: str) -> str:
    return f"{method} {route.path_format}"


def _reader(route: APIRoute) -> Reader | None:
    for dependency in route.dependant.dependencies:
        call: object = dependency.call
        if isinstance(call, Reader):
            return call
    return None


def _describe(operation: Json, route: APIRoute, method: str) -> Json:
    """Completes one operation; the schemas that its body needs."""
    _describe_door(operation, route)
    example = EXAMPLES.get(example_key(route, method))
    if route.path_format not in _OPEN:
        operation["security"] = [{"key": []}]
    answers = cast("dict[str, Json]", operation["responses"])
    for status, answer in answers.items():
        content = cast("dict[str, Json]", answer.get("content", {}))
        if status != "200":
            # FastAPI gives errors the media type of the answer: text/html for a page's.
            (shape,) = content.values()
            answer["content"] = {"application/json": {**shape, "example": ERROR_EXAMPLE}}
        elif example is not None:
            for one in content.values():
                one["example"] = example.answer
            if example.events:
                content["text/event-stream"] = {"schema": {"type": "string"}, "example": _stream(example)}
    reader = _reader(route)
    if reader is None:
        return {}
    if isinstance(reader, Admit):
        operation["parameters"] = [_HEADER_PARAMETER]
        answers["200"]["headers"] = {
            HEADER: {"schema": {"type": "string"}, "description": "What was forgotten."}
        }
    body: Json = {"schema": {"$ref": _REF.format(model=reader.model.__name__)}}
    if example is not None and example.requests is not None:
        body["examples"] = {what: {"value": value} for what, value in example.requests.items()}
    operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    return _schemas(reader.model)


def _describe_door(operation: Json, route: APIRoute) -> None:
    """What the query may say, and the form of an upload."""
    for dependency in route.dependant.dependencies:
        if isinstance(dependency.call, Enter) and dependency.call.query:
            parameters = cast("list[JsonValue]", operation.setdefault("parameters", []))
            parameters += [
                {"name": name, "in": "query", "required": False, "schema": {"type": "string"}}
                for name in dependency.call.query
            ]
        if isinstance(dependency.call, Receive):
            operation["requestBody"] = {
                "required": True,
                "content": {"multipart/form-data": {"schema": _FORM}},
            }


_FORM: Json = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {
            "type": "string",
            "format": "binary",
            "description": 'JSON lines: {"question", "answer"}, {"prompt", "completion"}, {"messages"} or {"text"}.',
        },
        "purpose": {"type": "string", "enum": ["fine-tune"], "description": "What it is for."},
    },
    "additionalProperties": False,
}


def _stream(example: Example) -> str:
    lines = [*(json.dumps(event) for event in example.events), "[DONE]"]
    return "".join(f"data: {line}\n\n" for line in lines)


_HEADER_PARAMETER: Json = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "What to forget, for clients that can set neither field nor model: a name, or several with commas.",
}


def _schemas(model: type[BaseModel]) -> Json:
    schema = model.model_json_schema(ref_template=_REF)
    nested: Json = schema.pop("$defs", {})
    found: Json = {**nested, model.__name__: schema}
    for one in found.values():
        for name, shape in cast("dict[str, Json]", cast("Json", one).get("properties", {})).items():
            if name in FIELD_NOTES:
                shape.setdefault("description", FIELD_NOTES[name])
    return found
