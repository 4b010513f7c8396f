"""One of sixteen requests in a batch goes wrong, at any step and in any way: it ends with an error, and the fifteen
others get the tokens and the log-probabilities, bit by bit, that they get without it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from scale import scaled
from tiny_base import RULES, Tiny

from uld_serve.engine.batch import Batch
from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Decision
from uld_serve.engine.request import Delta, SamplingParams
from uld_serve.engine.runner import Runner
from uld_serve.engine.sequence import Sequence
from uld_serve.model.head import Scores

BATCH = 16
NUM_TRIALS = scaled(fast=15, gate=200, aim=5000)
NAMES = [None, *RULES]
Bits = list[tuple[int, float]]


def add_all(engine: Engine, tiny: Tiny) -> None:
    for number in range(BATCH):
        name = NAMES[number % len(NAMES)]
        decision = Decision.base() if name is None else Decision.of_version(tiny.version(name))
        params = SamplingParams(
            max_tokens=8, temperature=float(number % 2), seed=number, logprobs=0, ignore_eos=True
        )
        engine.add(f"r{number}", [number, *range(3 + number)], params, decision)


def run_all(engine: Engine, before_step: Callable[[int], None]) -> tuple[dict[str, Bits], dict[str, Delta]]:
    bits: dict[str, Bits] = {f"r{number}": [] for number in range(BATCH)}
    last, step = {}, 0
    while engine.has_work:
        before_step(step)
        for delta in engine.step():
            last[delta.request_id] = delta
            bits[delta.request_id] += [(one.token_id, one.logprob) for one in delta.logprobs or ()]
        engine.check_integrity()
        step += 1
    return bits, last


@pytest.fixture(scope="module")
def alone(tiny: Tiny, make_engine: Callable[..., Engine]) -> dict[str, Bits]:
    engine = make_engine()
    add_all(engine, tiny)
    bits, last = run_all(engine, lambda _: None)
    assert {delta.finish_reason for delta in last.values()} == {"length"}
    return bits


def nan_in_cache(engine: Engine, victim: Sequence) -> None:
    size = engine.config.block_size
    for pool in (*engine.runner.cache.keys_SHD, *engine.runner.cache.values_SHD):
        for block_id in victim.block_ids:
            pool[block_id * size : (block_id + 1) * size] = torch.nan


def no_detokenizer(engine: Engine, victim: Sequence) -> None:
    victim.detokenizer._text = None


def lost_adapter(engine: Engine, victim: Sequence) -> None:
    """As if the slot of its adapter had been given to somebody else."""
    if not victim.plan.streams:
        nan_in_cache(engine, victim)
    seats = [replace(one, seat=replace(one.seat, slot=99)) for one in victim.plan.streams]
    victim.plan = replace(victim.plan, streams=tuple(seats))


class Culprit:
    """Makes the runner fail, or give NaN, whenever the victim is in the batch."""

    def __init__(self, *, gives_nan: bool) -> None:
        self.victim: Sequence | None = None
        self.gives_nan = gives_nan

    @contextmanager
    def in_place(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        make, run = Batch.of, Runner.run
        wants: list[int] = []

        def of(scheduled: list[object], **sizes: int) -> Batch:
            batch = make(scheduled, **sizes)
            wants[:] = [want.row for want in batch.wants if want.sequence is self.victim]
            return batch

        def with_culprit(runner: Runner, rows: object) -> Scores:
            scores = run(runner, rows)
            if wants and not self.gives_nan:
                raise RuntimeError("the victim is in this batch")
            for row in wants:
                scores.logits_RW[row] = torch.nan
            return scores

        with monkeypatch.context() as patch:
            patch.setattr(Batch, "of", staticmethod(of))
            patch.setattr(Runner, "run", with_culprit)
            yield


@pytest.mark.row("poisoned request in a batch of 16")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "ahead"])
def test_the_fifteen_others_get_the_same_bits(
    tiny: Tiny,
    make_engine: Callable[..., Engine],
    alone: dict[str, Bits],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
    overlap: bool,
) -> None:
    engine, rng = make_engine(overlap=overlap), random.Random(5)
    for trial in range(NUM_TRIALS):
        number, at_step, way = rng.randrange(BATCH), rng.randrange(1, 5), trial % 5
        culprit = Culprit(gives_nan=way == 3)
        add_all(engine, tiny)
        name = f"r{number}"

        def strike(step: int, name=name, at_step=at_step, way=way, culprit=culprit) -> None:
            victim = engine.sequences.get(name)
            if step != at_step or victim is None:
                return
            if way < 3:
                (nan_in_cache, no_detokenizer, lost_adapter)[way](engine, victim)
            else:
                culprit.victim = victim

        with culprit.in_place(monkeypatch):
            bits, last = run_all(engine, strike)
        assert last[name].finish_reason == "error", (trial, name, way, last[name])
        wrong = [other for other in bits if other != name and bits[other] != alone[other]]
        assert not wrong, (trial, way, at_step, name, wrong)
        assert bits[name] == alone[name][: len(bits[name])], "and nothing wrong was said by the victim before"
    record_property("count", NUM_TRIALS)
