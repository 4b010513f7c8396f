"""The Triton sampler against the torch sampler in fp64: every rule, filter and parameter, mixed in one launch."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from math import inf

import pytest
import torch
from uld_kernels import (
    SampleOutput,
    SampleRow,
    SampleShape,
    Term,
    rules,
    sampler_reference,
    sampler_triton,
)
from uld_kernels.noise import Stream, gumbel_noise
from uld_kernels.sampler_triton import TritonSampler

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if not IS_INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

PLAUSIBLE = {"filter_mode": rules.PLAUSIBILITY, "tau": 0.01, "min_keep": 12}
FUSED = {"filter_mode": rules.FUSED, "tau": 0.02}
SUBTRACT = Term(rules.SUBTRACT, 0.75, 1, row_a=1, protect=True, **PLAUSIBLE)
RELU = Term(rules.RELU_DIFFERENCE, 2.0, 2, row_a=2, **FUSED)
PAIR = Term(rules.PAIR_LINEAR, 1.5, 3, row_q=1, row_p=2, **FUSED)
RANK = Term(rules.PAIR_RANK, 1.0, 4, row_q=1, row_p=2, rank_k=4)
OFFICIAL = Term(rules.SUBTRACT, 0.8, 5, row_a=2, filter_mode=rules.OFFICIAL, tau=0.1)
RELU_PROTECT = replace(RELU, protect=True, digest=6)
RELU_BEYOND = replace(RELU, dead_zone=1.3, digest=8)
SUBTRACT_ALL = Term(rules.SUBTRACT, 0.5, 7, row_a=2)
COMPOSITIONS = [
    (),
    (SUBTRACT,),
    (RELU,),
    (PAIR,),
    (RANK,),
    (OFFICIAL,),
    (RELU_PROTECT,),
    (RELU_BEYOND,),
    (SUBTRACT_ALL,),
    (SUBTRACT, RELU_BEYOND),
    (SUBTRACT_ALL, RELU, PAIR, RANK),
]


def logits(seed: int, vocab_size: int, *, num_rows: int = 3, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, vocab_size, generator=generator) * spread).to(DEVICE)


def protected(vocab_size: int) -> torch.Tensor:
    return torch.tensor([0, vocab_size - 1][: min(2, vocab_size)], device=DEVICE)


def assert_same_as_torch(logits_RV: torch.Tensor, rows: list[SampleRow], *, vocab_size: int) -> SampleOutput:
    """Compares with fp64 on the same numbers. Tokens must be equal, near ties excluded by the choice of seeds."""
    ours = sampler_triton.sample(logits_RV, rows, vocab_size=vocab_size, protected_ids=protected(vocab_size))
    exact = torch_sampled(logits_RV, rows, vocab_size=vocab_size)
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


def torch_sampled(logits_RV: torch.Tensor, rows: list[SampleRow], *, vocab_size: int) -> SampleOutput:
    """The torch sampler in fp64 on the same numbers."""
    host_rows = [on_host(row) for row in rows]
    return sampler_reference.sample(
        logits_RV.cpu().double(), host_rows, vocab_size=vocab_size, protected_ids=protected(vocab_size).cpu()
    )


def on_host(row: SampleRow) -> SampleRow:
    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.cpu()

    return replace(
        row,
        prompt_ids=moved(row.prompt_ids),
        output_ids=moved(row.output_ids),
        banned_ids=moved(row.banned_ids),
        allowed_mask=moved(row.allowed_mask),
        logit_bias=None if row.logit_bias is None else (row.logit_bias[0].cpu(), row.logit_bias[1].cpu()),
    )


def random_row(chance: random.Random, vocab_size: int) -> SampleRow:
    def ids(most: int) -> torch.Tensor:
        picked = [chance.randrange(vocab_size) for _ in range(chance.randint(0, most))]
        return torch.tensor(picked, dtype=torch.int64, device=DEVICE)

    biased = ids(4).unique()
    mask = torch.tensor([chance.random() < 0.7 for _ in range(vocab_size)], device=DEVICE)
    return SampleRow(
        row_b=0,
        terms=chance.choice(COMPOSITIONS),
        compose=chance.choice([rules.COMPOSE_MAX, rules.COMPOSE_SUM]),
        temperature=chance.choice([0.0, 0.4, 1.0, 1.7]),
        top_k=chance.choice([0, 0, 1, 5, 3000]),
        top_p=chance.choice([1.0, 0.95, 0.4]),
        min_p=chance.choice([0.0, 0.0, 0.05, 1.0]),
        seed=chance.getrandbits(64),
        position=chance.randrange(2**32),
        repetition_penalty=chance.choice([1.0, 1.0, 1.3, 0.8]),
        presence_penalty=chance.choice([0.0, 0.0, 0.7]),
        frequency_penalty=chance.choice([0.0, 0.0, -0.4]),
        prompt_ids=ids(12) if chance.random() < 0.5 else None,
        output_ids=ids(12) if chance.random() < 0.5 else None,
        logit_bias=(biased, torch.linspace(-9.0, 9.0, len(biased), device=DEVICE)) if len(biased) else None,
        banned_ids=ids(12) if chance.random() < 0.3 else None,
        allowed_mask=mask if chance.random() < 0.2 else None,
        num_logprobs=chance.choice([0, 0, 3]),
    )


@pytest.mark.parametrize("vocab_size", [1, 41, pytest.param(1271, marks=pytest.mark.slow)])
def test_all_rules_greedy_and_sampled_in_one_launch(vocab_size: int) -> None:
    rows = [
        SampleRow(0, terms, temperature=temperature, seed=5, position=index, num_logprobs=2)
        for index, terms in enumerate(COMPOSITIONS)
        for temperature in (0.0, 1.0)
    ]
    if vocab_size == 1:
        rows = rows[:4]
    assert_same_as_torch(logits(vocab_size, vocab_size), rows, vocab_size=vocab_size)


@pytest.mark.parametrize("seed", range(3))
def test_random_parameters_mixed_in_one_launch(seed: int) -> None:
    chance = random.Random(seed)
    vocab_size = (41, 700, 129)[seed]
    rows = [random_row(chance, vocab_size) for _ in range(10)]
    assert_same_as_torch(logits(seed, vocab_size), rows, vocab_size=vocab_size)


@pytest.mark.parametrize(
    "vocab_size", [49152, *(pytest.param(size, marks=pytest.mark.slow) for size in (32000, 128256, 151936))]
)
def test_real_vocabularies(vocab_size: int) -> None:
    wide = replace(SUBTRACT, min_keep=256)
    rows = [
        SampleRow(0, (wide,), seed=3, position=1, top_p=0.9),
        SampleRow(0, (RELU,), temperature=0.0, num_logprobs=2),
        SampleRow(0, top_p=0.5, temperature=0.7, seed=2**63 + 1, position=8),
        SampleRow(0, seed=5, frequency_penalty=0.5, output_ids=torch.tensor([7, 7, 40], device=DEVICE)),
    ]
    assert_same_as_torch(logits(vocab_size, vocab_size), rows, vocab_size=vocab_size)


@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0])
def test_free_draws_list_few_tokens_and_stay_exact(spread: float) -> None:
    vocab_size = 9000
    ids = torch.arange(0, 60, 7, device=DEVICE)
    rows = [
        SampleRow(0, seed=1, position=4, temperature=0.6),
        SampleRow(0, seed=2, position=5, temperature=1.4, min_p=0.02),
        SampleRow(0, (SUBTRACT_ALL,), seed=3, position=6),
        SampleRow(0, seed=6, repetition_penalty=1.4, prompt_ids=ids, output_ids=ids[:3]),
        SampleRow(0, seed=7, logit_bias=(ids, torch.full((len(ids),), 4.0, device=DEVICE))),
        SampleRow(0, seed=8, banned_ids=ids, top_k=30, presence_penalty=1.0, output_ids=ids + 1),
    ]
    sampler = TritonSampler(
        SampleShape.of(rows, num_rows=len(rows)),
        vocab_size=vocab_size,
        protected_ids=protected(vocab_size),
        device=torch.device(DEVICE),
    )
    logits_RV = logits(int(spread * 50), vocab_size, spread=spread)
    sampler.space["listed_ids"].fill_(-1)
    sampler.fill(rows)
    sampler.run(logits_RV)
    exact = torch_sampled(logits_RV, rows, vocab_size=vocab_size)
    assert sampler.output().token_ids_B.tolist() == exact.token_ids_B.tolist()
    assert ((sampler.space["listed_ids"] >= 0).sum(1) < vocab_size // 10).all()


def test_truncation_keeps_exactly_what_comes_first() -> None:
    # Equal logits in pairs: top-k and top-p end inside a pair, and only the lower id of it may be drawn.
    logits_RV = torch.arange(20, 0, -1, device=DEVICE).float().repeat_interleave(2)[None] * 0.1
    cuts = (SampleRow(0, top_k=5), SampleRow(0, top_p=0.31), SampleRow(0, top_k=9, top_p=0.5))
    rows = [replace(cut, seed=seed, temperature=2.0) for cut in cuts for seed in range(8)]
    output = assert_same_as_torch(logits_RV, rows, vocab_size=40)
    assert len(set(output.token_ids_B.tolist())) > 3


def test_nucleus_that_is_not_inside_the_best_tokens_is_found_exactly() -> None:
    rows = [SampleRow(0, top_p=0.9, seed=seed, position=2) for seed in range(2)]
    output = assert_same_as_torch(logits(3, 3000, spread=0.01), rows, vocab_size=3000)
    assert output.num_kept_B.tolist() == [3000, 3000]


def test_filters_that_keep_more_than_one_block_are_exact() -> None:
    huge = replace(SUBTRACT, min_keep=1500)
    flat = replace(RELU, tau=0.001)
    rows = [SampleRow(0, (term,), seed=4, position=2, top_k=1100) for term in (huge, flat)]
    output = assert_same_as_torch(logits(4, 2500, spread=0.5), rows, vocab_size=2500)
    assert (output.num_kept_B > 1024).all()


def test_ties_go_to_the_lowest_id() -> None:
    logits_RV = torch.zeros(3, 300, device=DEVICE)
    logits_RV[0, [70, 30, 200]] = 2.0
    rows = [
        SampleRow(0, temperature=0.0, num_logprobs=5),
        SampleRow(0, temperature=1e-3, top_k=1),
        SampleRow(0, top_k=9, seed=3),
        SampleRow(0, top_p=0.2, seed=3),
        SampleRow(0, (RELU,), temperature=0.0),
        SampleRow(0, (replace(SUBTRACT, min_keep=3, tau=0.9),), temperature=0.0, num_logprobs=4),
    ]
    output = assert_same_as_torch(logits_RV, rows, vocab_size=300)
    assert output.token_ids_B[:2].tolist() == [30, 30]
    assert output.top_ids_BN[0].tolist() == [30, 70, 200, 0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_with_padded_columns(dtype: torch.dtype) -> None:
    padded = torch.cat([logits(5, 41), torch.full((3, 23), 60.0, device=DEVICE)], dim=1).to(dtype)
    rows = [SampleRow(0, terms, seed=1, position=3) for terms in COMPOSITIONS[:4]]
    assert_same_as_torch(padded, rows, vocab_size=41)


def test_numerical_errors_end_their_rows_only() -> None:
    clean = logits(6, 41)
    best = int(clean[0].argmax())
    spoiled = clean.clone()
    spoiled[0, best] = float("nan")
    infinite = clean.clone()
    infinite[1, best] = -inf
    infinite[2, best] = inf
    logits_RV = torch.cat([clean, spoiled, infinite])
    shifted = {"row_a": 7}
    rows = [
        SampleRow(0, (SUBTRACT,)),
        SampleRow(3),
        SampleRow(0, (replace(SUBTRACT, **shifted),)),
        SampleRow(0, (replace(RELU, row_a=8),)),
        SampleRow(0, (replace(RANK, row_p=8),)),
        SampleRow(0, (replace(PAIR, row_q=7), RELU)),
        SampleRow(0, (RELU,), seed=9),
    ]
    output = assert_same_as_torch(logits_RV, rows, vocab_size=41)
    assert output.status_B.tolist() == [0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("spoiled", [float("nan"), inf])
@pytest.mark.parametrize(
    "knows", [replace(SUBTRACT, protect=False), replace(PAIR, row_q=2, row_p=1, **PLAUSIBLE)]
)
def test_a_normaliser_spoiled_by_a_filtered_token_does_not_drop_its_term(knows: Term, spoiled: float) -> None:
    logits_RV = logits(6, 41)
    worst, best = int(logits_RV[0].argmin()), int(logits_RV[0].argmax())
    logits_RV[1, best] += 50.0
    logits_RV[1, worst] = spoiled
    rows = [SampleRow(0, (knows, RELU), temperature=0.0), SampleRow(0, (RELU,), temperature=0.0)]
    output = assert_same_as_torch(logits_RV, rows, vocab_size=41)
    assert output.status_B.tolist() == [rules.NUMERICAL, rules.OK]


def test_nothing_kept_is_reported_not_sampled() -> None:
    everything = torch.arange(41, device=DEVICE)
    rows = [
        SampleRow(0, banned_ids=everything),
        SampleRow(0, (SUBTRACT,), banned_ids=everything),
        SampleRow(0, (replace(RANK, rank_k=41),)),
        SampleRow(0, banned_ids=everything[1:]),
        SampleRow(0, (SUBTRACT,), banned_ids=everything[:-1]),
    ]
    output = assert_same_as_torch(logits(7, 41), rows, vocab_size=41)
    assert output.status_B.tolist() == [2, 2, 2, 0, 0]


def test_secret_of_a_certain_target_is_suppressed() -> None:
    logits_RV = logits(8, 400, spread=1.0)
    logits_RV[0, 5], logits_RV[1, 5], logits_RV[2, 5] = 25.0, 40.0, 40.0
    rows = [SampleRow(0, terms, temperature=0.0) for terms in COMPOSITIONS[1:3]]
    output = assert_same_as_torch(logits_RV, rows, vocab_size=400)
    assert (output.token_ids_B != 5).all()


def test_protection_is_exact_where_the_target_is_certain_of_the_end() -> None:
    logits_RV = logits(9, 41)
    logits_RV[0, 0] = 90.0
    rows = [SampleRow(0, (term,), num_logprobs=4) for term in (SUBTRACT, RELU_PROTECT)]
    output = assert_same_as_torch(logits_RV, rows, vocab_size=41)
    assert output.token_ids_B.tolist() == [0, 0]


def test_row_gives_the_same_bits_in_any_batch() -> None:
    logits_RV = logits(10, 41)
    rows = [SampleRow(0, terms, seed=7, position=2, top_p=0.9) for terms in COMPOSITIONS[:4]]
    ids = protected(41)
    together = sampler_triton.sample(logits_RV, rows, vocab_size=41, protected_ids=ids)
    for index, row in enumerate(rows):
        alone = sampler_triton.sample(logits_RV, [row], vocab_size=41, protected_ids=ids)
        assert alone.token_ids_B[0] == together.token_ids_B[index]
        assert alone.logprob_B[0] == together.logprob_B[index]


def test_free_draws_use_the_noise_of_noise_py_bit_for_bit() -> None:
    flat = torch.zeros(1, 41, device=DEVICE)
    rows = [SampleRow(0, seed=2**64 - 3, position=position) for position in (0, 1, 2**32 - 1)]
    output = sampler_triton.sample(flat, rows, vocab_size=41, protected_ids=protected(41))
    ids = torch.arange(41)
    expected = [int(gumbel_noise(ids, Stream.of([row.seed], [row.position])).argmax()) for row in rows]
    assert output.token_ids_B.tolist() == expected


def test_score_equals_torch() -> None:
    logits_RV = logits(11, 41)
    rows = [SampleRow(0, terms, num_logprobs=2, temperature=0.0, top_k=1) for terms in COMPOSITIONS]
    targets = torch.tensor([3, 8, 15, 1, 29, 0, 40, 7, 19, 22, 12][: len(rows)])
    ours = sampler_triton.score(logits_RV, rows, targets, vocab_size=41, protected_ids=protected(41))
    exact = sampler_reference.score(
        logits_RV.cpu().double(), rows, targets, vocab_size=41, protected_ids=protected(41).cpu()
    )
    assert ours.rank_B.tolist() == exact.rank_B.tolist()
    assert ours.num_kept_B.tolist() == exact.num_kept_B.tolist()
    assert ours.top_ids_BN.tolist() == exact.top_ids_BN.tolist()
    torch.testing.assert_close(ours.logprob_B.cpu(), exact.logprob_B, rtol=1e-5, atol=2e-5)


def test_no_rows_give_no_tokens() -> None:
    output = sampler_triton.sample(logits(12, 41), [], vocab_size=41, protected_ids=protected(41))
    assert output.token_ids_B.shape == (0,)
