"""Samplers of several shapes in one workspace draw what each draws in its own, also when runs follow each other before
anybody looks at what the first one drew."""

from __future__ import annotations

import pytest
import torch
from test_sampler_triton import DEVICE, IS_INTERPRETED, PAIR, RANK, RELU, SUBTRACT, logits, protected
from uld_kernels import SampleOutput, SampleRow, SampleShape, StaticSampler, Workspace, WorkspaceTooSmall
from uld_kernels.sampler_triton import TritonSampler

VOCAB_SIZE = 300
COLUMNS = (
    "token_ids_B", "logprob_B", "top_ids_BN", "top_logprobs_BN", "status_B", "num_kept_B", "kl_B", "argmax_changed_B",
)  # fmt: skip
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if not IS_INTERPRETED:
    pytestmark.append(pytest.mark.gpu)
needs_device = pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter has no CUDA graphs")

LARGE = [
    SampleRow(
        0, (SUBTRACT,), seed=1, presence_penalty=0.5, output_ids=torch.tensor([3, 4, 4]), num_logprobs=2
    ),
    SampleRow(0, (PAIR, RANK), seed=2),
    SampleRow(0, (SUBTRACT, RELU), seed=3, temperature=0.0),
]
SMALL = [SampleRow(0, seed=4, top_p=0.7), SampleRow(0, (RELU,), seed=5, banned_ids=torch.tensor([7]))]


def sampler(rows: list[SampleRow], workspace: Workspace | None) -> TritonSampler:
    return TritonSampler(
        SampleShape.of(rows, num_rows=len(rows)),
        vocab_size=VOCAB_SIZE,
        protected_ids=protected(VOCAB_SIZE),
        device=torch.device(DEVICE),
        workspace=workspace,
    )


def run(one: TritonSampler, rows: list[SampleRow], seed: int) -> None:
    one.fill(rows)
    one.run(logits(seed, VOCAB_SIZE))


def workspace_of(rows: list[SampleRow]) -> Workspace:
    shape = SampleShape.of(rows, num_rows=len(rows))
    return Workspace.of(shape, vocab_size=VOCAB_SIZE, device=torch.device(DEVICE))


def is_inside(tensor: torch.Tensor, workspace: Workspace) -> bool:
    first = workspace.lend(SampleShape(1), 1)["touched"].data_ptr()
    return first <= tensor.data_ptr() < first + workspace.num_bytes


def copied(output: SampleOutput) -> dict[str, torch.Tensor]:
    return {name: getattr(output, name).clone() for name in COLUMNS}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in COLUMNS:
        assert torch.equal(found[name], expected[name]), name


def test_runs_that_follow_each_other_draw_what_samplers_of_their_own_draw() -> None:
    batches = {"large": LARGE, "small": SMALL}
    expected = {}
    for name, rows in batches.items():
        alone = sampler(rows, None)
        run(alone, rows, seed=1)
        expected[name] = copied(alone.output())
    workspace = workspace_of(LARGE)
    shared = {name: sampler(rows, workspace) for name, rows in batches.items()}
    # As with steps that overlap: the later run has been through before the host reads what the earlier one drew.
    for order in (("large", "small"), ("small", "large")):
        for name in order:
            run(shared[name], batches[name], seed=1)
        for name in order:
            assert_equal(copied(shared[name].output()), expected[name])


def test_what_other_runs_leave_behind_is_never_read() -> None:
    alone, workspace = sampler(LARGE, None), workspace_of(LARGE)
    run(alone, LARGE, seed=2)
    spoiled = sampler(LARGE, workspace)
    for byte in (255, 0, 127):
        for buffer in workspace.lend(SampleShape.of(LARGE, num_rows=len(LARGE)), VOCAB_SIZE).values():
            buffer.view(torch.uint8).fill_(byte)
        run(spoiled, LARGE, seed=2)
        assert_equal(copied(spoiled.output()), copied(alone.output()))


def test_a_second_shape_lies_in_the_workspace_and_what_the_host_reads_does_not() -> None:
    workspace = workspace_of(LARGE)
    first, second = sampler(LARGE, workspace), sampler(SMALL, workspace)
    for one in (first, second):
        own = {name for name, buffer in one.space.items() if not is_inside(buffer, workspace)}
        assert own == {"normalizers", "thresholds"}
    assert sum(second.space[name].numel() for name in ("normalizers", "thresholds")) < 3 * len(SMALL) + 1
    run(second, SMALL, seed=3)
    output = second.output()
    assert not any(is_inside(getattr(output, name), workspace) for name in COLUMNS)
    # What the host writes, which it does while an earlier run is in flight.
    tables = second._tables
    assert not any(is_inside(tensor, workspace) for tensor in (tables.ints, tables.masks))


def test_a_shape_larger_than_the_workspace_is_refused() -> None:
    with pytest.raises(WorkspaceTooSmall, match="bytes of workspace"):
        sampler(LARGE, workspace_of(SMALL))


@needs_device
def test_recorded_samplers_share_a_workspace() -> None:
    vocab_size, device = 128256, torch.device(DEVICE)
    ids = protected(vocab_size)
    logits_RV = logits(0, vocab_size)
    shape = SampleShape.of(LARGE, num_rows=8)
    workspace = Workspace.of(shape, vocab_size=vocab_size, device=device)
    options = {"vocab_size": vocab_size, "protected_ids": ids, "device": device}
    graphs = []
    for rows in (LARGE, SMALL):
        alone = StaticSampler(SampleShape.of(rows, num_rows=8), **options)
        alone.fill(rows)
        alone.run(logits_RV)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        one = StaticSampler(SampleShape.of(rows, num_rows=8), **options, workspace=workspace)
        assert torch.cuda.memory_allocated() - before < 4 * vocab_size, "no more than a row of a list"
        one.fill(rows)
        one.run(logits_RV)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one.run(logits_RV)
        graphs.append((graph, one, copied(alone.output())))
    for _ in range(3):
        for graph, _, _ in graphs:
            graph.replay()
        for _, one, expected in graphs:
            assert_equal(copied(one.output()), expected)
