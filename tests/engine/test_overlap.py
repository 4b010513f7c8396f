"""A step launched while the one before it is in flight changes nothing that anybody gets: every request is run twice,
with overlap and without, and what came of it is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from kept_profiles import OWN, Kept
from tiny_base import RULES, Tiny

from uld_serve.config import EngineSettings
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Applied, Decision
from uld_serve.engine.request import Delta, SamplingParams
from uld_serve.engine.runner import Runner
from uld_serve.engine.sampler import InFlight, Outcome, Sampler
from uld_serve.engine.step import Steps
from uld_serve.model.head import Scores
from uld_serve.model.row_batch import RowBatch

MakeEngine = Callable[..., Engine]
FREE = SamplingParams(max_tokens=9, temperature=0.9, ignore_eos=True, seed=0)
EOS = 257


@dataclass(frozen=True)
class Ask:
    """`abort_after`: so many tokens have come."""

    prompt: list[int]
    params: SamplingParams
    names: tuple[str, ...] = ()
    abort_after: int | None = None


@dataclass
class Got:
    """All that a client is told."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, tuple[object, ...]]] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    text: str = ""
    receipts: list[str] = field(default_factory=list)
    ends: list[tuple[str, str | None]] = field(default_factory=list)
    num_tokens: tuple[int, int] | None = None

    def take(self, delta: Delta) -> None:
        self.tokens += delta.token_ids
        self.logprobs += [(entry.logprob, entry.top) for entry in delta.logprobs or ()]
        self.prompt_logprobs += [None if x is None else x.logprob for x in delta.prompt_logprobs or ()]
        self.text += delta.text
        self.receipts += [] if delta.receipt is None else [delta.receipt.header]
        if delta.finish_reason is not None:
            self.ends.append((delta.finish_reason, delta.error and type(delta.error).__name__))
        if delta.usage is not None:
            self.num_tokens = (delta.usage.prompt_tokens, delta.usage.completion_tokens)


def check_same(found: dict[str, Got], expected: dict[str, Got]) -> None:
    """Log-probabilities up to rounding: products of other numbers of rows sum in other orders."""
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        other = found[name]
        for ours, theirs in ((other.logprobs, one.logprobs), (other.prompt_logprobs, one.prompt_logprobs)):
            assert flat(ours) == pytest.approx(flat(theirs), abs=1e-4), name
        assert replace(other, logprobs=[], prompt_logprobs=[]) == replace(
            one, logprobs=[], prompt_logprobs=[]
        )


def flat(tree: object) -> list[float]:
    if isinstance(tree, (list, tuple)):
        return [value for part in tree for value in flat(part)]
    return [] if tree is None or isinstance(tree, str) else [float(tree)]


def play(engine: Engine, asks: dict[str, Ask], versions: Callable[[str], object]) -> dict[str, Got]:
    """Two requests arrive before every step; pools and sequences add up after it."""
    got, arrivals = {name: Got() for name in asks}, list(asks.items())
    while arrivals or engine.has_work:
        for name, ask in arrivals[:2]:
            applied = [Applied(versions(one)) for one in ask.names]
            decision = Decision.forgetting(applied) if applied else Decision.base()
            engine.add(name, ask.prompt, ask.params, decision)
        del arrivals[:2]
        for delta in engine.step():
            got[delta.request_id].take(delta)
        engine.check_integrity()
        for name in list(engine.sequences):
            if len(got[name].tokens) == asks[name].abort_after:
                got[name].take(engine.abort(name))
                engine.check_integrity()
    assert all(len(one.ends) == 1 for one in got.values())
    assert all(pool.num_held == 0 for pool in engine.pools.by_name.values())
    return got


def prompt(number: int, length: int) -> list[int]:
    return [(31 * number + 7 * i) % 250 for i in range(length)]


