"""Decode steps recorded once and replayed: the host then launches one graph instead of a thousand kernels. Made at
engine construction on a GPU; a step that fits no graph is run as it is. Knows no request and no profile.

A batch is padded to the next size and width, so few graphs serve all. Padding rows write to a block that nobody owns.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Series
from dataclasses import dataclass, field

import torch
from uld_kernels import SampleOutput, SampleRow, SampleShape, StaticSampler, WorkspaceTooSmall

from uld_serve.engine.batch import Batch, Drawn
from uld_serve.engine.recorded_step import Buffers, Record, RecordedStep, Recording
from uld_serve.engine.runner import Runner
from uld_serve.engine.sampler import InFlight, Sampler, same_draws
from uld_serve.engine.seating import Seating
from uld_serve.model.decoder import Decoder
from uld_serve.model.head import Scores
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.row_batch import RowBatch
from uld_serve.model.static_step import StaticShape, StaticStep

__all__ = ["CudaRecorder", "DecodeGraphs", "GraphedRunner", "Record", "Recording"]

logger = logging.getLogger(__name__)

# Recording takes as long as a few hundred steps: it pays for a shape that comes back.
RECORD_AT_SIGHT = 2
# Replays of a recording, each on other data, that the decoder runs too, before it is believed.
NUM_CHECKS = 3
LARGEST_NUMBER_OF_GRAPHS = 64
LARGEST_NUMBER_OF_SHAPES_SEEN = 1024
WARM_UP_RUNS = 2
# Share of the largest logit: products of other numbers of rows sum in other orders.
TOLERANCE = {torch.float32: 1e-3}
TOLERANCE_HALF = 0.05


_Key = tuple[StaticShape, SampleShape | None]
"""None: scores alone, no draws."""


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


@dataclass(frozen=True, slots=True)
class _Draws:
    """Which tokens to draw from a step's scores, and how."""

    batch: Batch
    drawn: Drawn | None
    sampler: Sampler


