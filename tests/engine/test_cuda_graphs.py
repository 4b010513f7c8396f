"""Recorded decode steps: same tokens, padding that touches nothing, and what is left to the decoder. Steps are recorded
operation by operation on the CPU, as a CUDA graph would on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from recorded_run import RecordedRun
from tiny_base import Tiny
from uld_kernels import SampleOutput, SampleRow, SampleShape, StaticSampler, ops

from uld_serve.engine import cuda_graphs, sampler
from uld_serve.engine.cuda_graphs import DecodeGraphs, GraphedRunner
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.engine.seating import padded_size
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.row_batch import AssistantRow, OwnRows, RowBatch, SequenceRows

BLOCK_SIZE = 16
NUM_BLOCKS = 40


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(block_size=BLOCK_SIZE)


def with_graphs(engine: Engine, record: cuda_graphs.Record = RecordedRun) -> DecodeGraphs:
    engine.planner.defers_logits = False  # as on a GPU
    runner = GraphedRunner.around(engine.runner, record, max_rows=64)
    engine.runner = runner
    assert runner.graphs is not None
    return runner.graphs


def generate(engine: Engine, requests: list[tuple[Decision, int, int]]) -> list[list[int]]:
    """Tokens of requests (decision, prompt length, number of tokens), each joining one step after the one before."""
    tokens: list[list[int]] = [[] for _ in requests]
    waiting = list(enumerate(requests))
    while waiting or engine.has_work:
        if waiting:
            number, (decision, length, max_tokens) = waiting.pop(0)
            prompt = [(7 * number + 3 * i) % 250 for i in range(length)]
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, seed=number)
            engine.add(str(number), prompt, params, decision)
        for delta in engine.step():
            assert delta.error is None
            tokens[int(delta.request_id)] += delta.token_ids
        engine.check_integrity()
    return tokens


def decisions(tiny: Tiny, *names: str | None) -> list[Decision]:
    return [Decision.base() if name is None else Decision.of_version(tiny.version(name)) for name in names]


MIXES = {
    "plain": [None, None, None],
    "one profile": ["late-fork"] * 5,
    "profiles and plain": ["late-fork", None, "all-layers", None, "late-fork"],
    "two streams": ["pair", "pair", None],
    "two forks": ["truncated", "late-fork", "truncated"],
}


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("mix", MIXES)
def test_recorded_steps_give_the_tokens_of_eager_ones(
    make_engine: Callable[..., Engine], tiny: Tiny, mix: str, overlap: bool
) -> None:
    """Requests join and end while others run, so sizes, widths and profiles change under way."""
    given = decisions(tiny, *MIXES[mix])
    requests = [(decision, 5 + 9 * number, 30 - 2 * number) for number, decision in enumerate(given)]
    eager, recorded = make_engine(block_size=BLOCK_SIZE), make_engine(block_size=BLOCK_SIZE, overlap=overlap)
    expected = generate(eager, requests)
    graphs = with_graphs(recorded)
    assert generate(recorded, requests) == expected
    assert graphs.num_replayed > 15
    assert graphs.num_recorded >= 2


def pools(cache: KVCache) -> list[torch.Tensor]:
    """Keys and values of every layer, slot by slot."""
    return [*cache.keys_SHD, *cache.values_SHD]


class Step:
    """Rows of three sequences in one step, with room in a cache of their own."""

    def __init__(self, engine: Engine, tiny: Tiny, *, record: cuda_graphs.Record = RecordedRun) -> None:
        self.decoder = engine.runner.decoder
        version = tiny.version("late-fork")
        self.key = "a"
        self.slot = self.decoder.bank.acquire("a", lambda: next(iter(version.adapters.values())))
        self.cache = KVCache.allocate(
            self.decoder.base.num_layers,
            NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_kv_heads=self.decoder.num_kv_heads,
            head_dim=self.decoder.head_dim,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        generator = torch.Generator().manual_seed(0)
        for pool in pools(self.cache):
            pool.copy_(torch.randn(pool.shape, generator=generator))
        self.graphs = DecodeGraphs(self.decoder, self.cache, record, scratch_block=NUM_BLOCKS - 1, max_rows=8)

    def rows(self, *, on: tuple[int, ...] = (0, 2), **changes: object) -> RowBatch:
        """Sequences of 20, 5 and 33 tokens; the sequences `on` have an assistant."""
        given = {
            "token_ids_T": torch.tensor([5, 6, 7]),
            "positions_T": torch.tensor([19, 4, 32]),
            "slots_T": torch.tensor([4 * 16 + 3, 6 * 16 + 4, 9 * 16]),
            "sequences": (
                SequenceRows(0, 1, [3, 4]),
                SequenceRows(1, 1, [6]),
                SequenceRows(2, 1, [7, 8, 9]),
            ),
            "assistants": tuple(AssistantRow(source, 2, 4, self.slot, self.key) for source in on),
            "head_rows": torch.arange(3),
        }
        return RowBatch(**{**given, **changes})

    def eager(self, rows: RowBatch) -> torch.Tensor:
        return self.decoder.forward(rows, self.cache).logits_RW

    def recorded(self, rows: RowBatch) -> torch.Tensor:
        """Twice, since a shape is recorded when it comes back."""
        scores = self.graphs.try_run(rows) or self.graphs.try_run(rows)
        assert scores is not None
        return scores.logits_RW


@pytest.fixture
def step(engine: Engine, tiny: Tiny) -> Step:
    return Step(engine, tiny)


def test_scores_come_in_the_order_of_the_batch(step: Step) -> None:
    rows = step.rows()
    expected = step.eager(rows)
    torch.testing.assert_close(step.recorded(rows), expected, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(expected[0], expected[3], atol=1e-2)


def test_the_engine_knows_nothing_of_the_scratch_block(engine: Engine) -> None:
    graphs = with_graphs(engine)
    assert graphs.scratch_block == engine.scheduler.pool.num_blocks
    assert engine.runner.cache.num_blocks == engine.scheduler.pool.num_blocks + 1


def test_padding_writes_to_the_scratch_block_alone(step: Step) -> None:
    rows = step.rows()
    before = [pool.clone() for pool in pools(step.cache)]
    step.recorded(rows)
    for old, new in zip(before, pools(step.cache), strict=True):
        changed = (old != new).flatten(1).any(1).nonzero().flatten().tolist()
        scratch = range((NUM_BLOCKS - 1) * BLOCK_SIZE, NUM_BLOCKS * BLOCK_SIZE)
        assert sorted(set(changed) - set(scratch)) == sorted(rows.slots_T.tolist())
        assert set(changed) & set(scratch) == {scratch[0]}


def test_what_the_scratch_block_holds_reaches_no_row(step: Step) -> None:
    rows = step.rows()
    expected = step.recorded(rows).clone()
    for pool in pools(step.cache):
        pool[-BLOCK_SIZE:] = torch.nan
    assert torch.equal(step.recorded(rows), expected)


def test_a_replay_reads_this_steps_data(step: Step) -> None:
    """Other tokens, positions and blocks, and the assistant on another sequence, through the same recording."""
    step.recorded(step.rows(on=(0, 2)))
    rows = step.rows(
        on=(1, 2),
        token_ids_T=torch.tensor([50, 60, 70]),
        positions_T=torch.tensor([18, 15, 40]),
        slots_T=torch.tensor([14 * 16 + 2, 16 * 16 + 15, 19 * 16 + 8]),
        sequences=(SequenceRows(0, 1, [13, 14]), SequenceRows(1, 1, [16]), SequenceRows(2, 1, [17, 18, 19])),
    )
    expected = step.eager(rows)
    scores = step.graphs.try_run(rows)
    assert scores is not None
    assert step.graphs.num_recorded == 1
    torch.testing.assert_close(scores.logits_RW, expected, atol=1e-4, rtol=1e-5)


def test_other_adapters_and_mixes_are_data_too(step: Step, tiny: Tiny) -> None:
    """Ten adapters in turn, and an assistant here or there, through one recording."""
    adapter = next(iter(tiny.version("late-fork").adapters.values()))

    class Stronger:
        tensors = adapter.tensors

        def __init__(self, scaling: float) -> None:
            self.scaling = scaling

    slots = [step.decoder.bank.acquire(str(n), lambda n=n: Stronger(0.5 * n)) for n in range(10)]
    rows = [
        step.rows(assistants=tuple(AssistantRow(i, 2, 4, slots[n + i], str(n + i)) for i in on))
        for n in range(7)
        for on in ((0, 1, 2), (1, 2), (2, 0))
    ]
    found = [step.recorded(one).clone() for one in rows]
    assert step.graphs.num_recorded == 1
    for one, logits_RW in zip(rows, found, strict=True):
        torch.testing.assert_close(logits_RW, step.eager(one), atol=1e-4, rtol=1e-5)
    assert not torch.allclose(found[0][3:], found[9][3:], atol=1e-2)


def test_a_shape_is_recorded_when_it_comes_back(step: Step) -> None:
    rows = step.rows()
    assert step.graphs.try_run(rows) is None
    assert step.graphs.try_run(rows) is not None
    assert (step.graphs.num_recorded, step.graphs.num_replayed) == (1, 1)


def test_a_loaded_adapter_has_graphs_recorded_anew(step: Step, tiny: Tiny) -> None:
    """Its arrival may have moved the others'."""
    rows, plain = step.rows(), step.rows(on=())
    expected = step.recorded(rows).clone()
    step.recorded(plain)
    version = tiny.version("all-layers")
    step.decoder.bank.acquire("b", lambda: next(iter(version.adapters.values())))
    torch.testing.assert_close(step.recorded(rows), expected)
    step.recorded(plain)
    assert step.graphs.num_recorded == 3


