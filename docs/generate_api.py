"""Writes docs/api.md from the OpenAPI document: `make api-docs`. A test fails while the two differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fastapi import FastAPI

from uld_serve import __version__
from uld_serve.server.app import ROUTES
from uld_serve.server.openapi import document
from uld_serve.server.responses import ERRORS

PAGE = Path(__file__).with_name("api.md")
INTRODUCTION = """\
# HTTP API

Made from the server's OpenAPI document, which it serves at `/openapi.json`, by `make api-docs`; do not edit.

OpenAI's conventions hold wherever they exist, so any OpenAI client works. A field is honoured or refused by its name
with 400, never ignored; an unknown one is refused, because a misspelt `forget_profile` must not mean "forget nothing".

**Keys.** `Authorization: Bearer KEY`, once there are keys; `/`, `/health`, `/ready` and `/version` need none.

**What to forget** is said in one of three ways, and two that disagree are refused: the model's name (`base:profile`),
the field `forget_profile`, or the header `X-Forget-Profile`. What the operator has made mandatory is added to it.

**Receipts.** Every answer says what the sampler applied, in the header `X-Forget-Profile: name@digest` and the object
`forget`.

**Errors** are OpenAI's object, in a stream as its last event, which no `[DONE]` follows:
"""
STATUSES = {
    400: "The request is wrong; `param` names the field.",
    401: "No key, or an unknown one.",
    403: "This key may not do that, for instance ask the base, or for log-probabilities.",
    404: "No such route, model or profile.",
    408: "The body did not arrive in time.",
    409: "The profile's files cannot be used; or a job, a file or a name is not free for this.",
    413: "The body is too large.",
    415: "The body is not plain JSON in UTF-8, or not a form where a file is uploaded.",
    429: "The queue or the key's share is full; `Retry-After` says when to come back.",
    500: "The server failed; `numerical_error` and `nothing_kept` mean that no token could be drawn under the profile.",
    503: "The engine is stopping or down, or the request ran longer than the server lets one run (`request_timeout`).",
}
Json = dict[str, object]


def rendered() -> str:
    app = FastAPI(title="uld-serve", version=__version__, responses=ERRORS)
    for module in ROUTES:
        module.add_routes(app)
    made = document(app)
    parts = [INTRODUCTION, *_errors(made)]
    for path, item in made["paths"].items():
        for method, operation in item.items():
            parts += _operation(f"{method.upper()} {path}", operation, made["components"]["schemas"])
    return "\n".join(parts).rstrip() + "\n"


def _errors(made: Json) -> Iterator[str]:
    answers = made["paths"]["/v1/completions"]["post"]["responses"]
    yield _block(answers["400"]["content"]["application/json"]["example"])
    yield "| Status | |\n|---|---|"
    for status, meaning in STATUSES.items():
        assert str(status) in answers, f"no route answers with {status}"
        yield f"| {status} | {meaning} |"
    yield ""


def _operation(title: str, operation: Json, schemas: Json) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{operation['description']}\n"
    if "requestBody" in operation:
        [body] = operation["requestBody"]["content"].values()
        shape = body["schema"]
        yield "| Field | Type | Default | |\n|---|---|---|---|"
        yield from _fields(schemas[_name(shape)] if "$ref" in shape else shape, schemas, seen=set())
        yield ""
        for what, example in body.get("examples", {}).items():
            yield f"Request: {what}.\n\n{_block(example['value'])}"
    content = operation["responses"]["200"]["content"]
    if "application/json" in content:
        yield f"Answer:\n\n{_block(content['application/json']['example'])}"
    else:
        [(media, answer)] = content.items()
        yield f"Answer, as `{media}`:\n\n```\n{answer['example'].strip()}\n```\n"
    if "text/event-stream" in content:
        yield f"Streamed:\n\n```\n{content['text/event-stream']['example'].strip()}\n```\n"


def _fields(schema: Json, schemas: Json, prefix: str = "", *, seen: set[str]) -> Iterator[str]:
    """Rows of a table; those of objects inside follow their own, where such an object is first named."""
    required = schema.get("required", ())
    for name, shape in schema["properties"].items():
        default = "required" if name in required else _default(shape)
        yield f"| `{prefix}{name}` | {_type(shape, schemas)} | {default} | {shape['description']} |"
        for one in [shape, *shape.get("anyOf", ())]:
            if "$ref" in one and name not in ("messages",) and _name(one) not in seen:
                yield from _fields(schemas[_name(one)], schemas, f"{prefix}{name}.", seen=seen | {_name(one)})
                seen.add(_name(one))


def _default(shape: Json) -> str:
    value = shape.get("default")
    return "" if value in (None, [], {}) else f"`{json.dumps(value)}`"


def _type(shape: Json, schemas: Json) -> str:
    if "anyOf" in shape:
        kinds = [_type(one, schemas) for one in shape["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in shape:
        return "object"
    if "const" in shape:
        return f"`{json.dumps(shape['const'])}`"
    if "enum" in shape:
        return " or ".join(f"`{json.dumps(value)}`" for value in shape["enum"])
    if shape.get("type") == "array":
        return f"list of {_type(shape['items'], schemas)}" if shape.get("items") else "list"
    return str(shape.get("type", "any")) + _bounds(shape)


def _bounds(shape: Json) -> str:
    said = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {shape[name]:g}" for name, sign in said.items() if abs(shape.get(name, 2**31)) < 2**31]
    return f" {', '.join(bounds)}" if bounds else ""


def _name(shape: Json) -> str:
    return str(shape["$ref"]).rsplit("/", 1)[-1]


def _block(value: object) -> str:
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(rendered())
