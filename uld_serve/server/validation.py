"""Checks a parsed body against a request model and turns what is wrong into our errors: the field's name and the
reason, never the value. Called by admission. Knows pydantic, no route."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from uld_serve.errors import InvalidRequest
from uld_serve.server.json_gate import JsonObject, shown_name

ModelT = TypeVar("ModelT", bound=BaseModel)

# Each value means "not used", which is what we do; any other value is refused.
Neutral = tuple[JsonValue, ...]

_REASONS = {
    "missing": "is required",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
}


class Strict(BaseModel):
    """What every object of a request is: each field known, of the very type that it says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def check_request(
    model: type[ModelT], data: JsonObject, *, refused: Mapping[str, tuple[str, Neutral]]
) -> ModelT:
    """`data` as a `model`. InvalidRequest names the field: unknown, not supported, or of a wrong value.

    `refused` maps a field that OpenAI's API has and this server does not serve to the reason and to the
    values that ask for nothing.
    """
    kept = {name: value for name, value in data.items() if not _is_neutral(name, value, refused)}
    try:
        return model.model_validate(kept, strict=True)
    except ValidationError as error:
        raise _invalid(error, model) from None


def _is_neutral(name: str, value: JsonValue, refused: Mapping[str, tuple[str, Neutral]]) -> bool:
    if name not in refused:
        return False
    reason, neutral = refused[name]
    # type() too: False == 0 and True == 1 in Python.
    if not any(type(value) is type(allowed) and value == allowed for allowed in (None, *neutral)):
        raise InvalidRequest(f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")
    return True


def _invalid(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=False, include_context=True)[0]
    loc = first["loc"]
    param = _dotted(loc)
    kind = first["type"]
    if kind == "extra_forbidden":
        return InvalidRequest(_unknown(param, loc, model), param=param, code="unknown_parameter")
    if kind == "value_error":
        reason = str(first["ctx"]["error"])  # raised by our own validators, so the words are ours
    else:
        reason = _REASONS.get(kind) or first["msg"].replace("Input should", "must").replace(
            "Value should", "must"
        )
    return InvalidRequest(f"{param or 'the body'} {reason[:200]}", param=param)


def _dotted(loc: tuple[int | str, ...]) -> str | None:
    """("messages", 0, "content") -> "messages[0].content". Keys come from the client, so they are cleaned."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{shown_name(part)}"
    return text or None


def _unknown(param: str | None, loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    message = f"unknown field {param}"
    known = list(model.model_fields) if len(loc) == 1 else []
    close = difflib.get_close_matches(str(loc[-1])[:64], known, n=1, cutoff=0.75)
    return f"{message}; did you mean {close[0]}?" if close else message
