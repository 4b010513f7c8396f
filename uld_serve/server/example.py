"""What an example of a route is, and the names that all of them share. Knows no route."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import JsonValue

MODEL = "smollm2-135m-instruct"
DIGEST = "sha256:5f2b9c0e7d41a86bb3d3f0c6a1e94d2787f1c05be6294a3d8f70e1b2c4a59d63"
CREATED = 1790000000


@dataclass(frozen=True, slots=True)
class Example:
    """`requests` by what they show. `events` are the data lines of a streamed answer; `media` is the answer's type."""

    answer: JsonValue
    requests: dict[str, JsonValue] | None = None
    events: tuple[JsonValue, ...] = ()
    media: str = "application/json"