@dataclass(slots=True)
class DecodeGraphs:
    """`scratch_block` is a block of `cache` that belongs to no sequence, now or later.

    Graphs of one shape share its buffers, those with draws of one shape a sampler, and all samplers a workspace: only
    one of them runs at a time, and what it gave is read before the next.
    """

    decoder: Decoder
    cache: KVCache
    record: Record
    scratch_block: int
    max_rows: int
    num_replayed: int = 0
    num_recorded: int = 0
    _buffers: OrderedDict[StaticShape, Buffers] = field(default_factory=OrderedDict)
    _graphs: OrderedDict[_Key, RecordedStep] = field(default_factory=OrderedDict)
    _seen: Counter[_Key] = field(default_factory=Counter)
    _refused: set[_Key] = field(default_factory=set)
    _adapters: tuple[int, int, int] = (0, 0, 0)

    @torch.inference_mode()
    def try_run(self, rows: RowBatch) -> Scores | None:
        """The scores that the decoder's forward would give, or None for rows that it must run itself."""
        seating = self._seating(rows)
        if seating is None:
            return None
        step = self._replayed(seating, rows, None)
        return None if step is None else Scores(step.scores_of(seating.wanted(step.buffers.step)))

    @torch.inference_mode()
    def try_draw(self, batch: Batch, drawn: Drawn | None, sampler: Sampler) -> SampleOutput | None:
        """What the sampler would draw for a batch's wants, or None for one that must be run as it is. The output is
        overwritten by the next one."""
        seating = self._seating(batch.rows)
        if seating is None or any(want.target_id is not None for want in batch.wants):
            return None
        step = self._replayed(seating, batch.rows, _Draws(batch, drawn, sampler))
        return None if step is None else step.drawn()

    def _seating(self, rows: RowBatch) -> Seating | None:
        seating = Seating.of(rows, max_rows=self.max_rows)
        if seating is not None:
            for row in rows.assistants:
                self.decoder.bank.check(row.adapter_key, row.slot)
        return seating

    def _replayed(self, seating: Seating, rows: RowBatch, draws: _Draws | None) -> RecordedStep | None:
        self._forget_moved_adapters()
        buffers = self._buffers_of(seating.shape)
        wanted = seating.wanted(buffers.step)
        samples = None if draws is None else draws.sampler.rows(draws.batch.wants, wanted)
        key = self._key(seating.shape, samples)
        if key not in self._graphs and not self._is_worth_recording(key):
            return None
        buffers.fill(seating, rows)
        if draws is not None and None in draws.batch.fed:
            assert draws.drawn is not None, "a token that nobody knows"
            buffers.feed(seating, draws.batch.fed[None], draws.drawn)
        step = self._graphs.get(key) or self._recorded(key, buffers, draws, samples)
        if step is None:
            return None
        self._graphs.move_to_end(key)
        if step.sampler is not None and samples is not None:
            step.sampler.fill(samples)
        step.replay()
        if step.checks_left and not self._is_right(key, step, rows, wanted, draws, samples):
            return None
        self.num_replayed += 1
        return step

    def _buffers_of(self, shape: StaticShape) -> Buffers:
        if shape not in self._buffers:
            self._buffers[shape] = Buffers(StaticStep(self.decoder, self.cache, shape), self.scratch_block)
            if len(self._buffers) > LARGEST_NUMBER_OF_GRAPHS:
                oldest, _ = self._buffers.popitem(last=False)
                for key in [key for key in self._graphs if key[0] == oldest]:
                    del self._graphs[key]
        self._buffers.move_to_end(shape)
        return self._buffers[shape]

    def _key(self, shape: StaticShape, samples: Series[SampleRow] | None) -> _Key:
        """Of a graph that is there and takes these draws too, else of one made for them."""
        if samples is None:
            return shape, None
        exact = shape, SampleShape.of(samples, num_rows=shape.num_rows)
        if exact in self._graphs:
            return exact
        others = (key for key in self._graphs if key[0] == shape and key[1] is not None)
        return next((key for key in others if key[1] is not None and key[1].covers(samples)), exact)

    def _is_worth_recording(self, key: _Key) -> bool:
        if key in self._refused:
            return False
        if len(self._seen) >= LARGEST_NUMBER_OF_SHAPES_SEEN:
            self._seen.clear()
        self._seen[key] += 1
        return self._seen[key] >= RECORD_AT_SIGHT

    def _recorded(
        self, key: _Key, buffers: Buffers, draws: _Draws | None, samples: Series[SampleRow] | None
    ) -> RecordedStep | None:
        try:
            sampler = None
            if draws is not None and samples is not None and key[1] is not None:
                sampler = self._sampler(key[1], draws.sampler)
                sampler.fill(samples)
            step = RecordedStep.of(buffers, sampler, self.record, num_checks=NUM_CHECKS)
        except WorkspaceTooSmall as error:
            logger.warning("a decode step runs as it is, not recorded: %s; raise sampler_bytes", error)
            self._refused.add(key)
            return None
        except RuntimeError:
            logger.exception("a decode step of %d rows cannot be recorded and runs as it is", key[0].num_rows)
            self._refused.add(key)
            return None
        self.num_recorded += 1
        self._graphs[key] = step
        if len(self._graphs) > LARGEST_NUMBER_OF_GRAPHS:
            self._graphs.popitem(last=False)
        return step

    def _sampler(self, shape: SampleShape, sampler: Sampler) -> StaticSampler:
        made = (step.sampler for (_, other), step in self._graphs.items() if other == shape)
        return next((one for one in made if one is not None), None) or sampler.static(shape)

    def _is_right(
        self,
        key: _Key,
        step: RecordedStep,
        rows: RowBatch,
        wanted: list[int],
        draws: _Draws | None,
        samples: Series[SampleRow] | None,
    ) -> bool:
        """Whether the replay gave what the decoder and the sampler give, on these rows, whose keys and values are
        written a second time with the same values. NaN says nothing: it is asked again at the next replay."""
        own = rows if draws is None else draws.batch.on(self.decoder.base.device, draws.drawn)
        expected_RW = self.decoder.forward(own, self.cache).logits_RW
        found_RW = step.scores_of(wanted)
        if not bool(expected_RW.isfinite().all()):
            return False
        gap = float((found_RW - expected_RW).abs().max() / expected_RW.abs().max())
        is_right = gap <= TOLERANCE.get(self.decoder.base.dtype, TOLERANCE_HALF)
        if is_right and draws is not None and samples is not None:
            is_right = same_draws(step.drawn(), draws.sampler.draw(samples, Scores(step.logits_RW)))
        if is_right:
            step.checks_left -= 1
            return True
        logger.error("a recorded step of %d rows is off by %.1e and is not used", key[0].num_rows, gap)
        self._refused.add(key)
        del self._graphs[key]
        return False

    def _forget_moved_adapters(self) -> None:
        """A graph reads adapters where they lay when it was recorded. They move when one comes or goes."""
        bank = self.decoder.bank
        now = (bank.num_loads, bank.num_evictions, bank.resident_bytes)
        if now != self._adapters:
            self._adapters = now
            for key in [key for key in self._graphs if key[0].riders]:
                del self._graphs[key]


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

    def launch(self, batch: Batch, drawn: Drawn | None, sampler: Sampler) -> InFlight:
        """Run a batch and draw its tokens, in one graph where there is one."""
        output = None if self.graphs is None else self.graphs.try_draw(batch, drawn, sampler)
        if output is not None:
            return sampler.drawn(batch.wants, output)
        return sampler.launch(batch.wants, Runner.run(self, batch.on(sampler.device, drawn)))
