"""Which part of a list a query asks for: `after` an id, at most `limit`, in an order. Called by the routes that list
files and jobs; pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from starlette.datastructures import QueryParams

from uld_serve.errors import InvalidRequest

ItemT = TypeVar("ItemT")
MAX_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Page(Generic[ItemT]):
    items: Sequence[ItemT]
    has_more: bool


def page_of(
    items: Sequence[ItemT], query: QueryParams, *, id_of: Callable[[ItemT], str], default: int, most: int
) -> Page[ItemT]:
    """`items` in the order in which they are listed. Raises InvalidRequest naming the parameter."""
    start = 0
    after = query.get("after")
    if after is not None:
        ids = [id_of(item) for item in items]
        if after not in ids:
            raise InvalidRequest("after names nothing in this list", param="after")
        start = ids.index(after) + 1
    limit = _limit(query.get("limit"), default=default, most=most)
    return Page(items[start : start + limit], len(items) > start + limit)


def newest_first(query: QueryParams, *, default: bool) -> bool:
    order = query.get("order")
    if order not in (None, "asc", "desc"):
        raise InvalidRequest("order must be 'asc' or 'desc'", param="order")
    return default if order is None else order == "desc"


def _limit(text: str | None, *, default: int, most: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS and 1 <= int(text) <= most):
        raise InvalidRequest(f"limit must be a number from 1 to {most}", param="limit")
    return int(text)
