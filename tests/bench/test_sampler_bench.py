"""bench sampler: what it times and reports, that its plain chain draws what the fused op draws, what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from math import prod
from types import ModuleType

import pytest
import torch
from uld_kernels import SampleRow, fused_sample

from uld_serve import cli
from uld_serve.bench import sampler_chain, sampler_head, sampler_variants
from uld_serve.bench.sampler_kinds import (
    KINDS,
    ROTATED_BYTES,
    ROW_KINDS,
    History,
    floor_bytes,
    kinds_of_batch,
    rotated_logits,
)

Bench = Callable[..., dict]
CPU = torch.device("cpu")
NO_IDS = torch.tensor([], dtype=torch.int64)
SMALL = ["--device", "cpu", "--threads", "1", "--repeats", "2"]


def test_every_kind_of_rows_is_timed_by_every_variant(bench: Bench) -> None:
    found = bench("sampler", *SMALL, "--batch", "1", "9", "--vocab", "300")
    assert [(one["rows"], one["vocab"], one["batch"], one["variant"]) for one in found["results"]] == [
        (rows, 300, batch, variant)
        for batch in (1, 9)
        for rows in ROW_KINDS
        for variant in ("fused", "static", "chain")
    ]
    for one in found["results"]:
        low, high = one["us_quartiles"]
        assert 0 < one["us_fastest"] <= low <= one["us_median"] <= high
        assert one["share_of_bandwidth"] == pytest.approx(
            one["floor_us"] / one["us_median"], rel=0.02, abs=1e-3
        )
        assert one["graph"] is False
    assert set(found["left_out"]) == {"compiled", "flashinfer"}
    assert found["environment"]["device"] == "cpu"
    assert found["settings"]["backend"] == "torch"


def test_ratios_are_of_the_medians_and_floors_of_the_bytes(bench: Bench) -> None:
    found = bench(
        "sampler", *SMALL, "--batch", "4", "--vocab", "256", "--rows", "pair_linear", "--dtype", "bfloat16"
    )
    medians = {one["variant"]: one["us_median"] for one in found["results"]}
    expected = {f"chain/{ours}": medians["chain"] / medians[ours] for ours in ("fused", "static")}
    assert found["ratios"] == {"pair_linear/256/4": pytest.approx(expected, rel=1e-2, abs=1e-3)}
    # The target and two assistants in bf16.
    bytes_read = 3 * 4 * 256 * 2
    per_us = found["environment"]["copy_gb_per_s"] * 1e3
    assert [one["floor_us"] for one in found["results"]] == [pytest.approx(bytes_read / per_us, abs=1e-3)] * 3


def test_the_rotation_is_larger_than_caches_and_never_the_same_row_twice_in_a_batch() -> None:
    logits_NRV = rotated_logits(8, 5000, torch.float32, CPU)
    target_bytes = prod(logits_NRV[:, :8].shape) * 4
    assert target_bytes >= ROTATED_BYTES
    assert len(rotated_logits(8, 5000, torch.float32, CPU, at_most=3)) == 3
    assert len({tuple(row[:20].tolist()) for row in logits_NRV[0]}) == 24


def test_mixed_rows_are_all_kinds_in_turn() -> None:
    kinds = kinds_of_batch("mixed", 9)
    assert [kind.name for kind in kinds] == [*KINDS, *list(KINDS)[:2]]
    assert floor_bytes(kinds, 100, 4) == 400 * sum(kind.num_tensors for kind in kinds)


@pytest.mark.parametrize("name", list(KINDS))
def test_the_plain_chain_draws_from_the_distribution_of_the_fused_op(name: str) -> None:
    """So that what is timed is the same work: 4,000 draws of ours against the chain's probabilities."""
    vocab, draws, kind = 400, 4000, KINDS[name]
    logits_RV = rotated_logits(1, vocab, torch.float32, CPU, at_most=1)[0]
    history = History.random(1, vocab, CPU)
    b_BV, first_BV, second_BV = logits_RV[0:1], logits_RV[1:2], logits_RV[2:3]
    row = kind.row(0, 1, history)
    rows = [row] if kind.temperature == 0.0 else [replace(row, position=n) for n in range(draws)]
    tokens = fused_sample(logits_RV, rows, vocab_size=vocab, protected_ids=NO_IDS).token_ids_B
    if kind.temperature == 0.0:
        assert tokens.tolist() == sampler_chain.draw(kind, b_BV, first_BV, second_BV, history).tolist()
        return
    probs_BV, ids_BV = sampler_chain.probabilities(kind, b_BV, first_BV, second_BV, history)
    expected_V = probs_BV[0] / probs_BV.sum()
    if ids_BV is not None:
        expected_V = torch.zeros(vocab).scatter(0, ids_BV[0], expected_V)
    counts_V = torch.bincount(tokens, minlength=vocab)
    assert (counts_V[expected_V == 0] == 0).all()
    # 400 equally likely tokens would differ from their frequencies by 0.13; so few kinds of token differ by less.
    assert (counts_V / draws - expected_V).abs().sum() / 2 < 0.1
    drawn = sampler_chain.draw(kind, b_BV, first_BV, second_BV, history)
    assert expected_V[drawn] > 0


