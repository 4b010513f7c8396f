"""Late assistants on the Triton sampler: scored on lists, equal to the same assistants scored whole in fp64."""

from __future__ import annotations

import os
from dataclasses import replace
from math import nan

import pytest
import torch
from test_sampler_triton import DEVICE, IS_INTERPRETED, on_host, protected
from uld_kernels import (
    LateRows,
    SampleOutput,
    SampleRow,
    SampleShape,
    Term,
    rules,
    sampler_reference,
    sampler_triton,
    trial,
)
from uld_kernels.late import LATE_BY_SCORE, LATE_BY_TARGET, NOT_LATE, late_list_of
from uld_kernels.sampler_triton import TritonSampler

assert (os.environ.get("TRITON_INTERPRET") == "1") == IS_INTERPRETED
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if not IS_INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

WIDTH = 24
NUM_WHOLE = 4
NEAR, FAR, VERY_FAR, OTHER = range(NUM_WHOLE, NUM_WHOLE + 4)
PLAUSIBLE = {"filter_mode": rules.PLAUSIBILITY, "tau": 0.01, "min_keep": 12}
FUSED = {"filter_mode": rules.FUSED, "tau": 0.02}
HUSH = Term(rules.SUBTRACT, 0.75, 1, row_a=NEAR, **PLAUSIBLE)
HUSH_PROTECT = replace(HUSH, digest=2, row_a=FAR, protect=True)
RELU = Term(rules.RELU_DIFFERENCE, 1.0, 3, row_a=FAR, **FUSED)
RELU_PROTECT = replace(RELU, digest=4, row_a=NEAR, protect=True, dead_zone=0.4)
RELU_DEEP = replace(RELU, digest=5, row_a=VERY_FAR, dead_zone=2.0)
RELU_PLAUSIBLE = Term(rules.RELU_DIFFERENCE, 2.0, 6, row_a=FAR, **PLAUSIBLE)
WHOLE = replace(RELU, digest=7, row_a=1)
OFFICIAL = Term(rules.SUBTRACT, 0.8, 8, row_a=NEAR, filter_mode=rules.OFFICIAL, tau=0.1)
ON_LISTS = [
    (HUSH,),
    (HUSH_PROTECT,),
    (RELU,),
    (RELU_PROTECT,),
    (RELU_DEEP,),
    (RELU_PLAUSIBLE, RELU_PROTECT),
    (RELU, RELU_PROTECT),
    (WHOLE, RELU),
    (OFFICIAL,),
]
# What needs an assistant's whole vocabulary: no filter, a filter on scores that can rise, normalisers, pairs.
UNLISTED = [
    (Term(rules.SUBTRACT, 0.5, 11, row_a=NEAR),),
    (Term(rules.SUBTRACT, 0.5, 12, row_a=NEAR, **FUSED),),
    (HUSH, RELU),
    (Term(rules.PAIR_LINEAR, 0.7, 13, row_q=1, row_p=OTHER, **PLAUSIBLE),),
]
COMPOSITIONS = [(), (WHOLE,), *ON_LISTS, *UNLISTED]


def streams(
    vocab_size: int, *, head_dtype: torch.dtype = torch.float32, seed: int = 0, has_bias: bool = False
) -> tuple[torch.Tensor, LateRows]:
    """Four rows of logits and four late ones: near the first target; hushing what it likes; far down; another one."""
    generator = torch.Generator().manual_seed(1000 * seed + vocab_size)
    weight = torch.randn(vocab_size, WIDTH, generator=generator).to(head_dtype)
    hidden = torch.randn(NUM_WHOLE + 1, WIDTH, generator=generator) * 3 / WIDTH**0.5
    near = hidden[0] + 0.3 * torch.randn(WIDTH, generator=generator) / WIDTH**0.5
    late = torch.stack([near, 1.4 * hidden[0], 1.9 * hidden[0] + 0.2 * hidden[4], hidden[4]]).to(head_dtype)
    bias = torch.randn(vocab_size, generator=generator) if has_bias else None
    logits = hidden[:NUM_WHOLE] @ weight.float().T
    return logits.to(DEVICE), LateRows(
        late.to(DEVICE), weight.to(DEVICE), None if bias is None else bias.to(DEVICE)
    )


def whole(logits_RV: torch.Tensor, late: LateRows) -> torch.Tensor:
    """All streams in fp64, the late ones from the same head."""
    scores = late.hidden_AD.double() @ late.weight_WD.double().T
    if late.bias_W is not None:
        scores = scores + late.bias_W.double()
    return torch.cat([logits_RV.double(), scores]).cpu()


