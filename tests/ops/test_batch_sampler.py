"""Rows drawn at once against the same rows drawn one by one, whatever else is in the call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uld_kernels import LateRows, SampleOutput, SampleRow, Term, fused_sample, listed_products, rules
from uld_kernels.batch_sampler import Batch, sample_batch
from uld_kernels.columns import Columns
from uld_kernels.logit_groups import Found, containing_largest
from uld_kernels.lottery import draw_few
from uld_kernels.noise import Stream

DIM, NUM_ROWS = 24, 6
PROTECTED = torch.tensor([0, 17])


def term(row: int, *, strength: float, tau: float, protect: bool = False) -> Term:
    return Term(
        rules.RELU_DIFFERENCE,
        strength,
        digest=row,
        row_a=row,
        filter_mode=rules.FUSED,
        tau=tau,
        protect=protect,
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, LateRows, int]:
    """Rows of logits, flat to certain, the last NUM_ROWS of them assistants near the targets; late ones too."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    vocab_size = draw(st.sampled_from([41, 256, 700, 5003]))
    width = vocab_size + draw(st.sampled_from([0, 5, 256]))
    weight_WD = torch.randn(width, DIM, generator=generator).bfloat16()
    hidden_RD = torch.randn(NUM_ROWS, DIM, generator=generator)
    near = hidden_RD + draw(st.sampled_from([0.05, 0.5])) * torch.randn(NUM_ROWS, DIM, generator=generator)
    spread = draw(st.sampled_from([0.01, 0.3, 1.0, 4.0]))
    logits = spread * (torch.cat([hidden_RD, near]) @ weight_WD.float().T)
    if draw(st.booleans()):
        logits = logits.round()  # ties
    if draw(st.booleans()):
        logits[1, torch.rand(width, generator=generator) < 0.5] = -torch.inf
    return logits, LateRows(spread * near, weight_WD, torch.randn(width, generator=generator)), vocab_size


@st.composite
def sample_rows(draw: st.DrawFn) -> SampleRow:
    row_b, kind = (
        draw(st.integers(0, NUM_ROWS - 1)),
        draw(st.sampled_from(["plain", "whole", "late", "both"])),
    )
    shape = {
        "strength": draw(st.sampled_from([0.3, 1.5, 40.0])),
        "tau": draw(st.sampled_from([0.02, 0.5, 1.0])),
        "protect": draw(st.booleans()),
    }
    chosen = {"plain": (), "whole": (NUM_ROWS,), "late": (2 * NUM_ROWS,), "both": (NUM_ROWS, 2 * NUM_ROWS)}[
        kind
    ]
    return SampleRow(
        row_b,
        tuple(term(first + row_b, **shape) for first in chosen),
        temperature=draw(st.sampled_from([0.0, 0.0, 1e-5, 0.7, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 3])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1])),
        seed=draw(st.integers(0, 2**64 - 1)),
        position=draw(st.integers(0, 2**32 - 1)),
        banned_ids=draw(st.none() | st.none() | st.just(torch.arange(0, 41, 2))),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.0])),
        output_ids=torch.tensor([3, 4, 4]),
        is_measured=draw(st.booleans()),
    )


def sample(logits: torch.Tensor, rows: list[SampleRow], late: LateRows, vocab_size: int) -> SampleOutput:
    return fused_sample(logits, rows, vocab_size=vocab_size, protected_ids=PROTECTED, late=late)


def tokens(output: SampleOutput) -> list[tuple[int, int, tuple[int, ...]]]:
    return list(zip(output.token_ids_B.tolist(), output.status_B.tolist(), output.digests, strict=True))


