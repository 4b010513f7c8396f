"""The engine behind an event loop: one thread steps, any number of coroutines stream. Called by the server.

A stream that is closed early aborts its request. Every stream ends with exactly one finishing Delta, or with
an exception before the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from uld_serve.engine.engine import Engine
from uld_serve.engine.grammar import Grammar
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import Delta, Load, SamplingParams
from uld_serve.engine.schema_queue import SchemaQueue
from uld_serve.engine.tokenizer import Tokenizer
from uld_serve.errors import EngineStopped, Overloaded, UldError
from uld_serve.model.heap import give_back

ResultT = TypeVar("ResultT")

logger = logging.getLogger(__name__)

IDLE_BEAT_S = 1.0
TIDY_S = 60.0
"""How often freed memory is given back to the system, at most: a few milliseconds each time."""


@dataclass(slots=True, eq=False)
class _Stream:
    """Where a request's deltas go: a queue that lives in its own event loop. `grammar` is held for the engine, which
    must not compile it again."""

    request_id: str
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Delta | UldError]
    grammar: Grammar | None

    def put(self, item: Delta | UldError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


def _tell(done: asyncio.Future[ResultT], tell: Callable[[], None]) -> None:
    """Once, in the event loop that waits; nobody is told who has stopped waiting."""
    with contextlib.suppress(RuntimeError):
        done.get_loop().call_soon_threadsafe(lambda: None if done.done() else tell())


class AsyncEngine:
    """`start` it, `stream` from it, `stop` it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._schemas = SchemaQueue(engine.grammars)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # touched by the step loop's thread only
        self._open: set[_Stream] = (
            set()
        )  # touched by event loops only, but for a look when the step loop ends
        self._thread = threading.Thread(target=self._run, name="uld-step-loop", daemon=True)
        self._beat = time.monotonic()
        self._is_stopping = False
        self._failure: UldError | None = None
        self._tidied, self._has_stepped = self._beat, False

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int:
        return self._engine.config.max_model_len

    @property
    def is_alive(self) -> bool:
        """Whether a request would be served now."""
        return self._thread.is_alive() and self._failure is None and not self._is_stopping

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the step loop last came round; it does so at least once a second when idle."""
        return time.monotonic() - self._beat

    @property
    def load(self) -> Load:
        return self._engine.load

    @property
    def num_open(self) -> int:
        """Streams that have not ended."""
        return len(self._open)

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, grace_s: float = 0.0) -> None:
        """Refuse new requests, let those in flight run for up to `grace_s`, fail the rest, end the thread."""
        self._is_stopping = True
        deadline = time.monotonic() + grace_s
        while self._engine.has_work and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    async def stream(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        decision: Decision,
        *,
        request_id: str,
        tenant: str = "",
        cache_salt: str = "",
    ) -> AsyncIterator[Delta]:
        """Deltas of one request; the last has `finish_reason`. Close the iterator to abort. Tenants take turns, and
        cached prefixes are shared with requests of the same salt only.

        Raises InvalidRequest, PromptTooLong, Overloaded, ProfileError or EngineStopped before the first Delta.
        A request that fails later ends with a Delta of finish_reason "error".
        """
        self._refuse_if_full()
        grammar = await self._grammar(params, cache_salt)
        self._engine.validate(prompt_ids, params, cache_salt=cache_salt)
        stream = _Stream(request_id, asyncio.get_running_loop(), asyncio.Queue(), grammar)
        self._open.add(stream)
        is_finished = False
        try:
            self._inbox.put(lambda: self._add(stream, prompt_ids, params, decision, tenant, cache_salt))
            if not self.is_alive:
                # The loop may have ended since it was asked, and nobody would read the inbox again. If it has not, it
                # must not work for nobody.
                raise self._failure or EngineStopped("the server is stopping; send the request elsewhere")
            while not is_finished:
                item = await stream.queue.get()
                is_finished = isinstance(item, UldError) or item.finish_reason is not None
                if isinstance(item, UldError):
                    raise item
                yield item
        finally:
            self._open.discard(stream)
            if not is_finished:
                self._inbox.put(lambda: self._abort(stream))

    async def between_steps(self, work: Callable[[Engine], ResultT]) -> ResultT:
        """What `work` gives, done on the engine by its own thread. Raises what it raises, or EngineStopped."""
        done: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                result = work(self._engine)
            except Exception as error:  # noqa: BLE001 - it is the asker's, not the loop's
                _tell(done, partial(done.set_exception, error))
            else:
                _tell(done, partial(done.set_result, result))

        self._inbox.put(run)
        if not self.is_alive:
            raise self._failure or EngineStopped("the server is stopping; send the request elsewhere")
        return await done

    async def _grammar(self, params: SamplingParams, cache_salt: str) -> Grammar | None:
        if params.json_schema is None:
            return None
        grammar = await self._schemas.compiled(params.json_schema, salt=cache_salt)
        self._refuse_if_full()
        return grammar

    def _refuse_if_full(self) -> None:
        if not self.is_alive:
            raise self._failure or EngineStopped("the server is stopping; send the request elsewhere")
        limit = self._engine.config.max_num_seqs + self._engine.config.max_waiting
        if self.num_open >= limit:
            raise Overloaded(f"{self.num_open} requests are in flight; try again later")

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._publish(self._engine.step())
                self._beat, self._has_stepped = time.monotonic(), True
                self._tidy()
        except Exception as error:
            logger.exception("the step loop failed")
            self._failure = EngineStopped(
                f"the engine has stopped after an internal error ({type(error).__name__})"
            )
        finally:
            self._end_all(self._failure or EngineStopped("the server has stopped"))

    def _take_inbox(self) -> bool:
        """Do what event loops have asked for, waiting while there is nothing to run; False means stop."""
        while True:
            try:
                command = self._inbox.get(block=not self._engine.has_work, timeout=IDLE_BEAT_S)
            except queue.Empty:
                self._beat = time.monotonic()
                self._tidy()
                if self._engine.has_work:
                    return True
                continue
            if command is None:
                return False
            command()

    def _tidy(self) -> None:
        """Gives back what steps have freed."""
        if self._has_stepped and self._beat - self._tidied >= TIDY_S:
            give_back()
            self._tidied, self._has_stepped = self._beat, False

    def _add(
        self,
        stream: _Stream,
        prompt_ids: list[int],
        params: SamplingParams,
        decision: Decision,
        tenant: str,
        cache_salt: str,
    ) -> None:
        try:
            self._engine.add(
                stream.request_id, prompt_ids, params, decision, tenant=tenant, cache_salt=cache_salt
            )
        except UldError as error:
            stream.put(error)
        except Exception:
            logger.exception("request %s could not be prepared", stream.request_id)
            stream.put(UldError("the request could not be prepared"))
        else:
            self._streams[stream.request_id] = stream

    def _abort(self, stream: _Stream) -> None:
        if self._streams.pop(stream.request_id, None) is not None:
            self._engine.abort(stream.request_id)

    def _publish(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            stream = self._streams[delta.request_id]
            if delta.finish_reason is not None:
                del self._streams[delta.request_id]
            stream.put(delta)

    def _end_all(self, error: UldError) -> None:
        """Tell everybody who still waits, also those whose command was never taken, or failed."""
        for stream in self._streams.values():
            stream.put(Delta(request_id=stream.request_id, finish_reason="error", error=error))
        self._streams.clear()
        self._is_stopping = True
        for stream in list(self._open):  # who was told above has ended when this comes
            stream.put(error)
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._inbox.get_nowait()
                if command is not None:
                    self._refuse_late(command, error)

    def _refuse_late(self, command: Callable[[], None], error: UldError) -> None:
        command()
        for stream in self._streams.values():
            self._engine.abort(stream.request_id)
            stream.put(error)
        self._streams.clear()