def test_an_adapter_that_is_not_where_a_row_says_is_an_error(step: Step) -> None:
    rows = step.rows()
    step.recorded(rows)
    step.decoder.bank.release("a")
    step.decoder.bank.evict("a")
    with pytest.raises(RuntimeError, match="not in slot"):
        step.graphs.try_run(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"sequences": (SequenceRows(0, 2, [3, 4]), SequenceRows(2, 1, [6]))},
        {"head_rows": torch.tensor([0, 2])},
        {"assistants": (AssistantRow(0, 2, 4, 0, "a", True),)},
        {"lanes": (OwnRows(0, 1, [0], [0], 2, 4, 0, "a"),)},
        {"separate": {"other": None}},
        {
            "sequences": (
                SequenceRows(0, 1, [3, 4]),
                SequenceRows(1, 1, [6]),
                SequenceRows(2, 1, [7, 8, 9], 0, "a"),
            )
        },
        # Six riders for each of three sequences, where one alone wants any.
        {"assistants": tuple(AssistantRow(0, 2, 4, 0, "a") for _ in range(6))},
    ],
    ids=["prompt", "no score", "late", "own keys", "separate model", "target adapter", "unlike riders"],
)
def test_what_no_graph_runs_is_left_to_the_decoder(step: Step, changes: dict[str, object]) -> None:
    rows = step.rows(**changes)
    assert [step.graphs.try_run(rows) for _ in range(3)] == [None] * 3
    assert step.graphs.num_recorded == 0


