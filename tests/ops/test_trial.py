"""A Triton sampler that differs from the torch sampler, or does not run, must not serve, and somebody must hear so."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from uld_kernels import LateRows, SampleOutput, SampleRow, Term, ops, rules, sampler_reference, trial
from uld_kernels.late import LATE_BY_SCORE, LATE_BY_TARGET, NOT_LATE, late_list_of

pytest.importorskip("triton")
VOCAB_SIZE = 97
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _untried() -> Iterator[None]:
    for verdict in (trial.verdict, trial.late_verdict):
        verdict.cache_clear()
    yield
    for verdict in (trial.verdict, trial.late_verdict):
        verdict.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, spoil: str | None) -> None:
    """A stand-in for the Triton sampler that is right but for one column of one row."""

    def sample(logits_RV: torch.Tensor, rows: Sequence[SampleRow], **options: Any) -> SampleOutput:
        if spoil == "raises":
            raise RuntimeError("no such instruction")
        output = sampler_reference.sample(logits_RV.float(), rows, **options)
        if spoil == "digests":
            return replace(output, digests=output.digests[::-1])
        if spoil is not None:
            column = getattr(output, spoil).clone()
            column[0] = ~column[0] if column.dtype == torch.bool else column[0] + 1
            return replace(output, **{spoil: column})
        return output

    monkeypatch.setattr("uld_kernels.sampler_triton.sample", sample)


def test_a_sampler_that_agrees_is_proven_quietly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, None)
    assert trial.verdict(CPU, VOCAB_SIZE, torch.bfloat16).is_proven
    assert not caplog.records


@pytest.mark.parametrize(
    "spoil",
    ["token_ids_B", "status_B", "num_kept_B", "argmax_changed_B", "logprob_B", "kl_B", "digests", "raises"],
)
def test_a_sampler_that_differs_in_anything_is_not_proven(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spoil: str
) -> None:
    install(monkeypatch, spoil)
    with caplog.at_level(logging.WARNING):
        assert not trial.verdict(CPU, VOCAB_SIZE, torch.float32).is_proven
    assert "torch samples instead" in caplog.text


@pytest.mark.parametrize("spoil", [None, "token_ids_B", "status_B", "logprob_B", "raises"])
def test_late_rows_are_tried_by_themselves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spoil: str | None
) -> None:
    install(monkeypatch, spoil)
    with caplog.at_level(logging.WARNING):
        verdict = trial.late_verdict(CPU, VOCAB_SIZE, torch.float32, torch.bfloat16)
    assert verdict.is_proven == (spoil is None)
    assert ("late rows are computed whole instead" in caplog.text) == (spoil is not None)


@pytest.mark.parametrize("are_lists_proven", [True, False])
def test_late_rows_go_to_kernels_that_are_proven_and_are_else_computed_whole(
    monkeypatch: pytest.MonkeyPatch, are_lists_proven: bool
) -> None:
    """Neither way drops them."""

    def prove(*_: object, head_dtype: torch.dtype | None = None, **__: object) -> bool:
        return head_dtype is None or are_lists_proven

    given: list[LateRows | None] = []

    def sample(
        logits_RV: torch.Tensor, rows: Sequence[SampleRow], *, late: LateRows | None, **options: Any
    ) -> SampleOutput:
        given.append(late)
        return sampler_reference.sample(logits_RV, rows, late=late, **options)

    monkeypatch.setattr(ops, "prove", prove)
    monkeypatch.setattr("uld_kernels.sampler_triton.sample", sample)
    generator = torch.Generator().manual_seed(2)
    logits_RV, hidden_AD, weight_VD = (
        torch.randn(*size, generator=generator) for size in ((1, VOCAB_SIZE), (1, 8), (VOCAB_SIZE, 8))
    )
    late = LateRows(hidden_AD * 3, weight_VD)
    hush = Term(rules.RELU_DIFFERENCE, 2.0, 1, row_a=1, filter_mode=rules.FUSED, tau=0.1)
    options = {"vocab_size": VOCAB_SIZE, "protected_ids": torch.tensor([], dtype=torch.long)}
    rows = [SampleRow(0, (hush,), seed=1), SampleRow(0, (hush,), temperature=0.0, position=1)]
    output = ops.fused_sample(logits_RV, rows, **options, late=late)
    expected = sampler_reference.sample(logits_RV, rows, **options, late=late)
    assert torch.equal(output.token_ids_B, expected.token_ids_B)
    assert output.digests == [(1,), (1,)]
    assert given == [late if are_lists_proven else None]


def test_the_trial_is_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    first = trial.verdict(CPU, VOCAB_SIZE, torch.float32)
    install(monkeypatch, "token_ids_B")
    assert trial.verdict(CPU, VOCAB_SIZE, torch.float32) is first


def test_nothing_is_proven_for_a_cpu() -> None:
    assert not ops.prove(CPU, VOCAB_SIZE)


def test_the_trial_has_every_status_and_a_secret_in_each_row() -> None:
    rows = trial.trial_rows(VOCAB_SIZE)
    assert len({row.terms for row in rows}) >= 10
    assert {row.temperature for row in rows} >= {0.0, 0.9, 1.0}
    assert any(row.allowed_mask is not None for row in rows)


def test_the_trial_of_late_rows_has_all_their_ways() -> None:
    rows = trial.late_trial_rows(VOCAB_SIZE)
    ways = {late_list_of(row.distinct_terms, first_late=5, vocab_size=VOCAB_SIZE) for row in rows}
    assert ways == {None, NOT_LATE, LATE_BY_TARGET, LATE_BY_SCORE}
    assert any(term.protect for row in rows for term in row.terms)


def test_late_rows_are_tried_in_every_form_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled anew for another type of logits, a bias, and strides that 16 divides or does not; a head
    wider than a block of columns takes a loop that others do not."""
    from uld_kernels.late_triton import BLOCK_D

    tried: list[tuple[bool, LateRows]] = []

    def sample(
        logits_RV: torch.Tensor, rows: Sequence[SampleRow], *, late: LateRows, **options: Any
    ) -> SampleOutput:
        # What no list serves turns its batch's logits into fp32.
        ways = {late_list_of(row.distinct_terms, first_late=5, vocab_size=VOCAB_SIZE) for row in rows}
        tried.append((None not in ways and LATE_BY_SCORE in ways and LATE_BY_TARGET in ways, late))
        return sampler_reference.sample(logits_RV.float(), rows, late=late, **options)

    monkeypatch.setattr("uld_kernels.sampler_triton.sample", sample)
    assert trial.late_verdict(CPU, VOCAB_SIZE, torch.bfloat16, torch.bfloat16).is_proven
    assert {is_on_lists for is_on_lists, _ in tried} == {True, False}
    assert {late.bias_W is None for _, late in tried} == {True, False}
    assert all(late.hidden_AD.shape[1] % 16 == 0 and late.hidden_AD.shape[1] > BLOCK_D for _, late in tried)


def test_a_fault_in_the_second_batch_of_late_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(
        logits_RV: torch.Tensor, rows: Sequence[SampleRow], *, late: LateRows, **options: Any
    ) -> SampleOutput:
        without = LateRows(late.hidden_AD, late.weight_WD)
        return sampler_reference.sample(logits_RV.float(), rows, late=without, **options)

    monkeypatch.setattr("uld_kernels.sampler_triton.sample", sample)
    assert not trial.late_verdict(CPU, VOCAB_SIZE, torch.float32, torch.bfloat16).is_proven
