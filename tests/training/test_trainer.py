"""Fitting: the order of the lessons, accumulation, seeds, exact resume, and a loss that is not finite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_base import Tiny
from tiny_run import example, fresh_assistant, observed, settings_of, unheard

from uld_serve.errors import DataError
from uld_serve.training.assistant import Assistant, adapter_state, load_adapter
from uld_serve.training.examples import Kind
from uld_serve.training.lessons import Lessons
from uld_serve.training.methods.method import Parts, Tokens
from uld_serve.training.settings import Settings
from uld_serve.training.states import Observed
from uld_serve.training.trainer import fit

QUICK = settings_of(
    "margin", steps=24, save_steps=6, forget_batch=2, retain_batch=2, detours=0, detour_batch=0, num_top=8
)
Pools = dict[Kind, list[Observed]]


def pools_of(assistant: Assistant, settings: Settings = QUICK, *, size: int = 5) -> Pools:
    return {
        kind: observed(assistant, [example(kind, 4 + n, 2 + n % 3, seed=n) for n in range(size)], settings)
        for kind in (Kind.FORGET, Kind.RETAIN)
    }


def trained(
    tiny: Tiny, folder: Path, settings: Settings = QUICK, *, size: int = 5
) -> dict[str, torch.Tensor]:
    assistant = fresh_assistant(tiny, settings)
    fit(assistant, pools_of(assistant, settings, size=size), settings, folder=folder, report=unheard)
    return adapter_state(assistant)


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter of an uninterrupted run of QUICK."""
    return trained(tiny, tmp_path_factory.mktemp("whole"))


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(
    tiny: Tiny, tmp_path: Path, whole: dict[str, torch.Tensor]
) -> None:
    torch.manual_seed(99)  # what ran before does not matter
    assert is_equal(trained(tiny, tmp_path / "same"), whole)
    other = trained(tiny, tmp_path / "other", replace(QUICK, seed=1))
    assert not any(torch.equal(other[name], whole[name]) for name in whole)


class Pulled(Exception):
    """The plug."""


@pytest.mark.parametrize("at", [10, 20])
def test_an_interrupted_run_that_resumes_ends_with_the_same_bits(
    tiny: Tiny, tmp_path: Path, whole: dict[str, torch.Tensor], at: int
) -> None:
    def pull(step: int, _parts: Mapping[str, float]) -> None:
        if step == at:
            raise Pulled

    first = fresh_assistant(tiny, QUICK)
    with pytest.raises(Pulled):
        fit(first, pools_of(first), QUICK, folder=tmp_path, report=pull)
    assert not is_equal(adapter_state(first), whole)
    torch.manual_seed(99)
    second = fresh_assistant(tiny, QUICK)
    steps: list[int] = []
    log = fit(
        second,
        pools_of(second),
        QUICK,
        folder=tmp_path,
        resume=True,
        report=lambda step, _: steps.append(step),
    )
    assert is_equal(adapter_state(second), whole)
    assert steps == list(
        range(at, 21, 10)
    )  # the checkpoint before step 10 is of step 6, before 20 of step 18
    assert [entry["step"] for entry in log if "loss" in entry] == [10, 20]


def test_a_checkpoint_that_was_cut_short_is_passed_over(
    tiny: Tiny, tmp_path: Path, whole: dict[str, torch.Tensor]
) -> None:
    trained(tiny, tmp_path)
    (tmp_path / "checkpoint-24" / "trainer_state.json").write_text('{"best_')
    assistant = fresh_assistant(tiny, QUICK)
    fit(assistant, pools_of(assistant), QUICK, folder=tmp_path, resume=True, report=unheard)
    assert is_equal(adapter_state(assistant), whole)