def test_the_chain_of_mixed_rows_draws_for_all_of_them() -> None:
    history = History.random(9, 50, CPU)
    logits_NRV = rotated_logits(9, 50, torch.float32, CPU, at_most=2)
    case = sampler_variants.case_of("mixed", 9, logits_NRV, history)
    call, _ = sampler_variants._call("chain", case)
    drawn = call(logits_NRV[0])
    assert isinstance(drawn, list)
    assert sum(len(tokens) for tokens in drawn) == 9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where its compiler is imported
def test_the_compiled_chain_is_timed_where_it_is_named(bench: Bench) -> None:
    found = bench(
        "sampler", *SMALL, "--batch", "2", "--vocab", "300", "--rows", "subtract", "--variants", "static", "compiled"
    )  # fmt: skip
    assert [one["variant"] for one in found["results"]] == ["static", "compiled"]
    assert set(found["ratios"]["subtract/300/2"]) == {"compiled/static"}


def fake_flashinfer(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., torch.Tensor]) -> None:
    package, sampling = ModuleType("flashinfer"), ModuleType("flashinfer.sampling")
    for name, function in functions.items():
        setattr(sampling, name, function)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", sampling)


def test_flashinfer_is_asked_for_what_its_rows_need(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def both(logits, top_k, top_p, indices=None, filter_apply_order="top_k_first"):
        asked.append(("both", top_k, top_p))
        return logits.argmax(-1)

    def nucleus(probs, top_p, indices=None):
        asked.append(("nucleus", float(probs.sum()), top_p))
        return probs.argmax(-1)

    def free(logits, indices=None):
        asked.append(("free",))
        return logits.argmax(-1)

    fake_flashinfer(
        monkeypatch,
        top_k_top_p_sampling_from_logits=both,
        top_p_sampling_from_probs=nucleus,
        sampling_from_logits=free,
    )
    assert sampler_variants.missing("flashinfer", torch.device("cuda")) is None
    assert "CUDA" in str(sampler_variants.missing("flashinfer", CPU))
    logits_NRV, history = rotated_logits(1, 50, torch.float32, CPU, at_most=1), History.random(1, 50, CPU)
    for name in ("top-k-top-p", "relu_difference", "draw"):
        call, is_recordable = sampler_variants._call(
            "flashinfer", sampler_variants.case_of(name, 1, logits_NRV, history)
        )
        call(logits_NRV[0])
        assert is_recordable
    assert asked == [("both", 50, 0.95), ("nucleus", pytest.approx(1.0), 0.95), ("free",)]
    greedy = sampler_variants.case_of("greedy", 1, logits_NRV, history)
    assert not sampler_variants.can_draw("flashinfer", greedy)


def test_a_flashinfer_with_other_functions_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(probs, uniform_samples, top_k, top_p):
        raise AssertionError("not to be called")

    fake_flashinfer(monkeypatch, top_k_top_p_sampling_from_logits=old)
    assert "top_k_top_p_sampling_from_logits" in str(
        sampler_variants.missing("flashinfer", torch.device("cuda"))
    )
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", None)
    assert "cannot be imported" in str(sampler_variants.missing("flashinfer", torch.device("cuda")))


def test_head_is_timed_whole_and_late(bench: Bench) -> None:
    found = bench("sampler", *SMALL, "--head", "--width", "16", "--batch", "1", "3", "--vocab", "400")
    assert [(one["rows"], one["batch"]) for one in found["results"]] == [
        (rows, batch) for rows in ("subtract", "relu_difference") for batch in (1, 3)
    ]
    for one in found["results"]:
        ratio = one["late_ms_median"] / one["whole_ms_median"]
        assert one["late/whole"] == pytest.approx(ratio, rel=0.02, abs=2e-3)
    assert set(found["crossovers"]) == {"subtract/400", "relu_difference/400"}


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([0.5, 0.9], "late is faster at every"),
        ([1.5, 1.9], "whole is faster at every"),
        ([0.5, 0.9, 1.2], "late is faster up to batch 2, whole from batch 3 on"),
        ([1.1, 0.9, 0.8], "whole is faster up to batch 1, late from batch 2 on"),
        ([1.1, 0.9, 1.2], "too noisy"),
    ],
)
def test_a_crossover_is_said_in_words(ratios: list[float], words: str) -> None:
    results = [{"batch": batch, "late/whole": ratio} for batch, ratio in enumerate(ratios, start=1)]
    assert words in sampler_head.crossover(results)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--batch", "0"], "--batch must be"),
        (["--batch", "100000"], "--batch must be"),
        (["--vocab", "1"], "--vocab must be"),
        (["--repeats", "0"], "--repeats must be"),
        (["--threads", "0"], "--threads must be"),
        (["--device", "mars"], "--device must be"),
        (["--device", "meta"], "no device 'meta'"),
        (["--device", "cpu", "--variants", "flashinfer"], "nothing to time"),
        (["--head", "--rows", "greedy"], "--head needs --rows"),
        (["--head", "--width", "0"], "--width must be"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "sampler", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_rows_are_what_their_kind_says() -> None:
    history = History.random(3, 50, CPU)
    row = KINDS["pair_linear"].row(1, 3, history)
    assert isinstance(row, SampleRow)
    assert (row.row_b, row.terms[0].row_q, row.terms[0].row_p, row.top_p) == (1, 4, 7, 0.95)
    assert KINDS["penalties"].row(2, 3, history).output_ids.tolist() == history.output_BL[2].tolist()
