"""A run that no longer gets better ends, with the best adapter that it had, also when it was interrupted meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from tiny_base import Tiny
from tiny_run import example, fresh_assistant, observed, run_training, settings_of, unheard, write_sources

from uld_serve.errors import DataError
from uld_serve.training.assistant import Assistant, adapter_state
from uld_serve.training.early_stop import EarlyStop
from uld_serve.training.examples import Kind
from uld_serve.training.sources import Sources
from uld_serve.training.states import Observed
from uld_serve.training.trainer import fit

SETTINGS = settings_of("rkld", steps=30, save_steps=5, forget_batch=2, retain_batch=2, num_top=8)


def pools_of(assistant: Assistant) -> dict[Kind, list[Observed]]:
    return {
        kind: observed(assistant, [example(kind, 4 + n, 2, seed=n) for n in range(3)], SETTINGS)
        for kind in (Kind.FORGET, Kind.RETAIN)
    }


def run(
    assistant: Assistant, scores: Iterator[float], folder: Path, *, resume: bool = False, until: int = 99
) -> tuple[int, list[dict[str, torch.Tensor]]]:
    """How many checkpoints were looked at, and the adapter at each."""
    looked: list[dict[str, torch.Tensor]] = []

    def score() -> float:
        if len(looked) == until:
            raise InterruptedError
        looked.append(adapter_state(assistant))
        return next(scores)

    folder.mkdir(exist_ok=True)
    early_stop = EarlyStop(score, 2, folder)
    fit(
        assistant, pools_of(assistant), SETTINGS, folder=folder, resume=resume, report=unheard, early_stop=early_stop
    )  # fmt: skip
    return len(looked), looked


def is_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("scores", "num_looks", "best"),
    [
        ([1.0, 2.0, 1.5, 1.9], 4, 1),  # two in a row are not better
        ([1.0, 0.5, 2.0, 0.5, 3.0, 2.0], 6, 4),  # never two in a row: it runs to its end
        ([1.0, 1.0, 1.0], 3, 0),  # as good is not better
    ],
)
def test_the_best_adapter_is_kept(
    tiny: Tiny, tmp_path: Path, scores: list[float], num_looks: int, best: int
) -> None:
    assistant = fresh_assistant(tiny, SETTINGS)
    found, adapters = run(assistant, iter(scores), tmp_path / "run")
    assert found == num_looks
    assert is_equal(adapter_state(assistant), adapters[best])
    assert not is_equal(adapters[best], adapters[best - 1])


def test_an_interrupted_run_remembers_what_was_best(tiny: Tiny, tmp_path: Path) -> None:
    scores = [1.0, 3.0, 2.0, 2.5]
    whole = fresh_assistant(tiny, SETTINGS)
    run(whole, iter(scores), tmp_path / "whole")
    first = fresh_assistant(tiny, SETTINGS)
    with pytest.raises(InterruptedError):
        run(first, iter(scores), tmp_path / "cut", until=2)
    second = fresh_assistant(tiny, SETTINGS)
    found, _ = run(second, iter(scores[2:]), tmp_path / "cut", resume=True)
    assert found == 2
    assert is_equal(adapter_state(second), adapter_state(whole))


def test_a_run_that_ended_early_and_was_cut_off_afterwards_does_not_go_on(tiny: Tiny, tmp_path: Path) -> None:
    ended = fresh_assistant(tiny, SETTINGS)
    run(ended, iter([1.0, 3.0, 2.0, 2.5]), tmp_path / "run")
    resumed = fresh_assistant(tiny, SETTINGS)
    found, _ = run(resumed, iter([9.0]), tmp_path / "run", resume=True)
    assert found == 0
    assert is_equal(adapter_state(resumed), adapter_state(ended))


def test_patience_without_held_out_prompts_is_refused_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    sources = write_sources(tmp_path)
    without = Sources(forget=sources.forget, retain=sources.retain)
    with pytest.raises(DataError, match="--patience needs held-out prompts"):
        run_training(tiny, without, settings_of("margin", patience=1), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"forget.jsonl", "retain.jsonl"}


def test_a_run_ends_early_on_its_held_out_prompts(tiny: Tiny, tmp_path: Path) -> None:
    """At a learning rate of nearly nothing no checkpoint is better than the first, but by a hair."""
    settings = settings_of("margin", patience=1, steps=40, save_steps=5, lr=1e-12, detours=0, detour_batch=0)
    record = run_training(tiny, write_sources(tmp_path), settings, tmp_path / "out").record
    log = record["log"]["adapter"]  # type: ignore[index]
    assert log[-1]["step"] < 40
