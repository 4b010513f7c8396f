"""Compiles JSON schemas beside an event loop and its step loop, one at a time, in the order in which they came. Used by
AsyncEngine; knows no request."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from uld_serve.engine.grammar import Grammar, Grammars
from uld_serve.errors import Overloaded

# Each takes up to a second.
MAX_WAITING = 16


class SchemaQueue:
    """A thread of its own: the event loop's default ones, which others need, would all wait for schemas. Who asks for a
    schema that is being compiled waits for the same one."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="uld-schemas")
        self._waiting: dict[tuple[str, str], Future[Grammar]] = {}

    async def compiled(self, schema: str, *, salt: str) -> Grammar:
        """Grammars.compiled; as long as the caller holds what he gets, the step loop finds it there. Raises
        InvalidRequest, and Overloaded when too many others wait."""
        found = self._grammars.find(schema, salt=salt)
        if found is not None:
            return found
        # Whoever leaves must not take it from the others who wait.
        return await asyncio.shield(asyncio.wrap_future(self._future(schema, salt)))

    def _future(self, schema: str, salt: str) -> Future[Grammar]:
        future = self._waiting.get((salt, schema))
        if future is None:
            if len(self._waiting) >= MAX_WAITING:
                raise Overloaded(f"{MAX_WAITING} new schemas are being looked at; try again later")
            future = self._thread.submit(self._grammars.compiled, schema, salt=salt)
            self._waiting[salt, schema] = future
            future.add_done_callback(partial(self._forget, (salt, schema)))
        return future

    def _forget(self, key: tuple[str, str], _done: Future[Grammar]) -> None:
        self._waiting.pop(key, None)