def test_a_batch_larger_than_the_largest_graph_is_left_to_the_decoder(step: Step) -> None:
    step.graphs.max_rows = 2
    assert [step.graphs.try_run(step.rows()) for _ in range(3)] == [None] * 3


def test_a_step_that_cannot_be_recorded_is_tried_once(engine: Engine, tiny: Tiny) -> None:
    tried = []

    def record(run: Callable[[], torch.Tensor]) -> cuda_graphs.Recording:
        tried.append(run)
        raise RuntimeError("operation not permitted when stream is capturing")

    step = Step(engine, tiny, record=record)
    assert [step.graphs.try_run(step.rows()) for _ in range(5)] == [None] * 5
    assert len(tried) == 1


class _Off(RecordedRun):
    """A recording that does not do what was recorded."""

    def replay(self) -> None:
        super().replay()
        self.result[0, 0] += 100


def test_a_recording_that_gives_something_else_is_not_used(
    engine: Engine, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    step = Step(engine, tiny, record=_Off)
    assert [step.graphs.try_run(step.rows()) for _ in range(4)] == [None] * 4
    assert caplog.text.count("is not used") == 1


class _Stale(RecordedRun):
    """A recording that keeps to the data of its first replay."""

    is_old = False

    def replay(self) -> None:
        if not self.is_old:
            super().replay()
        self.is_old = True


def test_a_recording_must_be_right_on_other_data_too(
    engine: Engine, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    step = Step(engine, tiny, record=_Stale)
    step.recorded(step.rows())
    other = step.rows(token_ids_T=torch.tensor([50, 60, 70]))
    assert [step.graphs.try_run(other) for _ in range(4)] == [None] * 4
    assert caplog.text.count("is not used") == 1


def test_nan_in_one_sequence_says_nothing_of_a_recording(step: Step) -> None:
    """The decoder runs the step, and its sampler ends that request; the next step of that shape is looked at again."""
    kept = [pool[3 * BLOCK_SIZE].clone() for pool in pools(step.cache)]
    for pool in pools(step.cache):
        pool[3 * BLOCK_SIZE] = torch.nan
    assert [step.graphs.try_run(step.rows()) for _ in range(3)] == [None] * 3
    for pool, values in zip(pools(step.cache), kept, strict=True):
        pool[3 * BLOCK_SIZE] = values
    torch.testing.assert_close(step.recorded(step.rows()), step.eager(step.rows()), atol=1e-4, rtol=1e-5)
    assert step.graphs.num_recorded == 1


class GreedySampler(StaticSampler):
    """Stands in for the kernels': of rows without a profile it takes the best token, by operations that can be
    recorded, into tensors that the next run overwrites."""

    num_runs = 0
    is_recordable = True

    def __init__(self, shape: SampleShape, **given: object) -> None:
        super().__init__(shape, **given)
        self.rows_B, self.token_ids_B = torch.zeros(2, shape.num_rows, dtype=torch.long)

    def fill(self, rows: Sequence[SampleRow]) -> None:
        self.count = len(rows)
        self.rows_B[: self.count] = torch.tensor([row.row_b for row in rows])

    def run(self, logits_RV: torch.Tensor) -> None:
        GreedySampler.num_runs += 1
        self.token_ids_B.copy_(logits_RV[:, : self.vocab_size].index_select(0, self.rows_B).argmax(-1))

    def output(self) -> SampleOutput:
        rows = [SampleRow(row_b=row, temperature=0.0) for row in range(self.count)]
        logits_BV = torch.zeros(self.count, self.vocab_size)
        logits_BV[torch.arange(self.count), self.token_ids_B[: self.count]] = 1.0
        out = ops.fused_sample(
            logits_BV, rows, vocab_size=self.vocab_size, protected_ids=torch.tensor([], dtype=torch.long)
        )
        return replace(out, token_ids_B=self.token_ids_B[: self.count])


@pytest.mark.parametrize("record", [RecordedRun, _Off, _Stale])
def test_a_sampler_that_can_be_recorded_is_in_the_graph(
    make_engine: Callable[..., Engine],
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    record: cuda_graphs.Record,
) -> None:
    """And where recordings go wrong, steps that have gone ahead are run anew with the tokens that they were for."""
    requests = [
        (decision, 5 + 4 * number, 30) for number, decision in enumerate(decisions(tiny, None, None, None))
    ]
    expected = generate(make_engine(block_size=BLOCK_SIZE), requests)
    monkeypatch.setattr(sampler, "StaticSampler", GreedySampler)
    monkeypatch.setattr(GreedySampler, "num_runs", 0)
    engine = make_engine(block_size=BLOCK_SIZE, overlap=True)
    graphs = with_graphs(engine, record)
    assert generate(engine, requests) == expected
    assert GreedySampler.num_runs == 2 * graphs.num_recorded, "only while a step is recorded"
    assert (graphs.num_replayed > 20) == (record is RecordedRun)


def test_a_graph_takes_draws_that_ask_for_less(make_engine: Callable[..., Engine], tiny: Tiny) -> None:
    """One request's penalties and log-probabilities are no reason to record the others anew."""
    engine = make_engine(block_size=BLOCK_SIZE)
    graphs = with_graphs(engine)
    rich = SamplingParams(max_tokens=8, ignore_eos=True, seed=0, logprobs=2, presence_penalty=1.0)
    for params in (rich, replace(rich, logprobs=None), replace(rich, presence_penalty=0.0)):
        engine.add("r", [1, 2, 3], params, decisions(tiny, "late-fork")[0])
        while engine.has_work:
            assert all(delta.error is None for delta in engine.step())
    assert graphs.num_recorded == 1
    assert graphs.num_replayed > 15


def test_the_oldest_graph_makes_room(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "LARGEST_NUMBER_OF_GRAPHS", 1)
    rows, plain = step.rows(), step.rows(on=())
    first = step.recorded(rows).clone()
    step.recorded(plain)
    assert torch.equal(step.recorded(rows), first)
    assert step.graphs.num_recorded == 3


def test_batches_are_padded_to_few_sizes() -> None:
    assert [padded_size(count) for count in (1, 2, 3, 5, 8, 9, 17, 25, 64)] == [1, 2, 4, 8, 8, 16, 24, 32, 64]


def test_a_recording_refuses_what_a_device_could_not_replay() -> None:
    """The stand-in itself: values read on the host, and tensors made from it."""
    x = torch.arange(3)
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        RecordedRun(lambda: x * int(x.sum()))
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        RecordedRun(lambda: x + torch.tensor([1, 2, 3]))
    recorded = RecordedRun(lambda: (x * 2).view(3)[1:].float())
    x.fill_(5)
    recorded.replay()
    assert recorded.result.tolist() == [10.0, 10.0]