@settings(max_examples=150, deadline=None)
@given(problems(), st.lists(sample_rows(), min_size=1, max_size=8))
def test_rows_together_draw_what_each_draws_alone_and_what_a_measured_row_draws(
    problem: tuple[torch.Tensor, LateRows, int], rows: list[SampleRow]
) -> None:
    logits, late, vocab_size = problem
    together = tokens(sample(logits, rows, late, vocab_size))
    assert together == [tokens(sample(logits, [row], late, vocab_size))[0] for row in rows]
    one_by_one = [replace(row, is_measured=True) for row in rows]
    assert together == tokens(sample(logits, one_by_one, late, vocab_size))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_but_rare_rows_are_drawn_at_once(temperature: float) -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    late = LateRows(torch.randn(1, DIM), torch.randn(300, DIM))
    few = SampleRow(0, temperature=temperature, is_measured=False)
    hushed = replace(few, terms=(term(2, strength=1.0, tau=0.02),))
    common = [
        few,
        replace(few, is_measured=True),
        replace(few, presence_penalty=1.0),
        replace(few, banned_ids=torch.tensor([1])),
        replace(few, num_logprobs=1, top_p=0.9),
        hushed,
        replace(hushed, top_p=0.9),
        replace(few, terms=(term(2, strength=1.0, tau=0.02, protect=True),)),
    ]
    rare = [
        replace(few, terms=(Term(rules.SUBTRACT, 1.0, digest=1, row_a=1),)),
        replace(few, terms=(Term(rules.SUBTRACT, 1.0, 1, row_a=2, filter_mode=rules.FUSED, tau=0.1),)),
    ]
    columns = Columns(common + rare)
    sample_batch(Batch(logits, common + rare, 300, PROTECTED, late), columns)
    assert sorted(columns.tokens) == list(range(len(common)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_a_number_ends_its_row_and_no_other(temperature: float, bad: float) -> None:
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(8, 700, generator=generator)
    logits = clean.clone()
    logits[1, 699] = bad  # a target, at a token that would not be drawn
    logits[6, int(logits[2].argmax())] = bad  # an assistant, at a token that is looked at
    late = LateRows(torch.randn(4, DIM, generator=generator), torch.randn(700, DIM, generator=generator))
    late.hidden_AD[3] = bad
    rows = [SampleRow(n, temperature=temperature, seed=n, is_measured=False) for n in range(3)]
    rows += [replace(row, terms=(term(4 + row.row_b, strength=2.0, tau=0.02),)) for row in rows]
    rows += [replace(rows[0], row_b=3, terms=(term(8 + n, strength=2.0, tau=0.02),)) for n in range(4)]
    output = sample(logits, rows, late, 700)
    wrong = {1, 4, 5, 9}
    expected = [rules.NUMERICAL if n in wrong else rules.OK for n in range(10)]
    assert output.status_B.tolist() == expected
    healthy = sample(clean, [row for n, row in enumerate(rows) if n not in wrong], late, 700)
    assert [token for n, token in enumerate(output.token_ids_B.tolist()) if n not in wrong] == (
        healthy.token_ids_B.tolist()
    )
    assert all(output.token_ids_B[n] == -1 for n in wrong)


def test_a_target_with_no_token_left_is_reported() -> None:
    logits = torch.full((2, 300), -torch.inf)
    logits[1, 5] = -50.0
    late = LateRows(torch.zeros(1, DIM), torch.zeros(300, DIM))
    rows = [SampleRow(n, temperature=t, is_measured=False) for n in range(2) for t in (0.0, 1.0)]
    rows += [replace(row, terms=(term(2, strength=1.0, tau=0.02),)) for row in rows]
    output = sample(logits, rows, late, 300)
    assert output.token_ids_B.tolist() == [-1, -1, 5, 5] * 2
    assert output.status_B.tolist() == [rules.NOTHING_KEPT] * 2 + [rules.OK] * 2 + (
        [rules.NOTHING_KEPT] * 2 + [rules.OK] * 2
    )


@pytest.mark.parametrize("dim", [8, 24, 100, 576, 2048])
def test_a_late_score_has_the_same_bits_whatever_else_is_scored(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    weight = torch.randn(300, dim, generator=generator).bfloat16()
    late = LateRows(torch.randn(5, dim, generator=generator).bfloat16(), weight)
    index, ids = (
        torch.randint(0, 5, (1100,), generator=generator),
        torch.randint(0, 300, (1100,), generator=generator),
    )
    together = late.scores_each(index, ids)
    for size in (1, 2, 7, 64, 600):
        for start in (0, 3, 500):
            part = slice(start, start + size)
            assert torch.equal(late.scores_each(index[part], ids[part]), together[part])
    exact = (weight.double()[ids] * late.hidden_AD.double()[index]).sum(-1)
    torch.testing.assert_close(together.double(), exact, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dim", [1, 3, 24, 576, 2049])
def test_sums_of_copies_have_the_same_bits_whatever_else_is_summed(dim: int, device: str) -> None:
    generator = torch.Generator().manual_seed(dim)
    left, right = (torch.randn(count, dim, generator=generator).to(device) for count in (5, 300))
    index, ids = (torch.randint(0, most, (1100,), generator=generator).to(device) for most in (5, 300))
    together = listed_products._by_copies(left, index, right, ids)
    for size in (1, 2, 7, 64, 600):
        for part in (slice(start, start + size) for start in (0, 3, 500)):
            alone = listed_products._by_copies(left, index[part], right, ids[part])
            assert torch.equal(alone, together[part])
    exact = (right.double()[ids] * left.double()[index]).sum(-1)
    torch.testing.assert_close(together.double(), exact, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 32, 256])
@pytest.mark.parametrize("size", [40, 700, 49_152, 49_171])
def test_a_search_for_the_largest_loses_none_of_them_and_none_equal_to_them(k: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size + k)
    for values in (
        torch.randn(size, generator=generator),
        torch.randint(0, 9, (size,), generator=generator).float(),
    ):
        k_or_all = min(k, size)
        kth = values.topk(k_or_all).values[-1]
        found = containing_largest(values, k)
        assert torch.equal(found[found >= kth], values[values >= kth])


@pytest.mark.parametrize("limits", [{"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.5}])
def test_top_k_top_p_and_min_p_hold_for_rows_drawn_at_once(limits: dict[str, float]) -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(5))
    late = LateRows(torch.zeros(1, DIM), torch.zeros(300, DIM))
    terms = (term(1, strength=1.0, tau=0.02),)
    row = SampleRow(0, terms, temperature=2.0, is_measured=False)
    rows = [replace(row, seed=seed, **(limits if seed % 2 else {})) for seed in range(200)]
    together = tokens(sample(logits, rows, late, 300))
    assert together == tokens(sample(logits, [replace(row, is_measured=True) for row in rows], late, 300))
    assert len(set(together[1::2])) < len(set(together[::2]))


def test_a_row_that_fails_leaves_its_neighbours_alone() -> None:
    """A truncated row whose assistant is NaN must not be left without a token: the next one's would move up."""
    z_RV = torch.full((6, 300), -30.0)
    z_RV[0, 10] = z_RV[0, 11] = 5.0  # keeps two
    z_RV[1, 200], z_RV[1, 11], z_RV[4, 11] = 9.0, 12.0, 50.0  # 11 is hushed
    z_RV[2, 50] = 5.0
    z_RV[5] = torch.nan

    def rows(is_measured: bool) -> list[SampleRow]:
        terms = [
            Term(
                kind=rules.RELU_DIFFERENCE, strength=1.0, digest=5, row_a=a, filter_mode=rules.FUSED, tau=0.02
            )
            for a in (3, 4, 5)
        ]
        plain = [SampleRow(row_b=b, terms=(terms[b],), seed=1 + b, is_measured=is_measured) for b in (0, 1)]
        return [*plain, SampleRow(row_b=2, terms=(terms[2],), min_p=0.1, seed=3, is_measured=is_measured)]

    none = torch.tensor([], dtype=torch.long)
    for order in ((0, 1, 2), (1, 2), (2, 0, 1), (1, 0, 0, 2)):
        outs = [
            fused_sample(z_RV, [rows(measured)[i] for i in order], vocab_size=300, protected_ids=none)
            for measured in (True, False)
        ]
        assert outs[0].token_ids_B.tolist() == outs[1].token_ids_B.tolist()
        assert outs[0].status_B.tolist() == outs[1].status_B.tolist()
        assert [s == rules.NUMERICAL for s in outs[1].status_B.tolist()] == [i == 2 for i in order]


def test_no_row_draws_from_another_ones_tokens() -> None:
    found = Found(torch.tensor([0, 0, 2]), torch.tensor([10, 11, 12]), torch.zeros(3))
    with pytest.raises(RuntimeError, match="no token"):
        draw_few(found, Stream.of([1, 2, 3], [0, 0, 0], torch.device("cpu")), temperature_N1=torch.ones(3, 1))


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [3, 3, 0, 0], [1, 2, 3, 0]])
def test_rows_in_another_order_than_their_logits_keep_their_own_candidates(order: list[int]) -> None:
    """As many rows as there are of logits, but not those in that order."""
    vocab_size = 2048
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(8, vocab_size, generator=generator)
    logits += torch.arange(8)[:, None] * 40.0
    filtered = {"filter_mode": rules.PLAUSIBILITY, "tau": 1e-6, "min_keep": 10}
    rows = [SampleRow(row, top_k=10, seed=row, num_logprobs=10) for row in order]
    rows += [
        SampleRow(row, (Term(rules.SUBTRACT, 0.1, 7, row_a=4 + row, **filtered),), num_logprobs=10)
        for row in order
    ]
    options = {"vocab_size": vocab_size, "protected_ids": torch.tensor([0])}
    together = fused_sample(logits, rows, **options)
    for number, row in enumerate(rows):
        alone = fused_sample(logits, [row], **options)
        for name in ("token_ids_B", "status_B", "num_kept_B", "top_ids_BN"):
            assert torch.equal(getattr(together, name)[number], getattr(alone, name)[0]), (number, name)
