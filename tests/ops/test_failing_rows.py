"""What ops refuses, and rows that are no longer numbers: each ends its own row and never falls back to the target."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from types import SimpleNamespace

import pytest
import torch
from uld_kernels import LateRows, SampleRow, Term, fused_sample, fused_score, ops, rules, sampler_triton

NONE = torch.tensor([], dtype=torch.int64)
RANK = Term(rules.PAIR_RANK, 1.0, 4, row_q=1, row_p=2, rank_k=2)
LINEAR = Term(rules.PAIR_LINEAR, 1.0, 5, row_q=1, row_p=2)
HUGE = Term(rules.SUBTRACT, 100.0, 6, row_a=1)
KEPT = replace(HUGE, filter_mode=rules.PLAUSIBILITY, tau=0.01, min_keep=4)
CUDA = torch.device("cuda")


def three_rows(*, q: float = 1.0) -> torch.Tensor:
    """fp64, which takes rows one after the other."""
    return torch.tensor([[3.0, 2.0, 1.0, 0.0], [q, 0.0, 2.0, 1.0], [0.0, 1.0, 1.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("term", "value", "status"),
    [
        (RANK, 1.0, rules.OK),
        (RANK, inf, rules.OK),  # the order is known all the same
        (RANK, nan, rules.NUMERICAL),
        (LINEAR, 1.0, rules.OK),
        (LINEAR, -inf, rules.OK),
        (LINEAR, inf, rules.NUMERICAL),
        (LINEAR, nan, rules.NUMERICAL),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pair_that_is_no_number_on_a_banned_token_ends_its_row(
    term: Term, value: float, status: int, dtype: torch.dtype
) -> None:
    row = SampleRow(row_b=0, terms=(term,), temperature=0.0, banned_ids=torch.tensor([0]))
    logits = three_rows(q=value).to(dtype)
    found = fused_sample(logits, [row, SampleRow(row_b=0)], vocab_size=4, protected_ids=NONE)
    assert found.status_B.tolist() == [status, rules.OK]
    assert (found.token_ids_B[0].item() == -1) == (status != rules.OK)


@pytest.mark.parametrize(
    ("term", "dtype", "value"),
    [(HUGE, torch.float64, -1e308), (HUGE, torch.float32, -3e38), (KEPT, torch.float32, -3e38)],
)
def test_scores_that_overflow_end_their_row_however_they_are_asked_for(
    term: Term, dtype: torch.dtype, value: float
) -> None:
    logits = three_rows().to(dtype)
    logits[1, 2] = value
    rows = [SampleRow(row_b=0, terms=(term,), num_logprobs=1), SampleRow(row_b=0, temperature=0.0)]
    drawn = fused_sample(logits, rows, vocab_size=4, protected_ids=NONE)
    whole = ops.fused_scores(logits, rows, vocab_size=4, protected_ids=NONE)
    assert drawn.status_B.tolist() == whole.status_B.tolist() == [rules.NUMERICAL, rules.OK]
    assert drawn.token_ids_B.tolist() == [-1, 0]
    assert whole.scores_BV[0].tolist() == [-inf] * 4


def test_a_late_row_is_read_whole_where_a_rule_ranks_all_tokens() -> None:
    late = LateRows(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 2.0]]))
    row = SampleRow(row_b=0, terms=(RANK,), temperature=0.0)
    logits = three_rows().float()
    for given, rest in ((logits, None), (logits[:1], late)):
        out = ops.fused_scores(given, [row], vocab_size=4, protected_ids=NONE, late=rest)
        assert out.scores_BV.tolist() == [[3.0, -inf, 1.0, -inf]]


def test_rows_outside_the_logits_are_refused() -> None:
    logits, late = torch.zeros(2, 4), LateRows(torch.zeros(1, 3), torch.zeros(4, 3), None)
    reads_2 = SampleRow(row_b=0, terms=(Term(rules.SUBTRACT, 1.0, 1, row_a=2),))
    fused_sample(logits, [reads_2], vocab_size=4, protected_ids=NONE, late=late)
    with pytest.raises(ValueError, match="row 2 is outside the 2 rows"):
        fused_sample(logits, [reads_2], vocab_size=4, protected_ids=NONE)
    with pytest.raises(ValueError, match="row 2 is late"):
        fused_sample(logits, [SampleRow(row_b=2)], vocab_size=4, protected_ids=NONE, late=late)
    with pytest.raises(ValueError, match="row 3 is outside the 3 rows"):
        fused_sample(logits, [SampleRow(row_b=3)], vocab_size=4, protected_ids=NONE, late=late)


@pytest.mark.parametrize("vocab_size", [0, -1, 5])
def test_a_vocabulary_that_does_not_fit_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match="does not fit logits of width 4"):
        fused_sample(torch.zeros(1, 4), [SampleRow(row_b=0)], vocab_size=vocab_size, protected_ids=NONE)


@pytest.mark.parametrize("targets", [[4], [-1], [0, 0], []])
def test_targets_outside_the_vocabulary_are_refused(targets: list[int]) -> None:
    ids = torch.tensor(targets, dtype=torch.int64)
    with pytest.raises(ValueError, match="target id"):
        fused_score(torch.zeros(1, 4), [SampleRow(row_b=0)], ids, vocab_size=4, protected_ids=NONE)


@pytest.mark.parametrize(
    ("device", "dtype", "is_proven", "is_late_proven", "asks", "verdict"),
    [
        ("cpu", torch.float32, True, True, torch.float32, False),
        ("cuda", torch.float64, True, True, torch.float32, False),
        ("cuda", torch.float32, False, True, None, False),
        ("cuda", torch.float32, True, False, None, True),
        ("cuda", torch.float32, True, False, torch.float32, False),
        ("cuda", torch.float32, True, True, torch.float32, True),
        ("cuda", torch.float32, False, True, torch.float32, False),
    ],
)
def test_kernels_are_used_only_where_they_are_proven(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    is_proven: bool,
    is_late_proven: bool,
    asks: torch.dtype | None,
    verdict: bool,
) -> None:
    monkeypatch.setattr(ops.trial, "verdict", lambda *_: SimpleNamespace(is_proven=is_proven))
    monkeypatch.setattr(ops.trial, "late_verdict", lambda *_: SimpleNamespace(is_proven=is_late_proven))
    assert ops.prove(torch.device(device), 4, dtype=dtype, head_dtype=asks) is verdict


@pytest.mark.parametrize("is_late_proven", [True, False])
def test_late_rows_are_whole_for_kernels_that_have_not_been_proven_on_them(
    monkeypatch: pytest.MonkeyPatch, is_late_proven: bool
) -> None:
    seen: list[tuple[torch.Tensor, LateRows | None]] = []

    def launched(logits_RV: torch.Tensor, *_: object, late: LateRows | None, **__: object) -> str:
        seen.append((logits_RV, late))
        return "launched"

    monkeypatch.setattr(ops, "prove", lambda *_, head_dtype=None, **__: head_dtype is None or is_late_proven)
    monkeypatch.setattr(sampler_triton, "sample", launched)
    monkeypatch.setattr(sampler_triton, "score", launched)
    logits = torch.zeros(1, 2, dtype=torch.bfloat16)
    late = LateRows(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None)
    rows, given = [SampleRow(row_b=0)], {"vocab_size": 2, "protected_ids": NONE}
    assert ops.fused_sample(logits, rows, late=late, **given) == "launched"
    assert ops.fused_score(logits, rows, torch.tensor([1]), late=late, **given) == "launched"
    assert ops.fused_sample(logits, rows, **given) == "launched"
    for got, got_late in seen[:2]:
        if is_late_proven:
            assert got is logits
            assert got_late is late
        else:
            assert got.tolist() == [[0.0, 0.0], [1.0, 3.0], [2.0, 4.0]]
            assert got_late is None
    assert seen[2] == (logits, None)