@pytest.fixture
def versions(tiny: Tiny, kept: Kept) -> Callable[[str], object]:
    return lambda name: (kept if name in kept.profiles else tiny).version(name)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each step had that went ahead."""
    sizes: list[int] = []
    launch_ahead = Steps.launch_ahead

    def spy(self: Steps, scheduled: list[object], before: object) -> object:
        sizes.append(len(scheduled))
        return launch_ahead(self, scheduled, before)

    monkeypatch.setattr(Steps, "launch_ahead", spy)
    return sizes


EVERY_RULE = {
    str(number): Ask(
        prompt(number, 4 + 5 * number % 37), replace(FREE, seed=number, logprobs=number % 3), names
    )
    for number, names in enumerate(
        [(), *((name,) for name in RULES), *((name,) for name in OWN), ("late-fork", "pair"), ("own-late",)]
    )
}
EVERY_WAY_TO_END = {
    "one token": Ask(prompt(1, 20), replace(FREE, max_tokens=1)),
    "two tokens": Ask(prompt(2, 20), replace(FREE, max_tokens=2), ("late-fork",)),
    "eos": Ask(prompt(3, 5), replace(FREE, ignore_eos=False, logit_bias={EOS: 5.5}, seed=3)),
    "eos at once": Ask(prompt(3, 5), replace(FREE, ignore_eos=False, logit_bias={EOS: 100.0})),
    "eos not yet": Ask(
        prompt(4, 9), replace(FREE, ignore_eos=False, logit_bias={EOS: 100.0}, min_tokens=4), ("pair",)
    ),
    "stop string": Ask(prompt(5, 30), replace(FREE, stop=tuple("aeiou"), seed=1, max_tokens=40)),
    "stop string kept": Ask(
        prompt(6, 30),
        replace(FREE, stop=("b", "c"), include_stop_str=True, seed=2, max_tokens=40),
        ("late-fork",),
    ),
    "stop token": Ask(
        prompt(7, 3), replace(FREE, stop_token_ids=tuple(range(0, 250, 8)), seed=5, max_tokens=40)
    ),
    "penalties": Ask(
        prompt(8, 12),
        replace(FREE, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3, seed=6),
    ),
    "scored": Ask(prompt(9, 30), replace(FREE, max_tokens=0, prompt_logprobs=2), ("truncated",)),
    "one token scored": Ask(prompt(9, 1), replace(FREE, max_tokens=0, prompt_logprobs=0), ("late-fork",)),
    "scored and drawn": Ask(
        prompt(10, 30), replace(FREE, prompt_logprobs=1, logprobs=2, seed=7), ("late-fork",)
    ),
    "longest": Ask(prompt(11, 60), replace(FREE, max_tokens=200, seed=8)),
    "gone at once": Ask(prompt(12, 30), FREE, ("late-fork",), abort_after=0),
    "gone later": Ask(prompt(13, 8), replace(FREE, max_tokens=30, seed=9), ("pair",), abort_after=4),
    "same beginning": Ask([*prompt(13, 8), 1, 2, 3], replace(FREE, seed=10), ("ranked",)),
}
SETTINGS = {
    "roomy": {},
    "chunked": {"max_step_rows": 13},
    "few seats": {"max_num_seqs": 3},
    "little cache": {
        "block_size": 4,
        "kv_cache_bytes": 88 * 512,
        "own_kv_bytes": 88 * 512,
        "max_model_len": 80,
    },
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("asks", [EVERY_RULE, EVERY_WAY_TO_END], ids=["every rule", "every way to end"])
def test_nobody_can_tell(
    make_kept_engine: MakeEngine,
    versions: Callable[[str], object],
    ahead: list[int],
    asks: dict[str, Ask],
    settings: str,
) -> None:
    chosen = {"max_model_len": 80, **SETTINGS[settings]}
    engines = [make_kept_engine(overlap=overlap, **chosen) for overlap in (False, True)]
    expected = play(engines[0], asks, versions)
    assert ahead == []
    found = play(engines[1], asks, versions)
    check_same(found, expected)
    assert sum(ahead) > 40
    if settings == "little cache":
        assert all(engine.scheduler.num_preemptions > 0 for engine in engines)


def test_the_ways_to_end_are_the_ones_meant(
    make_kept_engine: MakeEngine, versions: Callable[[str], object]
) -> None:
    """Else the test above would compare less than it says."""
    found = play(make_kept_engine(max_model_len=80), EVERY_WAY_TO_END, versions)
    reasons = {name: one.ends[0][0] for name, one in found.items()}
    assert {name for name, reason in reasons.items() if reason == "stop"} == {
        "eos", "eos at once", "eos not yet", "stop string", "stop string kept", "stop token",
    }  # fmt: skip
    assert all(
        len(found[name].tokens) > 1 for name in ("eos", "stop string", "stop string kept", "stop token")
    )
    assert len(found["longest"].tokens) == 20


def test_a_step_is_launched_before_the_one_in_flight_is_looked_at(
    make_engine: MakeEngine, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for name in ("launch", "collect"):
        method = getattr(Sampler, name)
        monkeypatch.setattr(
            Sampler,
            name,
            lambda self, *a, name=name, method=method: (events.append(name), method(self, *a))[1],
        )
    engine = make_engine(overlap=True)
    engine.add("r", prompt(0, 5), replace(FREE, max_tokens=4), Decision.of_version(tiny.version("late-fork")))
    while engine.has_work:
        engine.step()
    assert events == ["launch", "launch", "collect", "launch", "collect", "launch", "collect", "collect"]


def test_no_row_is_run_for_a_token_that_cannot_be(make_engine: MakeEngine, ahead: list[int]) -> None:
    """Lengths are known beforehand; only a stop is not."""
    engine = make_engine(overlap=True, max_model_len=16)
    engine.add("by request", prompt(1, 5), replace(FREE, max_tokens=3), Decision.base())
    engine.add("by context", prompt(2, 10), replace(FREE, max_tokens=30), Decision.base())
    while engine.has_work:
        engine.step()
    assert ahead == [2, 2, 1, 1, 1]


def test_a_draw_that_hangs_on_the_last_token_waits_for_it(make_engine: MakeEngine, ahead: list[int]) -> None:
    engine = make_engine(overlap=True)
    engine.add("free", prompt(1, 5), replace(FREE, max_tokens=8), Decision.base())
    engine.step()
    assert len(ahead) == 1
    engine.add("bound", prompt(2, 5), replace(FREE, presence_penalty=1.0), Decision.base())
    engine.step()
    joined = len(ahead)
    while engine.has_work:
        engine.step()
    assert ahead[joined:] == []


def test_what_runs_for_a_request_that_has_ended_reaches_nobody(make_engine: MakeEngine) -> None:
    """Nobody has looked whether the row beside its last token went well."""
    engine = make_engine(overlap=True, block_size=4, max_num_seqs=1, kv_cache_bytes=24 * 512)
    assert engine.config.num_blocks == 6
    ends = replace(FREE, ignore_eos=False, logit_bias={EOS: 100.0})
    engine.add("ends", prompt(1, 9), ends, Decision.base())
    engine.step()
    assert not engine.has_work
    layers = (*engine.runner.cache.keys_SHD, *engine.runner.cache.values_SHD)
    # Offset 1 of the last block is position 9, that of the end token; what the cache shares was looked at.
    [last] = [b for b in range(6) if layers[0][4 * b + 1].any() and b not in engine.scheduler.pool._idle]
    for layer in layers:
        layer[4 * last + 1] = torch.nan
    for number in range(8):
        engine.add(str(number), prompt(number + 2, 1 + number), replace(FREE, max_tokens=3), Decision.base())
    while engine.has_work:
        assert all(delta.error is None for delta in engine.step())
        engine.check_integrity()


class Faulty:
    """A runner that goes wrong for a row at a position that one request alone gets to, or whenever it is told to."""

    def __init__(self, runner: Runner, how: str, position: int = 70) -> None:
        self.runner, self.how, self.position, self.calls = runner, how, position, 0
        self.clear, self.clear_beside, self.cache = runner.clear, runner.clear_beside, runner.cache

    def run(self, rows: RowBatch) -> Scores:
        self.calls += 1
        if self.how == "raises in large steps" and len(rows.sequences) > 2 and self.calls % 2:
            raise RuntimeError("a fault of nobody's")
        scores = self.runner.run(rows)
        at = (rows.positions_T[rows.head_rows] == self.position).nonzero().flatten()
        if len(at) and self.how == "raises":
            raise RuntimeError("a fault of one request")
        if len(at) and self.how == "nan":
            scores.logits_RW[at] = torch.nan
        return scores


LONG = {
    **{
        str(n): Ask(prompt(n, 6 + 3 * n), replace(FREE, max_tokens=20, seed=n), ("late-fork",))
        for n in range(4)
    },
    "victim": Ask(prompt(9, 66), replace(FREE, max_tokens=20, seed=9), ("pair",)),
    "ends": Ask(prompt(5, 9), replace(FREE, ignore_eos=False, logit_bias={EOS: 5.5}, seed=3, max_tokens=30)),
}


@pytest.mark.parametrize("how", ["raises", "nan", "raises in large steps"])
def test_a_fault_in_the_runner_ends_whom_it_ended_before(
    make_kept_engine: MakeEngine, versions: Callable[[str], object], how: str
) -> None:
    found = []
    for overlap in (False, True):
        engine = make_kept_engine(overlap=overlap, max_model_len=100, block_size=4)
        engine.runner = Faulty(engine.runner, how)
        found.append(play(engine, LONG, versions))
        engine.runner = engine.runner.runner
        later = {"again": replace(LONG["victim"], params=replace(FREE, seed=4))}
        found[-1] |= play(engine, later, versions)
    check_same(found[1], found[0])
    ended = {name for name, one in found[1].items() if one.ends[0][0] == "error"}
    assert ended == (set() if how == "raises in large steps" else {"victim"})
    assert len(found[1]["victim"].tokens) == (20 if not ended else 70 - 66 + 1)


def _faulty_collect(when: Callable[[InFlight], bool]) -> Callable[[Sampler, InFlight], list[Outcome]]:
    collect = Sampler.collect

    def faulty(self: Sampler, in_flight: InFlight) -> list[Outcome]:
        if when(in_flight):
            raise RuntimeError("a fault of the sampler")
        return collect(self, in_flight)

    return faulty


@pytest.mark.parametrize("how", ["of one request", "that goes away"])
def test_a_fault_in_the_sampler_ends_whom_it_ended_before(
    make_kept_engine: MakeEngine,
    versions: Callable[[str], object],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """It shows when the next step is in flight already, which is then forgotten."""
    seen: Iterator[int] = iter(())

    def is_faulty(in_flight: InFlight) -> bool:
        if how == "that goes away":
            return len(in_flight.wants) > 2 and next(seen) % 2 == 0
        return any(w.sequence.request_id == "victim" and w.position == 70 for w in in_flight.wants)

    monkeypatch.setattr(Sampler, "collect", _faulty_collect(is_faulty))
    found = []
    for overlap in (False, True):
        seen = iter(range(1000))
        engine = make_kept_engine(overlap=overlap, max_model_len=100, block_size=4)
        found.append(play(engine, LONG, versions))
    check_same(found[1], found[0])
    ended = {name for name, one in found[1].items() if one.ends[0][0] == "error"}
    assert ended == ({"victim"} if how == "of one request" else set())


def test_who_is_left_alone_is_not_blamed_for_one_who_has_ended(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step in flight goes wrong for a request that is aborted before anybody has looked."""

    def is_faulty(in_flight: InFlight) -> bool:
        return any(w.sequence.request_id == "leaves" and w.position >= 7 for w in in_flight.wants)

    monkeypatch.setattr(Sampler, "collect", _faulty_collect(is_faulty))
    found = []
    for overlap in (False, True):
        engine = make_engine(overlap=overlap)
        asks = {
            "stays": Ask(prompt(1, 6), FREE),
            "leaves": Ask(prompt(2, 6), FREE, abort_after=1),
        }
        found.append(play(engine, asks, lambda name: name))
    check_same(found[1], found[0])
    assert found[1]["stays"].ends == [("length", None)]


def test_by_default_steps_overlap_and_are_recorded_where_the_device_runs_beside_the_host() -> None:
    sizes = {"max_positions": 64, "bytes_per_token": 16}
    on_cpu, on_gpu = (EngineSettings().resolve(**sizes, free_device_bytes=free) for free in (None, 2**30))
    assert (on_cpu.overlap, on_gpu.overlap) == (False, True)
    assert (on_cpu.cuda_graphs, on_gpu.cuda_graphs) == (False, True)
    assert not EngineSettings(cuda_graphs=False).resolve(**sizes, free_device_bytes=2**30).cuda_graphs
    assert EngineSettings(overlap=True).resolve(**sizes, free_device_bytes=None).overlap
    assert not EngineSettings(overlap=False).resolve(**sizes, free_device_bytes=2**30).overlap