def assert_same_as_whole(
    logits_RV: torch.Tensor, late: LateRows, rows: list[SampleRow], *, vocab_size: int
) -> SampleOutput:
    ids = protected(vocab_size)
    ours = sampler_triton.sample(logits_RV, rows, vocab_size=vocab_size, protected_ids=ids, late=late)
    host_rows = [on_host(row) for row in rows]
    exact = sampler_reference.sample(
        whole(logits_RV, late), host_rows, vocab_size=vocab_size, protected_ids=ids.cpu()
    )
    assert ours.status_B.tolist() == exact.status_B.tolist()
    assert ours.token_ids_B.tolist() == exact.token_ids_B.tolist()
    assert ours.num_kept_B.tolist() == exact.num_kept_B.tolist()
    assert ours.argmax_changed_B.tolist() == exact.argmax_changed_B.tolist()
    assert ours.top_ids_BN.tolist() == exact.top_ids_BN.tolist()
    assert ours.digests == exact.digests
    torch.testing.assert_close(ours.logprob_B.cpu(), exact.logprob_B, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.top_logprobs_BN.cpu(), exact.top_logprobs_BN, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.kl_B.cpu(), exact.kl_B, rtol=1e-4, atol=2e-5)
    return ours


def drawn(logits_RV: torch.Tensor, late: LateRows, rows: list[SampleRow], vocab_size: int) -> SampleOutput:
    return sampler_triton.sample(
        logits_RV, rows, vocab_size=vocab_size, protected_ids=protected(vocab_size), late=late
    )


@pytest.mark.parametrize(
    "vocab_size", [1, 41, *(pytest.param(size, marks=pytest.mark.slow) for size in (129, 1271))]
)
def test_late_whole_and_plain_rows_mix_in_one_batch(vocab_size: int) -> None:
    rows = [
        SampleRow(number % 2 * 2, terms, temperature=number % 3 / 2, seed=5, position=number, num_logprobs=2)
        for number, terms in enumerate(COMPOSITIONS[:5] if vocab_size == 1 else COMPOSITIONS)
    ]
    assert_same_as_whole(*streams(vocab_size), rows, vocab_size=vocab_size)


