"""The field response_format as OpenAI writes it, and the JSON schema that it comes to. Part of protocol; what a
schema may hold is the engine's to say."""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from uld_serve.errors import InvalidRequest
from uld_serve.server.validation import Strict

ANY_OBJECT = '{"type":"object"}'


class JsonSchemaFormat(Strict):
    """`strict` true, false or absent: the answer is always held to the schema."""

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="A label; the model is not shown it."),
    ]
    description: Annotated[
        str | None, Field(max_length=1024, description="For people; the model is not shown it.")
    ] = None
    schema_: Annotated[dict[str, JsonValue], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Annotated[
        Literal["text", "json_object", "json_schema"],
        Field(description="Any text, any JSON object, or what a schema allows."),
    ]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequest(
                "json_schema must be given if, and only if, type is json_schema",
                param="response_format.json_schema",
            )
        return self

    @property
    def schema_text(self) -> str | None:
        """None for plain text. The order of properties is the client's, and the answer's."""
        if self.json_schema is None:
            return ANY_OBJECT if self.type == "json_object" else None
        return json.dumps(self.json_schema.schema_, ensure_ascii=False, separators=(",", ":"))
