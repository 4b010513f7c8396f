"""Decode steps recorded once and replayed: the host then launches one graph instead of a thousand kernels. Made at
engine construction on a GPU; a step that fits no graph is run as it is. Knows no request and no profile.

A batch is padded to the next size and width, so few graphs serve all. Padding rows write to a block that nobody owns.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from uld_serve.engine.runner import Runner
from uld_serve.engine.seating import Seating
from uld_serve.model.decoder import Decoder
from uld_serve.model.head import Scores
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.row_batch import RowBatch
from uld_serve.model.static_step import StaticShape, StaticStep

logger = logging.getLogger(__name__)

# Recording takes as long as a few hundred steps: it pays for a shape that comes back.
RECORD_AT_SIGHT = 2
LARGEST_NUMBER_OF_GRAPHS = 64
LARGEST_NUMBER_OF_SHAPES_SEEN = 1024
WARM_UP_RUNS = 2
# Share of the largest logit: products of other numbers of rows sum in other orders.
TOLERANCE = {torch.float32: 1e-3}
TOLERANCE_HALF = 0.05


class Recording(Protocol):
    """A recorded run: `replay` runs it again on whatever its buffers hold, into the same result."""

    @property
    def result(self) -> torch.Tensor: ...

    def replay(self) -> None: ...


Record = Callable[[Callable[[], torch.Tensor]], Recording]
"""Records what a function does on the device. The function may be run more than once before."""


@dataclass(frozen=True, slots=True)
class _CudaRecording:
    graph: torch.cuda.CUDAGraph
    result: torch.Tensor

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Records CUDA graphs that share one memory pool: only one of them runs at a time, and its result is read before
    the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], torch.Tensor]) -> Recording:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # compiles kernels and fills caches, which cannot be recorded
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        return _CudaRecording(graph, result)


@dataclass(slots=True)
class _Graph:
    """A recorded step, and what its rows' block tables hold on the host."""

    step: StaticStep
    recording: Recording
    blocks: list[list[int]]
    host_PB: torch.Tensor


