"""Turns the bytes of a request body into one JSON object, or refuses them. Runs before pydantic, on every route
with a body. Knows JSON and sizes only: no field, no model, no profile.

Python's own parser is too kind for a policy's front door: it lets the last of two equal keys win (so a proxy and
we may read different profiles), takes UTF-16, NaN and infinities, and turns "\\ud800" into a string that no
UTF-8 encoder accepts, which becomes a 500 somewhere later.
"""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate

from pydantic import JsonValue

from uld_serve.errors import InvalidRequest

MAX_DEPTH = 32
MAX_INT_DIGITS = 19  # covers every 63-bit seed; int() of a very long literal is quadratic
MAX_SHOWN_NAME = 64

# Possessive, and the closing quote optional: an unterminated string runs to the end once, so the scan is linear.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_BRACKET = re.compile(r"[^\[\]{}]+")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}

JsonObject = dict[str, JsonValue]


def parse_object(body: bytes) -> JsonObject:
    """The body as a JSON object; InvalidRequest for anything that two parsers could read differently."""
    text = _decoded(body)
    if _depth(text) > MAX_DEPTH:
        raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object_without_duplicates,
            parse_int=_bounded_int,
            parse_float=_finite_float,
            parse_constant=_refused_constant,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"the body is not valid JSON ({where})") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    if _SURROGATE_ESCAPE.search(text):
        _require_encodable(value)
    return value


def shown_name(name: str) -> str:
    """A field name fit for an error message: printable ASCII, bounded."""
    safe = "".join(c if c.isascii() and c.isprintable() else "?" for c in name[:MAX_SHOWN_NAME])
    return safe + ("..." if len(name) > MAX_SHOWN_NAME else "")


def _decoded(body: bytes) -> str:
    try:
        return body.decode("utf-8", errors="strict")
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None


def _depth(text: str) -> int:
    """Deepest nesting, found without parsing, so that the parser never recurses further than that."""
    brackets = _NOT_BRACKET.sub("", _STRING.sub("", text))
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)


def _object_without_duplicates(pairs: list[tuple[str, JsonValue]]) -> JsonObject:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            shown = shown_name(name)
            raise InvalidRequest(f"the key {shown!r} is given twice", param=shown)
        seen.add(name)
    raise AssertionError("unreachable: fewer keys than pairs but no duplicate")


def _bounded_int(literal: str) -> int:
    if len(literal.lstrip("-")) > MAX_INT_DIGITS:
        raise InvalidRequest("the body holds an integer outside 64 bits")
    return int(literal)


def _finite_float(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise InvalidRequest("the body holds a number too large for a double")
    return value


def _refused_constant(literal: str) -> float:
    raise InvalidRequest(f"the body holds {literal}, which is not JSON")


def _require_encodable(value: JsonObject) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("a string holds half of a surrogate pair (\\ud800 to \\udfff)") from None
