"""Parses the JSON files of a profile directory without mercy. Called by store and adapter.

Knows nothing of what the files mean: it turns bytes into a checked pydantic model or raises ValueError.
"""

from __future__ import annotations

import json
import math
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

ModelT = TypeVar("ModelT", bound=BaseModel)

_MAX_ERRORS_SHOWN = 3


def parse_object(data: bytes) -> dict[str, object]:
    """The JSON object in `data`: UTF-8, no duplicate keys, no NaN or Infinity, no lone surrogates.

    Raises ValueError with the reason; never another exception, whatever the bytes are.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    except UnicodeError:
        raise ValueError("text is not valid UTF-8") from None
    if not isinstance(value, dict):
        raise ValueError("the top level must be a JSON object")
    return value


def parse_model(model: type[ModelT], data: bytes) -> ModelT:
    """`data` as a `model`, in pydantic's strict mode. Raises ValueError naming the fields that are wrong."""
    parse_object(data)  # pydantic's parser keeps the last of two equal keys, so look for them first
    try:
        return model.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise ValueError(describe(error)) from None


def describe(error: ValidationError) -> str:
    """The first few errors as `field: reason`, without the input values."""
    shown = [
        f"{'.'.join(str(part) for part in item['loc']) or 'top level'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False)[:_MAX_ERRORS_SHOWN]
    ]
    return "; ".join(shown)


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key[:40]!r} appears twice in one JSON object")
        result[key] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:20]} is out of range")
    return value
