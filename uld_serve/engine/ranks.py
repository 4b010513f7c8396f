"""The processes that share one base: who they are, and what the first tells the others. Rank 0 schedules, samples and
serves; the others do what it tells them. Knows no request.

Messages travel over a gloo group of their own, also where tensors go over NCCL.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from uld_serve.config import EngineConfig
from uld_serve.engine.lifeline import Lifeline
from uld_serve.errors import InvalidRequest, RanksLost
from uld_serve.model.row_batch import RowBatch
from uld_serve.model.shards import Adapter, Part

# A step's sums take milliseconds once all ranks have been told; a process that has died is noticed at once.
STEP_TIMEOUT = timedelta(minutes=2)
# Between requests the others wait for as long as there are none.
IDLE_TIMEOUT = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class Begin:
    """What the others must agree on before the first step."""

    fingerprint: str
    config: EngineConfig


@dataclass(frozen=True, slots=True)
class Run:
    rows: RowBatch


@dataclass(frozen=True, slots=True)
class Clear:
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Acquire:
    """`adapter` is whole, and None where every rank holds its part already."""

    key: str
    adapter: Adapter | None


@dataclass(frozen=True, slots=True)
class Release:
    key: str


@dataclass(frozen=True, slots=True)
class EvictAll:
    prefix: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The server has ended."""


Message = Begin | Run | Clear | Acquire | Release | EvictAll | Stop


@dataclass(frozen=True, slots=True)
class Ranks:
    part: Part
    control: dist.ProcessGroup
    lifeline: Lifeline

    @classmethod
    def join(
        cls, size: int, environment: Mapping[str, str], *, device: str, on_lost: Callable[[], None]
    ) -> Ranks:
        """The group that torchrun's environment variables describe; returns when all have come. `on_lost`: see
        Lifeline. Raises InvalidRequest."""
        try:
            rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        except (KeyError, ValueError) as error:
            raise InvalidRequest("RANK and WORLD_SIZE must be set; torchrun sets them") from error
        if world != size:
            raise InvalidRequest(f"--tensor-parallel {size}, but torchrun has started {world} processes")
        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        if not on_cpu:
            torch.cuda.set_device(int(environment.get("LOCAL_RANK", rank)))
        dist.init_process_group("gloo" if on_cpu else "nccl", timeout=STEP_TIMEOUT)
        control = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
        assert isinstance(control, dist.ProcessGroup), "every rank is in the group"
        address: list[tuple[str, int] | None] = [None]
        if rank == 0:
            host = environment.get("MASTER_ADDR", "127.0.0.1")
            lifeline, address[0] = Lifeline.listening(host, size - 1, on_lost)
        dist.broadcast_object_list(address, src=0, group=control, device=torch.device("cpu"))
        if rank != 0:
            assert address[0] is not None, "rank 0 has an address"
            lifeline = Lifeline.connected(address[0], on_lost)
        return cls(Part(rank, size), control, lifeline)

    def leave(self) -> None:
        """At an orderly end: rank 0 sends the others home."""
        self.lifeline.close()
        if self.part.rank == 0:
            with contextlib.suppress(RanksLost):
                self.tell(Stop())

    def tell(self, message: Message) -> None:
        """Rank 0 to all others. Raises RanksLost."""
        try:
            dist.broadcast_object_list([message], src=0, group=self.control, device=torch.device("cpu"))
        except (RuntimeError, pickle.PickleError) as error:
            raise RanksLost("a process that shares this model is gone") from error

    def hear(self) -> Message:
        """What rank 0 tells next. Raises RanksLost."""
        heard: list[Message | None] = [None]
        try:
            dist.broadcast_object_list(heard, src=0, group=self.control, device=torch.device("cpu"))
        except RuntimeError as error:
            raise RanksLost("the process that serves is gone") from error
        assert heard[0] is not None, "rank 0 said nothing"
        return heard[0]