def test_checkpoints_hold_the_adapter_and_not_the_base(tiny: Tiny, tmp_path: Path) -> None:
    trained(tiny, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-18", "checkpoint-24"}
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint-24").glob("*.safetensors"))
    base = sum(file.stat().st_size for file in tiny.folder.glob("*.safetensors"))
    assert 0 < size < base


def test_a_checkpoint_of_another_adapter_is_refused(tiny: Tiny) -> None:
    state = adapter_state(fresh_assistant(tiny, QUICK))
    for changes in ({"rank": 4}, {"fork": 1}):
        with pytest.raises(DataError, match="another run"):
            load_adapter(fresh_assistant(tiny, settings_of("margin", **changes)), state)


def test_two_accumulated_batches_are_one_step_on_their_mean(tiny: Tiny, tmp_path: Path) -> None:
    """With one example a kind every batch is the same, so accumulating it changes nothing."""
    once = settings_of("margin", steps=4, warmup_steps=0, detours=0, detour_batch=0)
    twice = settings_of("margin", steps=4, warmup_steps=0, detours=0, detour_batch=0, grad_accum=2)
    single = trained(tiny, tmp_path / "once", once, size=1)
    double = trained(tiny, tmp_path / "twice", twice, size=1)
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, rtol=0, atol=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run_with_a_reason(tiny: Tiny, tmp_path: Path) -> None:
    wild = settings_of("margin", lr=1e38, warmup_steps=0, detours=0, detour_batch=0)
    with pytest.raises(DataError, match=r"the loss is (nan|inf) at step \d+; lower --lr"):
        trained(tiny, tmp_path, wild)


@pytest.mark.parametrize("kind", [Kind.FORGET, Kind.RETAIN])
def test_a_kind_without_examples_is_refused_by_name(tiny: Tiny, tmp_path: Path, kind: Kind) -> None:
    assistant = fresh_assistant(tiny, QUICK)
    pools = {**pools_of(assistant), kind: []}
    with pytest.raises(DataError, match=f"no usable {kind.name.lower()} example"):
        fit(assistant, pools, QUICK, folder=tmp_path, report=unheard)


def test_the_log_tells_the_mean_of_each_part(tiny: Tiny, tmp_path: Path) -> None:
    assistant = fresh_assistant(tiny, QUICK)
    heard: list[tuple[int, Mapping[str, float]]] = []
    fit(
        assistant,
        pools_of(assistant),
        QUICK,
        folder=tmp_path,
        report=lambda step, parts: heard.append((step, parts)),
    )
    assert [step for step, _ in heard] == [10, 20]
    for _, parts in heard:
        assert parts["loss"] == pytest.approx(parts["forget"] + parts["retain"], abs=2e-3)
    assert heard[1][1]["loss"] < heard[0][1]["loss"]


def lessons(tiny: Tiny, **changes: object) -> tuple[Lessons, Pools]:
    settings = settings_of("margin", forget_batch=2, retain_batch=3, detours=0, detour_batch=2, **changes)
    assistant = fresh_assistant(tiny, settings)
    pools = pools_of(assistant, settings, size=4)
    pools[Kind.DETOUR] = observed(assistant, [example(Kind.DETOUR, 3, 2)], settings)
    return Lessons(pools, settings), pools


def test_every_step_has_its_share_of_each_kind_and_every_round_all_of_them(tiny: Tiny) -> None:
    found, pools = lessons(tiny, steps=4, grad_accum=2)
    assert len(found) == 4 * 2 * (2 + 3 + 2)
    seen = [found[index].example for index in range(len(found))]
    for start in range(0, len(seen), found.batch_size):
        batch = Counter(one.kind for one in seen[start : start + found.batch_size])
        assert batch == {Kind.FORGET: 2, Kind.RETAIN: 3, Kind.DETOUR: 2}
    for kind in (Kind.FORGET, Kind.RETAIN):
        taught = [one.prompt_ids for one in seen if one.kind is kind]
        whole_rounds = [taught[start : start + 4] for start in range(0, len(taught), 4)]
        assert all(len(set(one)) == 4 for one in whole_rounds)
        assert len({tuple(one) for one in whole_rounds}) > 1  # in another order each time
    assert all(any(one is lesson.example for pool in pools.values() for lesson in pool) for one in seen)


def test_an_items_place_depends_on_the_seed_and_its_number_alone(tiny: Tiny) -> None:
    first, _ = lessons(tiny)
    second, _ = lessons(tiny)
    other, _ = lessons(tiny, seed=1)
    numbers = range(60)
    backwards = {number: second[number].example for number in reversed(numbers)}
    assert [first[number].example for number in numbers] == [backwards[number] for number in numbers]
    assert [first[number].example for number in numbers] != [other[number].example for number in numbers]


def test_a_kind_without_examples_leaves_its_share_empty(tiny: Tiny) -> None:
    settings = settings_of("margin", forget_batch=1, retain_batch=1, detour_batch=5)
    found = Lessons(pools_of(fresh_assistant(tiny, settings), settings), settings)
    assert found.batch_size == 2


def test_an_objective_is_told_how_much_of_the_run_is_over(tiny: Tiny, tmp_path: Path) -> None:
    settings = settings_of("uld", steps=4, save_steps=2)
    heard: list[float] = []

    def fitted(folder: Path, *, resume: bool = False, until: int = 99) -> None:
        assistant = fresh_assistant(tiny, settings)
        objective = assistant.lesson.objective

        def listening(tokens: Tokens, told: Settings) -> Parts:
            if len(heard) == until:
                raise Pulled
            heard.append(tokens.progress)
            return objective(tokens, told)

        assistant.lesson = replace(assistant.lesson, objective=listening)
        fit(assistant, pools_of(assistant, settings), settings, folder=folder, resume=resume, report=unheard)

    fitted(tmp_path / "whole")
    assert heard == [0.0, 0.25, 0.5, 0.75]
    heard.clear()
    with pytest.raises(Pulled):
        fitted(tmp_path / "cut", until=3)
    fitted(tmp_path / "cut", resume=True)
    assert heard == [0.0, 0.25, 0.5, 0.5, 0.75]
