"""Variants are timed in turn, each the same number of times."""

from __future__ import annotations

import pytest
import torch

from uld_serve.bench.timing import Quartiles, interleave

CPU = torch.device("cpu")


def test_every_round_begins_with_the_next_variant() -> None:
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    rounds: list[None] = []
    interleave(variants, 4, device=CPU, on_round=lambda: rounds.append(None))
    assert "".join(calls) == "abcbcacababc"
    assert len(rounds) == 4


def test_every_call_is_timed_under_its_own_name() -> None:
    seconds = interleave({"a": lambda: None, "b": lambda: None}, 3, device=CPU, on_round=lambda: None)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert min(seconds["a"] + seconds["b"]) > 0


def test_what_runs_before_a_round_is_not_timed() -> None:
    order: list[str] = []
    interleave(
        {"a": lambda: order.append("a")},
        2,
        device=CPU,
        on_round=lambda: order.append("end"),
        before_round=lambda: order.append("before"),
    )
    assert order == ["before", "a", "end"] * 2


def test_quartiles_are_in_milliseconds() -> None:
    found = Quartiles.of_seconds([0.001, 0.002, 0.003, 0.004, 0.005])
    assert (found.lower, found.median, found.upper) == pytest.approx((2.0, 3.0, 4.0))


def test_one_time_is_its_own_quartiles() -> None:
    found = Quartiles.of_seconds([0.25])
    assert found.lower == found.median == found.upper == 250.0
