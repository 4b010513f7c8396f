"""Philox against Random123's known answers and numpy, and the noise's bounds and independence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from uld_kernels.noise import NOISE_SPAN, gumbel_noise, philox_4x32, philox_uniform

# Multipliers and key increments of Philox-4xN by word size (Salmon et al. 2011).
CONSTANTS = {
    32: (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85),
    64: (0xD2E7470EE14C6C93, 0xCA5A826395121157, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B),
}


def scalar_philox(counter: tuple[int, ...], key: tuple[int, int], bits: int) -> tuple[int, int, int, int]:
    """Philox-4xN-10 on Python integers."""
    mul_a, mul_b, key_a, key_b = CONSTANTS[bits]
    mask = (1 << bits) - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_a, product_b = mul_a * c0, mul_b * c2
        c0, c1, c2, c3 = (
            (product_b >> bits) ^ c1 ^ k0,
            product_b & mask,
            (product_a >> bits) ^ c3 ^ k1,
            product_a & mask,
        )
        k0, k1 = (k0 + key_a) & mask, (k1 + key_b) & mask
    return c0, c1, c2, c3


def words(*values: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    c0, c1, c2, c3 = (torch.tensor([value]) for value in values)
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123's kat_vectors, philox4x32 with 10 rounds.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_random123_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    assert tuple(int(word) for word in philox_4x32(words(*counter), key)) == answer
    assert scalar_philox(counter, key, 32) == answer


def test_scalar_philox_equals_numpy_at_64_bits_and_ours_at_32() -> None:
    generator = np.random.default_rng(5)
    for _ in range(20):
        key = tuple(int(word) for word in generator.integers(0, 2**63, 2))
        counter = tuple(int(word) for word in generator.integers(0, 2**63, 4))
        state = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64))
        # numpy raises the counter before its first block.
        expected = scalar_philox((counter[0] + 1, *counter[1:]), (key[0], key[1]), 64)
        assert tuple(int(word) for word in state.random_raw(4)) == expected
        small = tuple(word & 0xFFFFFFFF for word in counter)
        small_key = (key[0] & 0xFFFFFFFF, key[1] & 0xFFFFFFFF)
        assert tuple(int(word) for word in philox_4x32(words(*small), small_key)) == scalar_philox(
            small, small_key, 32
        )


def test_uniform_is_the_first_word_of_seed_position_and_token() -> None:
    seed, position = 0xDEADBEEF12345678, 77
    ids = torch.tensor([0, 1, 49151, 128255])
    uniform = philox_uniform(ids, seed=seed, position=position)
    for token, value in zip(ids.tolist(), uniform.tolist(), strict=True):
        word = scalar_philox((token, position, 0, 0), (seed & 0xFFFFFFFF, seed >> 32), 32)[0]
        folded = word if word < 2**31 else word ^ 0xFFFFFFFF
        expected = np.float32(np.float32(folded) * np.float32(4.6566127342e-10))
        assert value == max(float(expected), 2.0**-32)


def test_noise_has_gumbel_moments_and_stays_inside_its_span() -> None:
    noise = gumbel_noise(torch.arange(200_000), seed=11, position=3).double()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.03
    largest = -torch.log(-torch.log1p(torch.tensor(-(2.0**-32), dtype=torch.float64)))
    smallest = -torch.log(-torch.log1p(torch.tensor(-0.99999994, dtype=torch.float64)))
    assert largest - smallest < NOISE_SPAN
    assert noise.max() <= largest
    assert noise.min() >= smallest


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    ids = torch.arange(100)
    noise = gumbel_noise(ids, seed=1, position=2)
    assert torch.equal(gumbel_noise(ids.flip(0), seed=1, position=2).flip(0), noise)
    assert torch.equal(gumbel_noise(ids[40:41], seed=1, position=2), noise[40:41])
    assert not torch.isclose(gumbel_noise(ids, seed=1, position=3), noise).any()
    assert not torch.isclose(gumbel_noise(ids, seed=1 + 2**40, position=2), noise).any()
    assert torch.equal(gumbel_noise(ids, seed=1 + 2**64, position=2), noise)
