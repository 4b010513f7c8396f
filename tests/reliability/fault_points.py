"""Every place at which a fault is put in, by name: one list. Nothing of it is in the product; a point is a function of
it, which `Fault` wraps for as long as a test runs.

What a fault at a point may do is said here too: end the requests that come through it, or, where the engine's own
books are being kept, stop the engine, which then refuses everybody."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from uld_serve.model.head import Scores

Kind = Literal["raise", "raise after", "delay", "cancel", "nan"]
KINDS: tuple[Kind, ...] = ("raise", "raise after", "delay", "cancel")
DELAY_S = 0.05


@dataclass(frozen=True)
class Point:
    """`stops`: a failure here may stop the engine, since it leaves open what is held. `gives_scores`: NaN can be put
    into what it gives. `takes`: it hands over what the caller must give back, so it does not fail once it has.
    `needs`: what must happen for it to be passed."""

    where: str
    stops: bool = False
    gives_scores: bool = False
    takes: bool = False
    needs: Literal["request", "load", "unload", "failure"] = "request"

    @property
    def kinds(self) -> tuple[Kind, ...]:
        kinds = (*KINDS, "nan") if self.gives_scores else KINDS
        return tuple(kind for kind in kinds if not (self.takes and kind == "raise after"))

    def place(self) -> tuple[object, str]:
        """The module or class, and its attribute."""
        module, _, path = self.where.partition(":")
        owner: object = importlib.import_module(f"uld_serve.{module}")
        *classes, name = path.split(".")
        for one in classes:
            owner = getattr(owner, one)
        return owner, name


POINTS: dict[str, Point] = {
    # A request comes in.
    "keys": Point("server.admission:policy_of"),
    "body": Point("server.admission:read_body"),
    "JSON gate": Point("server.admission:parse_object"),
    "fields": Point("server.admission:check_request"),
    "selection": Point("server.admission:_selection"),
    "policy": Point("server.admission:resolve"),
    "lease": Point("server.leases:Leases.held"),
    "admitted": Point("server.in_flight:InFlight.admitted"),
    "encoding": Point("server.completions:completion_choices"),
    "telemetry": Point("server.telemetry:Telemetry.begin"),
    "audit": Point("server.audit:AuditLog.write"),
    "in flight": Point("server.in_flight:InFlight.entered"),
    # It is handed to the engine.
    "submit": Point("engine.async_engine:AsyncEngine._refuse_if_full"),
    "limits": Point("engine.admission:Admission.validate"),
    "engine queue": Point("engine.engine:Engine.add", takes=True),
    "sequence": Point("engine.admission:Admission.sequence", takes=True),
    "plan": Point("engine.plan:Planner.plan", takes=True),
    "adapter seat": Point("model.adapter_bank:AdapterBank.acquire", takes=True),
    "adapter file": Point("profiles.shelf:AdapterShelf.__getitem__"),
    "adapter memory": Point("model.lora:LoraDelta.put"),
    "lanes": Point("engine.pools:Pools.lanes"),
    # It is scheduled; its blocks are taken, shared and given back.
    "inbox": Point("engine.async_engine:AsyncEngine._add", stops=True),
    "schedule": Point("engine.scheduler:Scheduler.schedule", stops=True),
    "let in": Point("engine.scheduler:Scheduler._admit", stops=True),
    "preempt": Point("engine.scheduler:Scheduler._preempt", stops=True),
    "prefix": Point("engine.pools:Pools.reuse_prefix", stops=True),
    "extend": Point("engine.pools:Pools.try_extend", stops=True),
    "take blocks": Point("engine.block_pool:BlockPool.try_take", stops=True),
    "give back": Point("engine.block_pool:BlockPool.give_back", stops=True),
    "publish block": Point("engine.block_pool:BlockPool.publish"),
    "advance": Point("engine.scheduler:Scheduler.advance"),
    # A step runs.
    "batch": Point("engine.batch:Batch.of"),
    "transfer": Point("engine.batch:Batch.on"),
    "clear blocks": Point("engine.runner:Runner.clear"),
    "run": Point("engine.runner:Runner.run", gives_scores=True),
    "decoder": Point("model.decoder:Decoder.forward", gives_scores=True),
    "layers": Point("model.decoder:Decoder._run_layers", gives_scores=True),
    "adapter check": Point("model.adapter_bank:AdapterBank.check"),
    "adapter rows": Point("model.lora_rows:LoraRows.seat"),
    "sampler rows": Point("engine.sampler:Sampler.rows"),
    "draw": Point("engine.sampler:Sampler.draw"),
    "launch": Point("engine.sampler:Sampler.launch"),
    "collect": Point("engine.sampler:Sampler.collect"),
    "receipt": Point("engine.sampler:Sampler._receipt"),
    # Its tokens become text and leave.
    "accept": Point("engine.engine:Engine._accept"),
    "detokenizer": Point("engine.detokenizer:Detokenizer.push"),
    "last text": Point("engine.detokenizer:Detokenizer.flush"),
    "finish": Point("engine.engine:Engine._finish", stops=True),
    "release": Point("engine.plan:Planner.release", stops=True),
    "hand over": Point("engine.async_engine:AsyncEngine._publish", stops=True),
    "abort": Point("engine.async_engine:AsyncEngine._abort", stops=True, needs="failure"),
    "pump": Point("server.generation:_pump"),
    "seen": Point("server.watch:Watch.saw"),
    "ended": Point("server.watch:Watch.end"),
    "events": Point("server.sse:_send_event"),
    "answer": Point("server.completions:json_response"),
    # A profile is loaded, swapped, unloaded.
    "read profile": Point("server.loader:read_profile", needs="load"),
    "check base": Point("server.loader:check_base", needs="load"),
    "provide": Point("engine.engine:Engine.prepare", needs="load"),
    "check plan": Point("engine.plan:Planner.check", needs="load"),
    "replay": Point("engine.live_profiles:_replay", needs="load"),
    "swap": Point("profiles.registry:Registry.replace", needs="load"),
    "let go": Point("server.loader:drop_live", needs="load"),
    "evict": Point("model.adapter_bank:AdapterBank.evict", needs="load"),
    "unload": Point("profiles.registry:Registry.remove", needs="unload"),
    "wait for leases": Point("server.leases:Leases.until_free", needs="unload"),
}


class Injected(RuntimeError):
    """What a fault raises: nothing in the product knows it."""


@dataclass
class Fault:
    """At the `at`-th passage of a point. `cancel` is called for that kind: it makes clients leave. Only steps of the
    engine and requests count, from any thread; `num_passed` is how often it was passed."""

    point: Point
    kind: Kind
    at: int
    cancel: Callable[[], None]
    num_passed: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @property
    def has_struck(self) -> bool:
        return self.num_passed >= self.at

    @contextmanager
    def in_place(self) -> Iterator[Fault]:
        owner, name = self.point.place()
        raw = inspect.getattr_static(owner, name)
        is_class_method = isinstance(raw, classmethod | staticmethod)
        original = raw.__func__ if is_class_method else raw
        wrapped = self._wrapped(original)
        setattr(owner, name, type(raw)(wrapped) if is_class_method else wrapped)
        try:
            yield self
        finally:
            setattr(owner, name, raw)

    def _is_now(self) -> bool:
        with self._lock:
            self.num_passed += 1
            return self.num_passed == self.at

    def _wrapped(self, original: Callable[..., object]) -> Callable[..., object]:
        if inspect.iscoroutinefunction(original):

            @functools.wraps(original)
            async def waits(*args: object, **kwargs: object) -> object:
                is_now = self._is_now()
                if is_now and self.kind == "delay":
                    await asyncio.sleep(DELAY_S)
                if is_now and self.kind == "cancel":
                    self.cancel()
                    await asyncio.sleep(0.01)
                if is_now and self.kind == "raise":
                    raise Injected("here")
                result = await original(*args, **kwargs)
                if is_now and self.kind == "raise after":
                    raise Injected("after")
                return result

            return waits

        @functools.wraps(original)
        def runs(*args: object, **kwargs: object) -> object:
            is_now = self._is_now()
            if is_now and self.kind == "delay":
                time.sleep(DELAY_S)
            if is_now and self.kind == "cancel":
                self.cancel()
            if is_now and self.kind == "raise":
                raise Injected("here")
            result = original(*args, **kwargs)
            if is_now and self.kind == "raise after":
                raise Injected("after")
            return _with_nan(result) if is_now and self.kind == "nan" else result

        return runs


def _with_nan(result: object) -> object:
    """NaN in the last row, as an assistant's that overflowed, or in every row of the head."""
    if isinstance(result, Scores):
        logits_RW = result.logits_RW.clone()
        logits_RW[-1] = torch.nan
        late = result.late
        if late is not None:
            late = replace(late, hidden_AD=torch.full_like(late.hidden_AD, torch.nan))
        return Scores(logits_RW, late)
    assert isinstance(result, torch.Tensor)
    result = result.clone()
    result[-1] = torch.nan
    return result