@pytest.mark.parametrize("head_dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_heads_of_halves_with_a_bias(head_dtype: torch.dtype) -> None:
    rows = [SampleRow(0, terms, seed=3, position=number) for number, terms in enumerate(ON_LISTS[1:4])]
    logits_RV, late = streams(700, head_dtype=head_dtype, has_bias=True)
    assert_same_as_whole(logits_RV, late, rows, vocab_size=700)


@pytest.mark.parametrize(
    "terms",
    [
        (HUSH_PROTECT,),
        pytest.param((RELU_DEEP,), marks=pytest.mark.slow),
        (RELU, RELU_PROTECT),
    ],
)
def test_sampling_parameters_meet_late_rows(terms: tuple[Term, ...]) -> None:
    vocab_size = 129
    ids = torch.tensor([1, 5, 5, 8, 30], device=DEVICE)
    few, mask = ids.unique(), torch.arange(vocab_size, device=DEVICE) % 3 != 1
    logits_RV, late = streams(vocab_size)
    bias = few, torch.full((len(few),), 4.0, device=DEVICE)
    kinds = [
        SampleRow(0, top_k=3, top_p=0.8),
        SampleRow(0, min_p=0.1, temperature=1.7),
        SampleRow(0, repetition_penalty=1.3, presence_penalty=0.4, output_ids=ids, prompt_ids=few),
        SampleRow(0, logit_bias=bias, frequency_penalty=0.3, output_ids=ids, num_logprobs=4),
        SampleRow(0, banned_ids=few, allowed_mask=mask),
        SampleRow(0, terms, compose=rules.COMPOSE_SUM),
        # All but one token banned; all banned.
        SampleRow(0, banned_ids=torch.arange(1, vocab_size, device=DEVICE), num_logprobs=2),
        SampleRow(0, banned_ids=torch.arange(vocab_size, device=DEVICE)),
    ]
    rows = [replace(row, terms=terms, seed=9, position=number) for number, row in enumerate(kinds)]
    output = assert_same_as_whole(logits_RV, late, rows, vocab_size=vocab_size)
    assert output.num_kept_B.tolist()[6] == 1
    assert output.status_B.tolist()[-1] == rules.NOTHING_KEPT


def test_the_strictest_filter_leaves_one_token() -> None:
    strict = [replace(RELU, tau=1.0), replace(HUSH, tau=1.0, min_keep=1)]
    rows = [SampleRow(0, (term,), seed=1, position=number) for number, term in enumerate(strict)]
    output = assert_same_as_whole(*streams(700), rows, vocab_size=700)
    assert output.num_kept_B.tolist() == [1, 1]


@pytest.mark.parametrize(
    "strength", [40.0, *(pytest.param(strength, marks=pytest.mark.slow) for strength in (0.3, 1.0))]
)
def test_a_fused_filter_looks_down_to_what_it_could_keep(strength: float) -> None:
    """An assistant that hushes the best tokens far down leaves ones that the first look does not see."""
    logits_RV, late = streams(1271)
    terms = [(replace(term, strength=strength),) for term in (RELU, RELU_DEEP, RELU_PROTECT)]
    rows = [SampleRow(0, one, seed=2, position=number) for number, one in enumerate(terms)]
    output = assert_same_as_whole(logits_RV, late, rows, vocab_size=1271)
    if strength == 40.0:
        token = output.token_ids_B[1]
        best = logits_RV[0].max()
        assert logits_RV[0, token] < best - 8.0, "found by no look but the last"


@pytest.mark.parametrize(
    "spoiled", [nan, *(pytest.param(value, marks=pytest.mark.slow) for value in (torch.inf, -torch.inf))]
)
def test_a_spoiled_late_row_ends_those_who_read_it_and_nobody_else(spoiled: float) -> None:
    vocab_size = 41
    logits_RV, late = streams(vocab_size)
    late.hidden_AD[FAR - NUM_WHOLE] = spoiled
    mixed = [(), *ON_LISTS[:4], (WHOLE, RELU), UNLISTED[0]]
    rows = [SampleRow(0, terms, seed=4, position=number) for number, terms in enumerate(mixed)]
    output = drawn(logits_RV, late, rows, vocab_size)
    reads = [any(term.row_a == FAR for term in row.terms) for row in rows]
    assert [status == rules.NUMERICAL for status in output.status_B.tolist()] == reads
    assert [token == -1 for token in output.token_ids_B.tolist()] == reads
    healthy = [row for row, is_spoiled in zip(rows, reads, strict=True) if not is_spoiled]
    alone = drawn(*streams(vocab_size), healthy, vocab_size)
    kept = torch.tensor([not is_spoiled for is_spoiled in reads], device=DEVICE)
    assert torch.equal(output.token_ids_B[kept], alone.token_ids_B)


def test_a_spoiled_target_ends_a_late_row() -> None:
    logits_RV, late = streams(129)
    logits_RV[0, 7] = nan
    rows = [SampleRow(0, terms, seed=4) for terms in ((HUSH_PROTECT,), (RELU_PROTECT,))]
    output = drawn(logits_RV, late, [*rows, SampleRow(1, (RELU,), seed=4)], 129)
    assert output.status_B.tolist() == [rules.NUMERICAL] * len(rows) + [rules.OK]


def test_a_late_row_has_the_same_bits_alone_and_beside_others() -> None:
    vocab_size = 300
    logits_RV, late = streams(vocab_size, head_dtype=torch.bfloat16)
    rows = [SampleRow(0, terms, seed=6, position=number) for number, terms in enumerate([(), *ON_LISTS[1:4]])]
    together = drawn(logits_RV, late, rows, vocab_size)
    for number in range(4):
        alone = drawn(logits_RV, late, [rows[number]], vocab_size)
        for name in ("token_ids_B", "logprob_B", "kl_B", "num_kept_B"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[number]), name


def test_given_tokens_are_scored_under_late_rows() -> None:
    vocab_size = 300
    logits_RV, late = streams(vocab_size)
    scored = [(), (WHOLE,), (HUSH_PROTECT,), (RELU,), UNLISTED[1]]
    rows = [SampleRow(0, terms, num_logprobs=2) for terms in scored for _ in range(2)]
    best = int(logits_RV[0].argmax())
    targets = torch.tensor([best, 7] * len(scored))
    ids = protected(vocab_size)
    ours = sampler_triton.score(logits_RV, rows, targets, vocab_size=vocab_size, protected_ids=ids, late=late)
    exact = sampler_reference.score(
        whole(logits_RV, late), rows, targets, vocab_size=vocab_size, protected_ids=ids.cpu()
    )
    torch.testing.assert_close(ours.logprob_B.cpu(), exact.logprob_B, rtol=1e-5, atol=2e-5)
    assert ours.rank_B.tolist() == exact.rank_B.tolist()
    assert ours.top_ids_BN.tolist() == exact.top_ids_BN.tolist()


@pytest.mark.parametrize(
    "vocab_size", [pytest.param(size, marks=pytest.mark.slow) for size in (49152, 128256)]
)
def test_late_rows_of_real_vocabularies(vocab_size: int) -> None:
    wide = replace(HUSH_PROTECT, min_keep=256)
    rows = [
        SampleRow(0, (wide,), seed=3, position=1, top_p=0.9),
        SampleRow(0, (RELU,), temperature=0.0, num_logprobs=2),
        SampleRow(0, (RELU_PROTECT,), seed=5),
        SampleRow(0, seed=5, top_p=0.5),
    ]
    assert_same_as_whole(*streams(vocab_size), rows, vocab_size=vocab_size)


def test_a_refilled_sampler_of_late_rows_reads_nothing_left_over() -> None:
    """Its workspace is spoiled between runs, and rows stand where others stood."""
    vocab_size = 300
    logits_RV, late = streams(vocab_size)
    rows = [SampleRow(0, terms, seed=6, position=number) for number, terms in enumerate([(), *ON_LISTS[1:4]])]
    shape = SampleShape.of(rows, num_rows=len(rows) + 2, first_late=NUM_WHOLE)
    sampler = TritonSampler(
        shape, vocab_size=vocab_size, protected_ids=protected(vocab_size), device=torch.device(DEVICE)
    )
    for batch in (rows, rows[:0:-1]):
        for name, buffer in sampler.space.items():
            if name not in ("normalizers", "thresholds"):
                buffer.view(torch.uint8).fill_(255)
        sampler.fill(batch)
        sampler.run(logits_RV, late)
        output, expected = sampler.output(), drawn(logits_RV, late, batch, vocab_size)
        assert torch.equal(output.token_ids_B, expected.token_ids_B)
        assert torch.equal(output.logprob_B, expected.logprob_B)


def test_what_a_run_would_read_out_of_bounds_is_refused() -> None:
    logits_RV, late = streams(129)
    ids, device = protected(129), torch.device(DEVICE)
    rows = [SampleRow(0, (RELU,))]
    shape = SampleShape.of(rows, num_rows=1, first_late=NUM_WHOLE)
    sampler = TritonSampler(shape, vocab_size=129, protected_ids=ids, device=device)
    sampler.fill(rows)
    with pytest.raises(ValueError, match="no late rows"):
        sampler.run(logits_RV)
    with pytest.raises(ValueError, match="read 2 late rows"):
        sampler.run(logits_RV, replace(late, hidden_AD=late.hidden_AD[: FAR - NUM_WHOLE]))
    for smaller in (
        replace(late, weight_WD=late.weight_WD[:128]),
        replace(late, bias_W=torch.zeros(128, device=DEVICE)),
    ):
        with pytest.raises(ValueError, match="late rows of 129 tokens"):
            sampler.run(logits_RV, smaller)
    with pytest.raises(ValueError, match="whole vocabulary"):
        sampler.fill([SampleRow(0, UNLISTED[0])])
    with pytest.raises(ValueError, match="a target needs all"):
        sampler.fill([SampleRow(NUM_WHOLE, (RELU,))])


def test_the_ways_of_late_rows() -> None:
    def way(terms: tuple[Term, ...]) -> int | None:
        return late_list_of(terms, first_late=NUM_WHOLE, vocab_size=300)

    assert [way(terms) for terms in ((), (WHOLE,))] == [NOT_LATE] * 2
    assert [way(terms) for terms in ON_LISTS] == [
        LATE_BY_TARGET, LATE_BY_TARGET, LATE_BY_SCORE, LATE_BY_SCORE, LATE_BY_SCORE, LATE_BY_TARGET, LATE_BY_SCORE,
        LATE_BY_SCORE, LATE_BY_TARGET,
    ]  # fmt: skip
    assert [way(terms) for terms in UNLISTED] == [None] * len(UNLISTED)
    # tau * V below one keeps everything, which no list is for.
    assert late_list_of((OFFICIAL,), first_late=NUM_WHOLE, vocab_size=9) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_the_trial_of_late_rows_is_passed(dtype: torch.dtype, head_dtype: torch.dtype) -> None:
    trial.late_verdict.cache_clear()
    assert trial.late_verdict(torch.device(DEVICE), 1271, dtype, head_dtype).is_proven
