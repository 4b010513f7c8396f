"""The OpenAPI document: FastAPI's, plus the request bodies, which our own gate parses instead of FastAPI. Served at
/openapi.json by app."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from uld_serve.server.admission import Admit, Parse

_REF = "#/components/schemas/{model}"


def document(app: FastAPI) -> dict[str, object]:
    """Made once and kept: routes do not change while the server runs."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = made["components"]["schemas"]
        for route in app.routes:
            model = body_model(route) if isinstance(route, APIRoute) else None
            if model is None or not isinstance(route, APIRoute):
                continue
            schemas.update(_schemas(model))
            content = {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}
            made["paths"][route.path_format]["post"]["requestBody"] = {"required": True, "content": content}
        app.openapi_schema = made
    return app.openapi_schema


def body_model(route: APIRoute) -> type[BaseModel] | None:
    """The model of the body that a route's dependency parses; None for a route without a body."""
    for dependency in route.dependant.dependencies:
        if isinstance(dependency.call, Admit | Parse):
            return dependency.call.model
    return None


def _schemas(model: type[BaseModel]) -> dict[str, object]:
    schema = model.model_json_schema(ref_template=_REF)
    nested: dict[str, object] = schema.pop("$defs", {})
    return {**nested, model.__name__: schema}
