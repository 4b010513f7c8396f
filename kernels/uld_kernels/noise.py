"""Random numbers that depend on nothing but (seed, position, token id): Philox-4x32-10 and Gumbel noise.

Used by the torch sampler and tested against the Triton one. Knows no logits."""

from __future__ import annotations

from typing import Final

import torch

# Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", the constants of Philox-4x32.
ROUND_A: Final = 0xD2511F53
ROUND_B: Final = 0xCD9E8D57
KEY_A: Final = 0x9E3779B9
KEY_B: Final = 0xBB67AE85
NUM_ROUNDS: Final = 10

_WORD: Final = 0xFFFFFFFF
# Triton's uint_to_uniform_float: the largest 31-bit integer times this stays below 1 in fp32.
_TO_UNIFORM: Final = 4.6566127342e-10
_SMALLEST_UNIFORM: Final = 2.0**-32

NOISE_SPAN: Final = 26.0
"""More than max - min of gumbel_noise (22.2 + 2.9): a token this far below the best can never be drawn."""


def _mul_hi_lo(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The 64-bit product wraps into the sign bit; the mask after the shift makes the upper word unsigned.
    product = word * constant
    return (product >> 32) & _WORD, product & _WORD


def philox_4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox on int64 tensors that hold 32-bit words; returns four such words.

    Equal bit for bit to triton.language.philox(seed, c0, c1, c2, c3) with key = (low, high) word of the seed.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        high_b, low_b = _mul_hi_lo(ROUND_B, c2)
        high_a, low_a = _mul_hi_lo(ROUND_A, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + KEY_A) & _WORD, (k1 + KEY_B) & _WORD
    return c0, c1, c2, c3


def philox_uniform(token_ids: torch.Tensor, *, seed: int, position: int) -> torch.Tensor:
    """Uniform fp32 numbers in [2**-32, 1), one per token id: key = 64-bit seed, counter = (id, position, 0,
    0).

    The first output word becomes a number as in triton.language.uint_to_uniform_float; 0 is raised to 2**-32,
    because it would become infinite noise.
    """
    key = (seed & _WORD, (seed >> 32) & _WORD)
    zero = torch.zeros((), dtype=torch.int64, device=token_ids.device)
    word, _, _, _ = philox_4x32((token_ids, zero + position, zero, zero), key)
    folded = torch.where(word >= 2**31, word ^ _WORD, word)
    return (folded.to(torch.float32) * _TO_UNIFORM).clamp_min_(_SMALLEST_UNIFORM)


def gumbel_noise(token_ids: torch.Tensor, *, seed: int, position: int) -> torch.Tensor:
    """-log(-log(1 - u)) in fp32, between -2.9 and 22.2; adding it to log-weights makes argmax a draw.

    The logarithms are taken in fp64, so that devices whose logarithms differ in the last bit round to the
    same fp32.
    """
    uniform = philox_uniform(token_ids, seed=seed, position=position).double()
    return uniform.neg_().log1p_().neg_().log_().neg_().to(torch.float32)
