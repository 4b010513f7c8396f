"""Checks and times the kernels of attention and of adapters alone, at a model's own sizes. Called by gpu.py; on a CPU
the same calls run in plain torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from uld_kernels import attention, lora

BLOCK_SIZE = 16
# Share of the largest value that one rounding of the dtype may cost, with room for sums in another order.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
CHECKED_LENGTHS = (1, 16, 17, 129, 1000)
REPEATS = 20
# Calls go through so many inputs in turn, so that none is found in the L2 cache.
ROTATED_BYTES = 2**27
LARGEST_ROTATION = 16


Case = TypeVar("Case")


class Shape(Protocol):
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


@dataclass(frozen=True, slots=True)
class Check:
    """`gap` is the largest difference from fp64 as a share of the largest value."""

    what: str
    gap: float
    ok: bool


@dataclass(frozen=True, slots=True)
class KernelTime:
    """`us_of_step`: of all its calls in one unlearned step that belong to the adapter; 0 for attention."""

    what: str
    batch: int
    us: float
    gb_per_s: float
    us_of_step: float = 0.0


@dataclass(frozen=True, slots=True)
class _Attention:
    query_NHD: torch.Tensor
    keys_PKD: torch.Tensor
    values_PKD: torch.Tensor
    rows_SQ: torch.Tensor
    blocks_SB: torch.Tensor
    lengths_S: torch.Tensor

    @classmethod
    def of(
        cls, lengths: list[int], num_queries: int, shape: Shape, device: torch.device, dtype: torch.dtype
    ) -> _Attention:
        """Contexts of these lengths in shuffled blocks."""
        width = max(-(-length // BLOCK_SIZE) for length in lengths)
        blocks_SB = torch.randperm(len(lengths) * width, device=device).view(len(lengths), width)
        D = shape.hidden_size // shape.num_attention_heads
        pool = (blocks_SB.numel() * BLOCK_SIZE, 2, shape.num_key_value_heads, D)
        pool_P2KD = torch.randn(pool, device=device, dtype=dtype)
        num_rows = len(lengths) * num_queries
        return cls(
            torch.randn(num_rows, shape.num_attention_heads, D, device=device, dtype=dtype),
            pool_P2KD[:, 0],
            pool_P2KD[:, 1],
            torch.arange(num_rows, device=device).view(len(lengths), num_queries),
            blocks_SB,
            torch.tensor(lengths, device=device, dtype=torch.int32),
        )

    def run(self) -> torch.Tensor:
        return attention.decode_attention(
            self.query_NHD, self.keys_PKD, self.values_PKD, **self._tables(), block_size=BLOCK_SIZE
        )

    def exact(self) -> torch.Tensor:
        out_NHD = torch.zeros_like(self.query_NHD, dtype=torch.float64)
        attention.reference(
            self.query_NHD.double(),
            self.keys_PKD.double(),
            self.values_PKD.double(),
            **self._tables(),
            block_size=BLOCK_SIZE,
            scale=self.query_NHD.shape[-1] ** -0.5,
            window=None,
            out_NHD=out_NHD,
        )
        return out_NHD

    @property
    def bytes_read(self) -> int:
        """Keys and values of all contexts, once."""
        _, K, D = self.keys_PKD.shape
        return int(self.lengths_S.sum()) * 2 * K * D * self.keys_PKD.element_size()

    def _tables(self) -> dict[str, torch.Tensor]:
        return {"rows_SQ": self.rows_SQ, "blocks_SB": self.blocks_SB, "lengths_S": self.lengths_S}


def attention_checks(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Check]:
    torch.manual_seed(0)
    checks = []
    for num_queries in (1, 2, 5):
        case = _Attention.of(list(CHECKED_LENGTHS), num_queries, shape, device, dtype)
        checks.append(against_fp64(f"attention, {num_queries} rows a sequence", case.run(), case.exact()))
        if device.type != "cuda":  # only the kernel promises the same bits
            continue
        alone = _Attention(
            case.query_NHD,
            case.keys_PKD,
            case.values_PKD,
            case.rows_SQ[3:4].contiguous(),
            case.blocks_SB[3:4, : -(-CHECKED_LENGTHS[3] // BLOCK_SIZE)].contiguous(),
            case.lengths_S[3:4],
        )
        rows = case.rows_SQ[3]
        is_equal = torch.equal(alone.run()[rows], case.run()[rows])
        what = f"attention, {num_queries} rows, alone as beside others"
        checks.append(Check(what, 0.0 if is_equal else 1.0, is_equal))
    return checks


def attention_times(
    device: torch.device, dtype: torch.dtype, shape: Shape, *, batch: int, context: int
) -> list[KernelTime]:
    """With the target's row alone, and with one assistant's beside it."""
    times = []
    for num_queries in (1, 2):
        cases = _rotation(
            lambda q=num_queries: _Attention.of([context] * batch, q, shape, device, dtype),
            lambda case: case.bytes_read,
        )
        us = median_us([case.run for case in cases], device)
        gb_per_s = cases[0].bytes_read / us / 1e3
        times.append(KernelTime(f"attention, {num_queries} rows, context {context}", batch, us, gb_per_s))
    return times


@dataclass(frozen=True, slots=True)
class _Lora:
    y_NO: torch.Tensor
    x_NI: torch.Tensor
    A_PIX: torch.Tensor
    parts: list[tuple[torch.Tensor, int]]
    rows_A: torch.Tensor
    places_A: torch.Tensor

    @classmethod
    def of(
        cls,
        places: list[int],
        widths: tuple[int, tuple[int, ...]],
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> _Lora:
        """As many target rows as assistant rows, as in a step; A and B as small as those of trained adapters."""
        (width, sizes), num_places = widths, max(places) + 1

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=dtype) * 0.05

        return cls(
            random(2 * len(places), sum(sizes)),
            random(2 * len(places), width),
            random(num_places, width, rank * len(sizes)),
            [(random(num_places, rank, size), sum(sizes[:n])) for n, size in enumerate(sizes)],
            torch.arange(len(places), 2 * len(places), device=device),
            torch.tensor(places, device=device),
        )

    def run(self) -> torch.Tensor:
        lora.add_deltas(
            self.y_NO, self.x_NI, self.A_PIX, self.parts, rows_A=self.rows_A, places_A=self.places_A
        )
        return self.y_NO

    def exact(self) -> torch.Tensor:
        y_NO, rank = self.y_NO.double(), self.parts[0][0].shape[1]
        shrunk_AX = (self.x_NI[self.rows_A, None].double() @ self.A_PIX[self.places_A].double())[:, 0]
        for part, (B_PrO, first) in enumerate(self.parts):
            part_Ar = shrunk_AX[:, part * rank : (part + 1) * rank]
            delta_AO = (part_Ar[:, None] @ B_PrO[self.places_A].double())[:, 0]
            y_NO[self.rows_A, first : first + B_PrO.shape[2]] += delta_AO
        return y_NO

    @property
    def bytes_read(self) -> int:
        """Of the adapters."""
        return self.A_PIX.nbytes + sum(B_PrO.nbytes for B_PrO, _ in self.parts)


def lora_checks(device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Check]:
    torch.manual_seed(0)
    checks = []
    for name, widths in _products(shape).items():
        for mix, places in (
            ("one adapter", [0] * 5),
            ("40 rows of 20 adapters", [n // 2 for n in range(40)]),
        ):
            case = _Lora.of(places, widths, 16, device, dtype)
            exact = case.exact()  # first: the other adds in place
            checks.append(against_fp64(f"deltas of {name}, {mix}", case.run(), exact))
    return checks


def lora_times(
    device: torch.device, dtype: torch.dtype, shape: Shape, *, batch: int, rank: int, num_layers: int = 8
) -> list[KernelTime]:
    """One adapter for the whole batch: what a step of one profile calls in each of its layers."""
    times = []
    for name, widths in _products(shape).items():
        cases = _rotation(
            lambda widths=widths: _Lora.of([0] * batch, widths, rank, device, dtype),
            lambda case: case.bytes_read + case.x_NI.nbytes + case.y_NO.nbytes,
        )
        us = median_us([case.run for case in cases], device)
        gb_per_s = cases[0].bytes_read / us / 1e3
        layers = min(num_layers, shape.num_hidden_layers)
        times.append(KernelTime(f"deltas of {name}", batch, us, gb_per_s, us * layers))
    return times


def _products(shape: Shape) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Input width and output widths of what a borrowing adapter changes in a layer."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return {
        "queries": (hidden, (hidden,)),
        "output": (hidden, (hidden,)),
        "gate and up": (hidden, (inner, inner)),
        "down": (inner, (hidden,)),
    }


def against_fp64(what: str, ours: torch.Tensor, exact: torch.Tensor) -> Check:
    gap = float((ours.double() - exact).abs().max() / exact.abs().max())
    return Check(what, gap, gap <= TOLERANCE[ours.dtype])


def _rotation(make: Callable[[], Case], num_bytes: Callable[[Case], int]) -> list[Case]:
    first = make()
    count = min(LARGEST_ROTATION, -(-ROTATED_BYTES // max(num_bytes(first), 1)))
    return [first, *(make() for _ in range(count - 1))]


def median_us(calls: list[Callable[[], object]], device: torch.device) -> float:
    """Of one call. On a GPU many are recorded in one graph, so that the host's launches do not count."""
    for call in calls[:2]:
        call()
    if device.type != "cuda":
        return statistics.median(_seconds(calls[n % len(calls)]) for n in range(REPEATS)) * 1e6
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(REPEATS):
            calls[n % len(calls)]()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end) * 1e3 / REPEATS)
    return statistics.median(times)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
