"""Rows of all kinds in one call against each alone, and against the sampler that takes one row after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uld_kernels import (
    LateRows,
    SampleOutput,
    SampleRow,
    ScoreOutput,
    Term,
    fused_sample,
    fused_score,
    rules,
    sampler_reference,
)
from uld_kernels.batch_sampler import Batch, sample_batch
from uld_kernels.columns import Columns

DIM, TARGETS = 16, 5
A, Q, P, LATE = TARGETS, 2 * TARGETS, 3 * TARGETS, 4 * TARGETS
"""First rows of assistants, of both halves of pairs, and of late assistants; one of each for every target."""


@contextmanager
def one_after_the_other() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_reference, "sample_batch", lambda *_: None)
        patch.setattr(sampler_reference, "score_batch", lambda *_: None)
        yield


def streams(
    seed: int, vocab_size: int, *, spread: float = 1.0, padding: int = 0
) -> tuple[torch.Tensor, LateRows]:
    generator = torch.Generator().manual_seed(seed)
    width = vocab_size + padding
    weight_WD = torch.randn(width, DIM, generator=generator).bfloat16()
    hidden = torch.randn(TARGETS, DIM, generator=generator)
    near = [hidden + 0.3 * torch.randn(TARGETS, DIM, generator=generator) for _ in range(4)]
    logits = spread * (torch.cat([hidden, *near[:3]]) @ weight_WD.float().T)
    return logits, LateRows(spread * near[3], weight_WD, torch.randn(width, generator=generator))


def terms_of(kind: str, row: int, *, strength: float = 1.5, protect: bool = False) -> tuple[Term, ...]:
    relu = Term(rules.RELU_DIFFERENCE, strength, 1, row_a=A + row, filter_mode=rules.FUSED, tau=0.02)
    subtract = Term(
        rules.SUBTRACT, strength, 2, row_a=A + row, filter_mode=rules.PLAUSIBILITY, tau=0.01, min_keep=32,
        protect=protect,
    )  # fmt: skip
    pair = Term(
        rules.PAIR_LINEAR, strength, 3, row_q=Q + row, row_p=P + row, filter_mode=rules.FUSED, tau=0.02
    )
    rank = replace(pair, kind=rules.PAIR_RANK, rank_k=7, digest=4, protect=protect)
    return {
        "plain": (),
        "relu": (replace(relu, protect=protect),),
        "late relu": (replace(relu, row_a=LATE + row, dead_zone=0.3),),
        "subtract": (subtract,),
        "late subtract": (replace(subtract, row_a=LATE + row, tau=0.5),),
        "official": (replace(subtract, filter_mode=rules.OFFICIAL, tau=0.1),),
        "unfiltered": (Term(rules.SUBTRACT, strength, 5, row_a=A + row),),
        "pair": (replace(pair, protect=protect),),
        "rank": (rank,),
        "two relus": (relu, replace(relu, row_a=Q + row, tau=0.3, digest=6, dead_zone=0.2)),
        "subtract and relu": (subtract, replace(relu, row_a=LATE + row)),
        "subtract and pair": (subtract, pair),
        "subtract behind fused": (replace(subtract, filter_mode=rules.FUSED, tau=0.1),),
    }[kind]


KINDS = [
    "plain", "relu", "late relu", "subtract", "late subtract", "official", "unfiltered", "pair", "rank", "two relus",
    "subtract and relu", "subtract and pair", "subtract behind fused",
]  # fmt: skip


@st.composite
def sample_rows(draw: st.DrawFn, vocab_size: int) -> SampleRow:
    row = draw(st.integers(0, TARGETS - 1))
    terms = terms_of(
        draw(st.sampled_from(["plain", *KINDS])), row, strength=draw(st.sampled_from([0.5, 3.0])),
        protect=draw(st.booleans()),
    )  # fmt: skip
    ids = st.lists(st.integers(0, vocab_size - 1), max_size=9).map(
        lambda each: torch.tensor(each, dtype=torch.int64)
    )
    biased = torch.tensor(
        sorted(draw(st.sets(st.integers(0, vocab_size - 1), max_size=4))), dtype=torch.int64
    )
    rarely = st.sampled_from([False, False, False, True])
    allowed = torch.rand(vocab_size, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.6
    return SampleRow(
        row,
        terms,
        compose=draw(st.sampled_from([rules.COMPOSE_MAX, rules.COMPOSE_SUM])),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 0, 1, 5, 300])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.3])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05])),
        seed=draw(st.integers(0, 2**64 - 1)),
        position=draw(st.integers(0, 2**32 - 1)),
        repetition_penalty=1.3 if draw(rarely) else 1.0,
        presence_penalty=0.7 if draw(rarely) else 0.0,
        frequency_penalty=-0.4 if draw(rarely) else 0.0,
        prompt_ids=draw(ids),
        output_ids=draw(st.none() | ids),
        logit_bias=(biased, torch.linspace(-9.0, 9.0, len(biased))) if draw(rarely) else None,
        banned_ids=draw(ids) if draw(rarely) else None,
        allowed_mask=allowed if draw(rarely) else None,
        num_logprobs=draw(st.sampled_from([0, 0, 1, 5, 50])),
        is_measured=draw(st.booleans()),
    )


def sample(logits: torch.Tensor, rows: Sequence[SampleRow], late: LateRows, vocab_size: int) -> SampleOutput:
    protected = torch.tensor([0, vocab_size - 1]).unique()
    return fused_sample(logits, rows, vocab_size=vocab_size, protected_ids=protected, late=late)


def assert_equal(got: SampleOutput | ScoreOutput, expected: SampleOutput | ScoreOutput, row: int) -> None:
    """Of one row in `got` and of the only one in `expected`, bit for bit."""
    for name in got.__slots__:
        ours, theirs = getattr(got, name), getattr(expected, name)
        if name == "digests":
            assert ours[row] == theirs[0]
        else:
            ours = ours[row : row + 1, : theirs.shape[1]] if theirs.ndim == 2 else ours[row : row + 1]
            assert torch.equal(ours, theirs), name


def assert_near(got: SampleOutput, expected: SampleOutput) -> None:
    for name in ("token_ids_B", "status_B", "num_kept_B", "top_ids_BN", "argmax_changed_B"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name in ("logprob_B", "top_logprobs_BN", "kl_B"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=2e-6, rtol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.data(), st.sampled_from([1, 41, 300, 1271]), st.integers(0, 2**31), st.sampled_from([0.02, 0.5, 2.0])
)
def test_a_row_gives_the_same_bits_alone_and_beside_others_and_what_the_oracle_gives(
    data: st.DataObject, vocab_size: int, seed: int, spread: float
) -> None:
    logits, late = streams(seed, vocab_size, spread=spread, padding=data.draw(st.sampled_from([0, 9])))
    if data.draw(st.booleans()):
        logits[:, ::2] = logits[:, ::2].round()  # ties
    rows = data.draw(st.lists(sample_rows(vocab_size), min_size=1, max_size=7))
    together = sample(logits, rows, late, vocab_size)
    for number, row in enumerate(rows):
        assert_equal(together, sample(logits, [row], late, vocab_size), number)
    with one_after_the_other():
        expected = sample(logits, rows, late, vocab_size)
    # A row that nobody measures has no more to say than its token.
    silent = torch.tensor([not row.is_measured and row.num_logprobs == 0 for row in rows])
    for output in (together, expected):
        for name in ("logprob_B", "num_kept_B", "kl_B", "argmax_changed_B"):
            getattr(output, name)[silent] = 0
    assert_near(together, expected)


def test_at_a_real_vocabulary_all_kinds_together_are_each_alone_and_the_oracle() -> None:
    vocab_size = 49_152
    logits, late = streams(3, vocab_size)
    shapes: list[dict[str, float]] = [
        {}, {"temperature": 0.0}, {"top_p": 0.9, "num_logprobs": 4}, {"top_k": 40}, {"presence_penalty": 1.0},
    ]  # fmt: skip
    rows = [
        SampleRow(number % TARGETS, terms_of(kind, number % TARGETS, protect=number % 2 == 0), seed=number,
                  output_ids=torch.arange(9), **shape)  # type: ignore[arg-type]
        for number, (kind, shape) in enumerate((kind, shape) for kind in KINDS for shape in shapes)
    ]  # fmt: skip
    together = sample(logits, rows, late, vocab_size)
    assert (together.status_B == rules.OK).all()
    for number in range(0, len(rows), 4):
        assert_equal(together, sample(logits, [rows[number]], late, vocab_size), number)
    with one_after_the_other():
        assert_near(together, sample(logits, rows, late, vocab_size))


@pytest.mark.parametrize("vocab_size", [1, 41, 1271])
def test_given_tokens_score_the_same_alone_beside_others_and_in_the_oracle(vocab_size: int) -> None:
    logits, late = streams(5, vocab_size)
    protected = torch.tensor([0])
    rows = [
        SampleRow(number % TARGETS, terms_of(kind, number % TARGETS, protect=number % 2 == 0), num_logprobs=3)
        for number, kind in enumerate(KINDS * 3)
    ]
    targets = torch.randint(0, vocab_size, (len(rows),), generator=torch.Generator().manual_seed(1))
    targets[: TARGETS * 2] = logits[[row.row_b for row in rows[: TARGETS * 2]], :vocab_size].argmax(-1)
    options = {"vocab_size": vocab_size, "protected_ids": protected, "late": late}
    together = fused_score(logits, rows, targets, **options)
    for number, row in enumerate(rows):
        assert_equal(together, fused_score(logits, [row], targets[number, None], **options), number)
    with one_after_the_other():
        expected = fused_score(logits, rows, targets, **options)
    for name in ("rank_B", "status_B", "num_kept_B", "top_ids_BN", "argmax_changed_B"):
        assert torch.equal(getattr(together, name), getattr(expected, name)), name
    for name in ("logprob_B", "top_logprobs_BN", "kl_B"):
        torch.testing.assert_close(getattr(together, name), getattr(expected, name), atol=2e-6, rtol=2e-6)


# --- rows that fail --------------------------------------------------------------------------------------------


def _spoiled(logits: torch.Tensor, late: LateRows, how: str) -> SampleRow:
    """A row that has nothing to draw; its streams are the last target's, which nobody else reads."""
    last, vocab_size = TARGETS - 1, logits.shape[1]
    row = SampleRow(last, temperature=1.0, seed=9)
    if how == "NaN target":
        logits[last, vocab_size // 2] = torch.nan
    elif how == "infinite target":
        logits[last, 0] = torch.inf
    elif how == "empty target":
        logits[last] = -torch.inf
    elif how == "all banned":
        return replace(row, banned_ids=torch.arange(vocab_size))
    elif how == "nothing allowed":
        return replace(row, allowed_mask=torch.zeros(vocab_size, dtype=torch.bool))
    elif how == "infinite bias":
        return replace(row, logit_bias=(torch.arange(vocab_size), torch.full((vocab_size,), torch.inf)))
    else:
        for stream in (logits[A + last], logits[Q + last], logits[P + last], late.hidden_AD[last]):
            stream[:] = torch.nan if how == "NaN assistants" else -torch.inf
    return row


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how",
    ["NaN target", "infinite target", "empty target", "all banned", "nothing allowed", "infinite bias",
     "NaN assistants", "infinite assistants"],
)  # fmt: skip
def test_no_row_takes_the_tokens_of_one_that_fails(kind: str, how: str) -> None:
    vocab_size = 700
    clean, late = streams(7, vocab_size)
    shapes: list[dict[str, float]] = [
        {"top_p": 0.8},
        {"num_logprobs": 3},
        {"temperature": 0.0},
        {"min_p": 0.1},
    ]
    healthy = [
        SampleRow(number, terms_of(kind, number), seed=number, is_measured=False, **shape)  # type: ignore[arg-type]
        for number, shape in enumerate(shapes)
    ]
    expected = [sample(clean, [row], late, vocab_size) for row in healthy]
    logits = clean.clone()
    row = _spoiled(logits, late, how)
    if "assistants" in how and kind == "plain":
        return
    failing = [
        replace(row, terms=terms_of(kind, TARGETS - 1), is_measured=measured, **shape)  # type: ignore[arg-type]
        for measured in (False, True)
        for shape in shapes
    ]
    for rows in (
        [*failing, *healthy],
        [*healthy, *failing],
        [each for pair in zip(failing, healthy, strict=False) for each in pair],
        [failing[0], *healthy, failing[-1]],
    ):
        output = sample(logits, rows, late, vocab_size)
        for number, each in enumerate(rows):
            if each in healthy:
                assert_equal(output, expected[healthy.index(each)], number)
            else:
                assert output.status_B[number] != rules.OK
                assert output.token_ids_B[number] == -1
                assert output.logprob_B[number] == -torch.inf


@pytest.mark.parametrize("kind", KINDS)
def test_a_lane_of_failing_rows_alone_draws_nothing(kind: str) -> None:
    logits, late = streams(8, 41)
    logits[:TARGETS] = torch.nan
    rows = [SampleRow(number, terms_of(kind, number), seed=number) for number in range(TARGETS)]
    output = sample(logits, rows, late, 41)
    assert output.token_ids_B.tolist() == [-1] * TARGETS
    assert output.status_B.tolist() == [rules.NUMERICAL] * TARGETS


def test_common_kinds_are_drawn_together() -> None:
    logits, late = streams(9, 1271)
    rare = {"unfiltered", "subtract and pair"}
    rows = [SampleRow(0, terms_of(kind, 0), top_k=5, num_logprobs=2) for kind in KINDS]
    columns = Columns(rows)
    sample_batch(Batch(logits, rows, 1271, torch.tensor([0]), late), columns)
    assert [kind for number, kind in enumerate(KINDS) if number not in columns.tokens] == sorted(
        rare, key=KINDS.index
    )
