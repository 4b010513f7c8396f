"""Times variants in turn, A B C then B C A, so that whatever else the machine does falls on all of them alike.
Called by decode and prefill. Knows nothing of what it times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True, slots=True)
class Quartiles:
    """Of a series of times, in milliseconds."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of_seconds(cls, seconds: list[float]) -> Quartiles:
        if len(seconds) == 1:
            return cls(*(seconds[0] * 1e3,) * 3)
        return cls(*(value * 1e3 for value in statistics.quantiles(seconds, n=4, method="inclusive")))


def interleave(
    variants: Mapping[Name, Callable[[], object]],
    rounds: int,
    *,
    device: torch.device,
    on_round: Callable[[], None],
    before_round: Callable[[], None] | None = None,
) -> dict[Name, list[float]]:
    """Seconds of every call, by variant: `rounds` each, every round beginning with the next variant.

    `before_round` runs untimed before each round.
    """
    names = list(variants)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        if before_round is not None:
            before_round()
        start = number % len(names)
        for name in names[start:] + names[:start]:
            synchronize(device)
            began = time.perf_counter()
            variants[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - began)
        on_round()
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
