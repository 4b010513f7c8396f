"""Ways to draw a batch, each as a clock that gives the seconds of one draw: the fused op, the same with everything
fixed but data, the plain torch chain, that chain compiled, FlashInfer. Called by sampler. Knows no report.

Legend: N buffers in rotation, R rows of logits, B rows to draw, V vocabulary."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from uld_kernels import SampleRow, SampleShape, StaticSampler, fused_sample

from uld_serve.bench.sampler_chain import Chain, draw
from uld_serve.bench.sampler_kinds import MIXED, History, Kind, kinds_of_batch
from uld_serve.bench.timing import synchronize

VariantName = Literal["fused", "static", "chain", "compiled", "flashinfer"]
VARIANTS: tuple[VariantName, ...] = get_args(VariantName)
VARIANT_HELP = (
    "fused: fused_sample, called anew for each draw; static: the same with its rows packed beforehand; chain: what one "
    "would write in torch; compiled: torch.compile of that; flashinfer: its top-k and top-p sampling on ready-made "
    "logits. On a GPU all but fused are replayed from a CUDA graph"
)
_CALLS_PER_REPLAY = 10
_WARM_UP_CALLS = 3
_FLASHINFER = {
    "top_k_top_p_sampling_from_logits": ("logits", "top_k", "top_p"),
    "top_p_sampling_from_probs": ("probs", "top_p"),
    "sampling_from_logits": ("logits",),
}

Call = Callable[[torch.Tensor], object]


@dataclass(slots=True)
class Clock:
    """`seconds` runs one draw, or a graph of many, and gives the time of one."""

    name: VariantName
    seconds: Callable[[], float]
    is_replayed: bool


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of rows at one batch size and vocabulary."""

    name: str
    kinds: list[Kind]
    logits_NRV: torch.Tensor
    history: History

    @property
    def batch(self) -> int:
        return len(self.kinds)

    @property
    def vocab_size(self) -> int:
        return self.logits_NRV.shape[2]

    @property
    def device(self) -> torch.device:
        return self.logits_NRV.device

    def rows(self) -> list[SampleRow]:
        return [kind.row(number, self.batch, self.history) for number, kind in enumerate(self.kinds)]


def missing(name: VariantName, device: torch.device) -> str | None:
    """Why a variant cannot run here; None where it can."""
    if name == "compiled" and not _has_compiler(device):
        return "no compiler for torch.compile here (a C++ compiler on a CPU, Triton on a GPU)"
    if name == "flashinfer":
        if device.type != "cuda":
            return "FlashInfer runs on CUDA devices only"
        return _flashinfer_missing()
    return None


def can_draw(name: VariantName, case: Case) -> bool:
    """FlashInfer samples; the best token is torch's to find."""
    return name != "flashinfer" or any(kind.temperature > 0.0 for kind in case.kinds)


def clock_of(name: VariantName, case: Case) -> Clock:
    """Of a variant that is not `missing` and `can_draw` the case."""
    call, is_recordable = _call(name, case)
    for number in range(_WARM_UP_CALLS):
        call(case.logits_NRV[number % len(case.logits_NRV)])
    synchronize(case.device)
    if case.device.type != "cuda":
        return Clock(name, _host_clock(call, case, VARIANTS.index(name)), False)
    if not is_recordable:
        return Clock(name, _event_clock(lambda: _all_buffers(call, case), _num_calls(case)), False)
    return _device_clock(name, call, case)


