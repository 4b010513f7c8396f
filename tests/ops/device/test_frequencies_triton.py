"""The Triton sampler draws what it should draw. Its noise: 10^4 draws (10^5 with `slow`, and on a device) against the
exact distribution, and those of the torch sampler. The sampler whole: 10^5 draws a kind on a device, and with `slow`
400 in the interpreter, which takes 0.1 s a row; that its tokens are the torch sampler's is test_sampler_triton's."""

from __future__ import annotations

import os
from dataclasses import replace

import chi_square
import dense_oracle
import pytest
import torch
import triton
import triton.language as tl
from test_frequencies import DRAW, PAIR, RELU, SUBTRACT, pair_excess
from uld_kernels import SampleRow, rules, sampler_triton
from uld_kernels.noise import Stream
from uld_kernels.noise import gumbel_noise as gumbel_noise_of_torch
from uld_kernels.noise_triton import gumbel_noise

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if not IS_INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

# More than one group of tokens that share their largest noise.
VOCAB = 300
NUM_DRAWS = 400 if IS_INTERPRETED else 100_000
ROWS_A_LAUNCH = 4096
POSITIONS = 10_000 if IS_INTERPRETED else 100_000
POSITIONS_A_BLOCK = 64 if IS_INTERPRETED else 4
PROTECTED = torch.tensor([0, 299])
KINDS = {
    "free": DRAW,
    "relu_difference": replace(DRAW, terms=(RELU,)),
    "subtract, plausibility, protect": replace(DRAW, terms=(SUBTRACT,)),
    "pair_linear, top-p": replace(DRAW, terms=(PAIR,), top_p=0.9),
    "two composed, top-k, min-p": replace(DRAW, terms=(SUBTRACT, RELU), top_k=30, min_p=0.02, temperature=1.4),
}  # fmt: skip


def logits() -> torch.Tensor:
    """Steeper than the torch sampler's, so that few draws still fill several bins."""
    return torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(13)) * 2.5


def drawn(rows: list[SampleRow]) -> torch.Tensor:
    found = []
    for start in range(0, len(rows), ROWS_A_LAUNCH):
        part = rows[start : start + ROWS_A_LAUNCH]
        output = sampler_triton.sample(
            logits().to(DEVICE), part, vocab_size=VOCAB, protected_ids=PROTECTED.to(DEVICE)
        )
        assert (output.status_B == rules.OK).all()
        found.append(output.token_ids_B.cpu())
    return torch.cat(found)


def tokens_of(row: SampleRow, num_draws: int) -> torch.Tensor:
    return drawn([replace(row, position=position) for position in range(num_draws)])


def excess(row: SampleRow, num_draws: int) -> float:
    counts = torch.bincount(tokens_of(row, num_draws), minlength=VOCAB)
    return chi_square.excess(counts, dense_oracle.sampling_scores(logits(), row, PROTECTED).softmax(-1))


@triton.jit
def _draw_kernel(
    weights_ptr, tokens_ptr, seed_ptr, num_positions, vocab_size, P: tl.constexpr, V: tl.constexpr
):
    """argmax(log-weights + noise) at P positions of one seed."""
    seed = tl.load(seed_ptr)
    position = tl.program_id(0) * P + tl.arange(0, P)
    ids = tl.zeros((P, V), tl.int32) + tl.arange(0, V)[None, :]
    weights = tl.load(weights_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
    noisy = weights + gumbel_noise(ids, seed, position[:, None])
    tl.store(tokens_ptr + position, tl.argmax(noisy, axis=1), mask=position < num_positions)


def noise_draws(seed: int, weights_V: torch.Tensor, num_positions: int) -> torch.Tensor:
    tokens = torch.zeros(num_positions, dtype=torch.int32, device=DEVICE)
    seed_1 = torch.tensor([seed], device=DEVICE)
    grid = (triton.cdiv(num_positions, POSITIONS_A_BLOCK),)
    _draw_kernel[grid](weights_V.to(DEVICE), tokens, seed_1, num_positions, VOCAB, P=POSITIONS_A_BLOCK, V=512)
    return tokens.cpu().long()


@pytest.mark.parametrize("num_positions", [POSITIONS, pytest.param(100_000, marks=pytest.mark.slow)])
def test_noise_draws_the_exact_frequencies_and_neighbouring_positions_are_independent(
    num_positions: int,
) -> None:
    weights_V = logits()[0].log_softmax(-1)
    tokens = noise_draws(2**40 + 7, weights_V, num_positions)
    exact_V = weights_V.softmax(-1)
    assert chi_square.excess(torch.bincount(tokens, minlength=VOCAB), exact_V) < 1.0
    assert pair_excess(tokens[:-1], tokens[1:], exact_V) < 1.0
    few = torch.arange(2000)
    stream = Stream.of([2**40 + 7] * len(few), few.tolist())
    by_torch = weights_V + gumbel_noise_of_torch(torch.arange(VOCAB), stream)
    assert torch.equal(tokens[: len(few)], by_torch.argmax(-1))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if IS_INTERPRETED else ()) for kind in KINDS]
)
def test_frequencies_are_exact(kind: str) -> None:
    assert excess(KINDS[kind], NUM_DRAWS) < 1.0
