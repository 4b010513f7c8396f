"""A Triton sampler that differs from the torch sampler, or does not run, must not serve, and somebody must hear so."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from uld_kernels import SampleOutput, SampleRow, ops, sampler_reference, trial

pytest.importorskip("triton")
VOCAB_SIZE = 97
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _untried() -> Iterator[None]:
    trial.verdict.cache_clear()
    yield
    trial.verdict.cache_clear()


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