def _device_clock(name: VariantName, call: Call, case: Case) -> Clock:
    """Of a recorded graph; of plain launches where recording is refused, as it is to what waits for the device."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _all_buffers(call, case)
    except RuntimeError:
        synchronize(case.device)
        return Clock(name, _event_clock(lambda: _all_buffers(call, case), _num_calls(case)), False)
    return Clock(name, _event_clock(graph.replay, _num_calls(case)), True)


def _call(name: VariantName, case: Case) -> tuple[Call, bool]:
    """And whether a CUDA graph can hold it."""
    if name == "fused":
        return _fused_call(case), False  # it packs its rows on the host, and is timed with that
    if name == "static":
        sampler = _static_sampler(case)
        return sampler.run, sampler.is_recordable
    if name == "flashinfer":
        return _flashinfer_call(case), True
    chain: Chain = draw
    # Compiled once for each kind and shape, as a server would that records its batch sizes.
    if name == "compiled":
        torch._dynamo.reset()
        chain = torch.compile(draw, dynamic=False)
    return _chain_call(chain, case), True


def _fused_call(case: Case) -> Call:
    rows, none = case.rows(), _no_ids(case)
    return lambda logits_RV: fused_sample(logits_RV, rows, vocab_size=case.vocab_size, protected_ids=none)


def _static_sampler(case: Case) -> StaticSampler:
    rows, none = case.rows(), _no_ids(case)
    shape = SampleShape.of(rows, num_rows=len(rows))
    sampler = StaticSampler(
        shape,
        vocab_size=case.vocab_size,
        protected_ids=none,
        device=case.device,
        dtype=case.logits_NRV.dtype,
    )
    sampler.fill(rows)
    return sampler


def _no_ids(case: Case) -> torch.Tensor:
    return torch.tensor([], dtype=torch.int64, device=case.device)


def _chain_call(chain: Chain, case: Case) -> Call:
    """Batches of several kinds are split by kind: nobody writes one chain for all of them."""
    groups: dict[str, list[int]] = {}
    for number, kind in enumerate(case.kinds):
        groups.setdefault(kind.name, []).append(number)
    parts = []
    for numbers in groups.values():
        index = None if len(groups) == 1 else torch.tensor(numbers, device=case.device)
        history = case.history if index is None else _of_rows(case.history, index)
        parts.append((case.kinds[numbers[0]], index, history))

    def run(logits_RV: torch.Tensor) -> list[torch.Tensor]:
        streams = logits_RV.view(-1, case.batch, case.vocab_size).unbind()
        drawn = []
        for kind, index, history in parts:
            own = streams if index is None else tuple(one.index_select(0, index) for one in streams)
            drawn.append(chain(kind, own[0], own[1], own[2], history))
        return drawn

    return run


def _of_rows(history: History, index: torch.Tensor) -> History:
    return History(history.prompt_BL.index_select(0, index), history.output_BL.index_select(0, index))


def _flashinfer_call(case: Case) -> Call:
    """Of logits that are combined, filtered, penalised and divided by the temperature already: the cheapest thing that
    it could be asked for in the place of these rows."""
    sampling = importlib.import_module("flashinfer.sampling")
    if case.name == MIXED:
        top_p = torch.tensor([kind.top_p for kind in case.kinds], device=case.device)
        top_k = [kind.top_k or case.vocab_size for kind in case.kinds]
        top_k_B = torch.tensor(top_k, dtype=torch.int32, device=case.device)
        return lambda logits_RV: sampling.top_k_top_p_sampling_from_logits(
            logits_RV[: case.batch].float(), top_k_B, top_p
        )
    kind = case.kinds[0]
    if kind.top_k > 0:
        return lambda logits_RV: sampling.top_k_top_p_sampling_from_logits(
            logits_RV[: case.batch].float(), kind.top_k, kind.top_p
        )
    if kind.top_p < 1.0:
        return lambda logits_RV: sampling.top_p_sampling_from_probs(
            logits_RV[: case.batch].float().softmax(-1), kind.top_p
        )
    return lambda logits_RV: sampling.sampling_from_logits(logits_RV[: case.batch].float())


def _flashinfer_missing() -> str | None:
    try:
        sampling = importlib.import_module("flashinfer.sampling")
    except (ImportError, OSError) as error:
        return f"FlashInfer cannot be imported: {error}"
    for function, names in _FLASHINFER.items():
        found = getattr(sampling, function, None)
        known = () if found is None else tuple(inspect.signature(found).parameters)
        # Before 0.2.3 they took uniform numbers too and gave a success flag.
        if known[: len(names)] != names or "uniform_samples" in known:
            return f"this FlashInfer has no {function}({', '.join(names)}); 0.2.6 and later have"
    return _flashinfer_trial() if torch.cuda.is_available() else None


def _flashinfer_trial() -> str | None:
    """It may have to compile first, for which not every machine has what it takes."""
    sampling = importlib.import_module("flashinfer.sampling")
    try:
        sampling.sampling_from_logits(torch.zeros(1, 128, device="cuda"))
    except (RuntimeError, OSError, ImportError) as error:
        return (
            f"FlashInfer does not run: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
    return None


def _has_compiler(device: torch.device) -> bool:
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def _num_calls(case: Case) -> int:
    return max(len(case.logits_NRV), _CALLS_PER_REPLAY)


def _all_buffers(call: Call, case: Case) -> None:
    for number in range(_num_calls(case)):
        call(case.logits_NRV[number % len(case.logits_NRV)])


def _event_clock(run: Callable[[], object], num_calls: int) -> Callable[[], float]:
    def seconds() -> float:
        begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / num_calls

    return seconds


def _host_clock(call: Call, case: Case, offset: int) -> Callable[[], float]:
    """Every variant begins elsewhere in the rotation, so that none finds what another has just read."""
    at = offset

    def seconds() -> float:
        nonlocal at
        logits_RV = case.logits_NRV[at % len(case.logits_NRV)]
        at += len(VARIANTS) + 1
        began = time.perf_counter()
        call(logits_RV)
        return time.perf_counter() - began

    return seconds


def case_of(name: str, batch: int, logits_NRV: torch.Tensor, history: History) -> Case:
    return Case(name, kinds_of_batch(name, batch), logits_NRV, history)
