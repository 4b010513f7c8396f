"""A sampler of fixed shape on Triton: filled again and again, padded, recorded in a CUDA graph, tried before use."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import pytest
import torch
from test_sampler_triton import (
    COMPOSITIONS,
    DEVICE,
    IS_INTERPRETED,
    RANK,
    RELU,
    SUBTRACT,
    SUBTRACT_ALL,
    logits,
    on_host,
    protected,
    random_row,
)
from uld_kernels import (
    LateRows,
    SampleRow,
    SampleShape,
    StaticSampler,
    rules,
    sampler_reference,
    sampler_triton,
    trial,
)
from uld_kernels.sampler_triton import TritonSampler

VOCAB_SIZE = 300
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if not IS_INTERPRETED:
    pytestmark.append(pytest.mark.gpu)
needs_device = pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter has no CUDA graphs")


def expected(logits_RV: torch.Tensor, rows: list[SampleRow]) -> list[int]:
    ids = protected(logits_RV.shape[1]).cpu()
    host_rows = [on_host(row) for row in rows]
    output = sampler_reference.sample(
        logits_RV.cpu().double(), host_rows, vocab_size=logits_RV.shape[1], protected_ids=ids
    )
    tokens: list[int] = output.token_ids_B.tolist()
    return tokens


def triton_sampler(shape: SampleShape) -> TritonSampler:
    return TritonSampler(
        shape, vocab_size=VOCAB_SIZE, protected_ids=protected(VOCAB_SIZE), device=torch.device(DEVICE)
    )


def test_refilled_sampler_draws_each_batch_as_if_it_were_new() -> None:
    chance = random.Random(3)
    batches = [[random_row(chance, VOCAB_SIZE) for _ in range(number)] for number in (3, 1, 2)]
    sampler = triton_sampler(SampleShape.of([row for rows in batches for row in rows], num_rows=6))
    for step, rows in enumerate(batches):
        logits_RV = logits(step, VOCAB_SIZE)
        sampler.fill(rows)
        sampler.run(logits_RV)
        output = sampler.output()
        assert output.token_ids_B.tolist() == expected(logits_RV, rows)
        assert output.top_ids_BN.shape == (len(rows), max(row.num_logprobs for row in rows))
        assert output.digests == [tuple(term.digest for term in row.distinct_terms) for row in rows]


def test_padding_and_shape_change_no_bit() -> None:
    rows = [SampleRow(0, terms, seed=5, position=3) for terms in ((), (SUBTRACT,), (RELU,))]
    banned = [replace(rows[0], banned_ids=torch.tensor([3], device=DEVICE)), *rows]
    logits_RV = logits(4, VOCAB_SIZE)
    small, large = (
        triton_sampler(SampleShape.of(batch, num_rows=size)) for batch, size in ((rows, 3), (banned, 6))
    )
    for sampler in (small, large):
        sampler.fill(rows)
        sampler.run(logits_RV)
    for name in ("token_ids_B", "logprob_B", "kl_B", "num_kept_B"):
        assert torch.equal(getattr(small.output(), name), getattr(large.output(), name))


def test_leftovers_of_an_earlier_fill_are_never_read() -> None:
    # The first fill's terms read row 2; the second run has no such row.
    sampler = triton_sampler(SampleShape.of([SampleRow(0, (SUBTRACT_ALL, RANK))] * 2, num_rows=2))
    sampler.fill([SampleRow(0, (SUBTRACT_ALL, RANK))] * 2)
    sampler.run(logits(5, VOCAB_SIZE))
    plain = [SampleRow(0, seed=8)]
    sampler.fill(plain)
    single = logits(6, VOCAB_SIZE, num_rows=1)
    sampler.run(single)
    assert sampler.output().token_ids_B.tolist() == expected(single, plain)


def test_a_broken_kernel_is_not_proven(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = TritonSampler.run

    def broken(self: TritonSampler, logits_RV: torch.Tensor, late: LateRows | None) -> None:
        real(self, logits_RV.nan_to_num(0.0), late)

    def few_rows(vocab_size: int) -> list[SampleRow]:
        return [SampleRow(0, temperature=0.0), SampleRow(0, (RELU,), temperature=0.0), SampleRow(3)]

    trial.verdict.cache_clear()
    monkeypatch.setattr(trial, "trial_rows", few_rows)
    assert trial.verdict(torch.device(DEVICE), 41, torch.float32).is_proven
    trial.verdict.cache_clear()
    monkeypatch.setattr(sampler_triton.TritonSampler, "run", broken)
    with caplog.at_level(logging.WARNING):
        assert trial.verdict(torch.device(DEVICE), 41, torch.float32).reason == "status_B"
    assert "torch samples instead" in caplog.text
    trial.verdict.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_whole_trial_is_passed(dtype: torch.dtype) -> None:
    trial.verdict.cache_clear()
    assert trial.verdict(torch.device(DEVICE), 1271, dtype).is_proven


@needs_device
@pytest.mark.parametrize("vocab_size", [1271, 128256])
def test_a_recorded_sampler_draws_what_it_is_filled_with(vocab_size: int) -> None:
    def rows(step: int) -> list[SampleRow]:
        return [
            replace(row, position=row.position + step)
            for terms in COMPOSITIONS
            for row in (
                SampleRow(0, terms, seed=4, position=7),
                SampleRow(
                    0,
                    terms,
                    top_p=0.9,
                    num_logprobs=2,
                    presence_penalty=0.5,
                    output_ids=torch.arange(3 + step),
                ),
            )
        ]

    device = torch.device(DEVICE)
    shape = SampleShape.of(rows(4), num_rows=32)
    sampler = StaticSampler(shape, vocab_size=vocab_size, protected_ids=protected(vocab_size), device=device)
    assert sampler.is_recordable
    logits_RV = logits(0, vocab_size)
    sampler.fill(rows(0))
    sampler.run(logits_RV)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.run(logits_RV)
    for step in range(5):
        logits_RV.copy_(logits(step, vocab_size))
        sampler.fill(rows(step))
        graph.replay()
        output = sampler.output()
        assert output.token_ids_B.tolist() == expected(logits_RV, rows(step))
        assert (output.status_B == rules.OK).all()


@needs_device
def test_fills_may_run_ahead_of_the_device() -> None:
    sampler = triton_sampler(SampleShape(num_rows=2))
    logits_RV = logits(1, VOCAB_SIZE)
    tokens = []
    for position in range(20):
        sampler.fill([SampleRow(0, seed=1, position=position)])
        sampler.run(logits_RV)
        tokens.append(sampler.output().token_ids_B.clone())
    wanted = [expected(logits_RV, [SampleRow(0, seed=1, position=position)]) for position in range(20)]
    assert [token.tolist() for token in tokens] == wanted
