"""Times of one mode at one batch size and context, their ratios, and how they look in a table. Used by decode and
prefill. Knows nothing of how times were taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from uld_serve.bench.report import Json
from uld_serve.bench.timing import Quartiles
from uld_serve.bench.variant import Mode

COLUMNS = ("mode", "batch", "context", "ms", "quartiles", "tokens/s", "x plain", "x floor")

Ratios = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Result:
    """`tokens` are what one timed call makes or takes in; `floor_s` is what reading memory alone would take."""

    batch: int
    mode: Mode
    context: int
    times: Quartiles
    tokens: int
    floor_s: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.times.median * 1e3

    @property
    def times_floor(self) -> float | None:
        return None if self.floor_s is None else self.times.median / self.floor_s / 1e3

    def record(self) -> dict[str, Json]:
        record: dict[str, Json] = {
            "batch": self.batch,
            "mode": self.mode,
            "context": self.context,
            "ms_median": round(self.times.median, 4),
            "ms_quartiles": [round(self.times.lower, 4), round(self.times.upper, 4)],
            "tokens_per_s": round(self.tokens_per_s, 2),
        }
        if self.floor_s is not None:
            record["floor_ms"] = round(self.floor_s * 1e3, 4)
        return record


def ratios(results: Iterable[Result], *, key: Callable[[Result], int]) -> Ratios:
    """Median over plain's median by `key`; many over unlearned: what different profiles cost over one; and mixed over
    crowded: what a neighbour's assistant costs over one more neighbour."""
    groups: dict[int, dict[Mode, float]] = {}
    for result in results:
        groups.setdefault(key(result), {})[result.mode] = result.times.median
    return {str(number): _pairs(medians) for number, medians in groups.items()}


def _pairs(medians: dict[Mode, float]) -> dict[str, float]:
    pairs: list[tuple[Mode, Mode]] = [(mode, "plain") for mode in medians if mode != "plain"]
    pairs += [("many", "unlearned"), ("mixed", "crowded")]
    return {f"{a}/{b}": round(medians[a] / medians[b], 4) for a, b in pairs if a in medians and b in medians}


def throughput_of_many(results: Sequence[Result]) -> dict[str, float]:
    """By batch size: tokens a second with many profiles over tokens a second with one. 1 is no loss."""
    speeds = {(result.batch, result.mode): result.tokens_per_s for result in results}
    return {
        str(batch): round(speed / speeds[batch, "unlearned"], 4)
        for (batch, mode), speed in speeds.items()
        if mode == "many" and (batch, "unlearned") in speeds
    }


def table_rows(results: Sequence[Result], found: Ratios, *, key: Callable[[Result], int]) -> list[list[str]]:
    return [
        [
            result.mode,
            str(result.batch),
            str(result.context),
            f"{result.times.median:.2f}",
            f"{result.times.lower:.2f}-{result.times.upper:.2f}",
            f"{result.tokens_per_s:.1f}",
            _cell(found[str(key(result))].get(f"{result.mode}/plain"), digits=3),
            _cell(result.times_floor, digits=2),
        ]
        for result in results
    ]


def _cell(value: float | None, *, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