@dataclass(slots=True)
class DecodeGraphs:
    """`scratch_block` is a block of `cache` that belongs to no sequence, now or later."""

    decoder: Decoder
    cache: KVCache
    record: Record
    scratch_block: int
    max_rows: int
    num_replayed: int = 0
    num_recorded: int = 0
    _graphs: OrderedDict[StaticShape, _Graph] = field(default_factory=OrderedDict)
    _seen: Counter[StaticShape] = field(default_factory=Counter)
    _refused: set[StaticShape] = field(default_factory=set)
    _adapters: tuple[int, int, int] = (0, 0, 0)

    @torch.inference_mode()
    def try_run(self, rows: RowBatch) -> Scores | None:
        """The scores that the decoder's forward would give, or None for rows that it must run itself."""
        seating = Seating.of(rows, max_rows=self.max_rows)
        if seating is None:
            return None
        for row in rows.assistants:
            self.decoder.bank.check(row.adapter_key, row.slot)
        graph = self._graph(seating, rows)
        if graph is None:
            return None
        self._graphs.move_to_end(seating.shape)
        self._fill(graph, seating, rows)
        logits_RW = graph.recording.result
        wanted = seating.wanted(graph.step)
        picks = None
        if wanted != list(range(logits_RW.shape[0])):
            # Before the replay: a copy from the host waits for what was launched earlier.
            picks = torch.tensor(wanted, device=logits_RW.device)
        graph.recording.replay()
        self.num_replayed += 1
        return Scores(logits_RW if picks is None else logits_RW.index_select(0, picks))

    def _graph(self, seating: Seating, rows: RowBatch) -> _Graph | None:
        self._forget_moved_adapters()
        shape = seating.shape
        if shape in self._graphs:
            return self._graphs[shape]
        if shape in self._refused:
            return None
        if len(self._seen) >= LARGEST_NUMBER_OF_SHAPES_SEEN:
            self._seen.clear()
        self._seen[shape] += 1
        if self._seen[shape] < RECORD_AT_SIGHT:
            return None
        return self._recorded(seating, rows)

    def _recorded(self, seating: Seating, rows: RowBatch) -> _Graph | None:
        step = StaticStep(self.decoder, self.cache, seating.shape)
        # Runs before the recording see this step's own rows: what they write is what the replay writes.
        host_PB = torch.full(
            step.blocks_PB.shape, self.scratch_block, pin_memory=step.blocks_PB.is_cuda, dtype=torch.long
        )
        blocks: list[list[int]] = [[] for _ in range(seating.shape.num_rows)]
        self._fill_buffers(step, blocks, host_PB, seating, rows)
        try:
            recording = self.record(step.forward)
        except RuntimeError:
            logger.exception("a decode step of %d rows cannot be recorded and runs as it is", len(blocks))
            self._refused.add(seating.shape)
            return None
        self.num_recorded += 1
        graph = _Graph(step, recording, blocks, host_PB)
        if not self._gives_what_the_decoder_does(graph, seating, rows):
            self._refused.add(seating.shape)
            return None
        self._graphs[seating.shape] = graph
        if len(self._graphs) > LARGEST_NUMBER_OF_GRAPHS:
            self._graphs.popitem(last=False)
        return graph

    def _gives_what_the_decoder_does(self, graph: _Graph, seating: Seating, rows: RowBatch) -> bool:
        """On these rows, whose keys and values are written a second time with the same values."""
        expected_RW = self.decoder.forward(rows, self.cache).logits_RW
        graph.recording.replay()
        found_RW = graph.recording.result[torch.tensor(seating.wanted(graph.step), device=expected_RW.device)]
        gap = float((found_RW - expected_RW).abs().max() / expected_RW.abs().max())
        if gap <= TOLERANCE.get(self.decoder.base.dtype, TOLERANCE_HALF):
            return True
        logger.error("a recorded step of %d rows is off by %.1e and is not used", len(graph.blocks), gap)
        return False

    def _forget_moved_adapters(self) -> None:
        """A graph reads adapters where they lay when it was recorded. They move when one comes or goes."""
        bank = self.decoder.bank
        now = (bank.num_loads, bank.num_evictions, bank.resident_bytes)
        if now != self._adapters:
            self._adapters = now
            for shape in [shape for shape in self._graphs if shape.riders]:
                del self._graphs[shape]

    def _fill(self, graph: _Graph, seating: Seating, rows: RowBatch) -> None:
        self._fill_buffers(graph.step, graph.blocks, graph.host_PB, seating, rows)

    def _fill_buffers(
        self,
        step: StaticStep,
        blocks: list[list[int]],
        host_PB: torch.Tensor,
        seating: Seating,
        rows: RowBatch,
    ) -> None:
        """This step's data into the buffers; padding rows hold token 0 at position 0 of the scratch block."""
        order, count = seating.order, len(seating.order)
        given = (rows.token_ids_T, rows.positions_T, rows.slots_T)
        paddings = (0, 0, self.scratch_block * self.cache.block_size)
        index = None
        if order != list(range(count)):
            index = torch.tensor(order, device=step.token_ids_P.device)
        buffers = (step.token_ids_P, step.positions_P, step.slots_P)
        for buffer_P, data_T, padding in zip(buffers, given, paddings, strict=True):
            buffer_P[:count].copy_(data_T if index is None else data_T.index_select(0, index))
            buffer_P[count:].fill_(padding)
        wanted = [list(rows.sequences[row].blocks) for row in order]
        wanted += [[self.scratch_block]] * (len(blocks) - count)
        for row, (before, after) in enumerate(zip(blocks, wanted, strict=True)):
            if before != after:  # of 16 steps one adds a block
                # What lies past a context repeats a block of its own: NaN in another's would not be hidden by a mask.
                filled = after + after[:1] * (host_PB.shape[1] - len(after))
                host_PB[row] = torch.tensor(filled)
                blocks[row] = after
        step.blocks_PB.copy_(host_PB, non_blocking=True)
        if seating.adapters:
            step.adapters_RP.copy_(torch.tensor(seating.adapters))


@dataclass(slots=True)
class GraphedRunner(Runner):
    """A runner whose decode steps are replayed where they can be."""

    graphs: DecodeGraphs | None = None

    @classmethod
    def around(cls, runner: Runner, record: Record, *, max_rows: int) -> GraphedRunner:
        """Takes over a runner that holds nothing yet: its cache is laid out anew, with one block more for padding."""
        decoder, old = runner.decoder, runner.cache
        num_blocks, block_size = old.num_blocks, old.block_size
        # Freed before the new one is taken: a cache fills most of a device.
        runner.cache = KVCache((), block_size)
        del old
        cache = decoder.allocate_cache(decoder.base.num_layers, num_blocks + 1, block_size=block_size)
        graphs = DecodeGraphs(decoder, cache, record, scratch_block=num_blocks, max_rows=max_rows)
        return cls(decoder, cache, runner.own, runner.separate, graphs)

    def run(self, rows: RowBatch) -> Scores:
        scores = None if self.graphs is None else self.graphs.try_run(rows)
        return Runner.run(self, rows) if scores is None else scores
