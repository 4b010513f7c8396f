"""Philox against Random123's known answers and numpy, and the noise's bounds and independence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from uld_kernels.noise import GROUP_SIZE, NOISE_SPAN, Stream, group_noise, gumbel_noise
from uld_kernels.philox import first_two_words, philox_4x32

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


@pytest.mark.parametrize("shapes", [((1, 5), (1, 1)), ((3, 193), (3, 1)), ((700,), (700,)), ((2, 3), (1, 1))])
def test_philox_on_arrays_gives_the_words_that_it_gives_on_tensors(
    shapes: tuple[tuple[int, ...], ...],
) -> None:
    rng = np.random.default_rng(0)
    counter = [
        rng.integers(0, 2**32, shape, dtype=np.uint64)
        for shape in (shapes[0], shapes[1], shapes[0][-1:], (1,))
    ]
    key = [rng.integers(0, 2**32, shapes[1], dtype=np.uint64) for _ in range(2)]
    before = [word.copy() for word in (*counter, *key)]
    c0, c1, c2, c3 = (torch.from_numpy(word.astype(np.int64)) for word in counter)
    k0, k1 = (torch.from_numpy(word.astype(np.int64)) for word in key)
    expected = philox_4x32((c0, c1, c2, c3), (k0, k1))[:2]
    got = first_two_words((counter[0], counter[1], counter[2], counter[3]), (key[0], key[1]))
    assert [word.tolist() for word in got] == [word.tolist() for word in expected]
    assert all((old == now).all() for old, now in zip(before, (*counter, *key), strict=True))


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


def uniform(word: int) -> float:
    folded = word if word < 2**31 else word ^ 0xFFFFFFFF
    return max(float(np.float32(np.float32(folded) * np.float32(4.6566127342e-10))), 2.0**-32)


def scalar_noise(token: int, seed: int, position: int) -> float:
    """gumbel_noise of one token on Python floats."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    size_word, member_word, _, _ = scalar_philox((token >> 8, position, 1, 0), key, 32)
    highest = math.log(256) - math.log(-math.log1p(-uniform(size_word)))
    if member_word & 255 == token & 255:
        return highest
    own = -math.log1p(-uniform(scalar_philox((token, position, 0, 0), key, 32)[0]))
    return -math.log(math.exp(-highest) + own)


def noise_of(ids: torch.Tensor, *, seed: int, position: int) -> torch.Tensor:
    return gumbel_noise(ids, Stream.of([seed], [position]))[0]


def test_noise_is_the_largest_of_a_group_or_below_it() -> None:
    seed, position = 0xDEADBEEF12345678, 77
    stream = Stream.of([seed], [position])
    _, member = group_noise(torch.tensor([0, 5, 501]), stream)
    ids = torch.tensor([0, 1, 49151, 128255, 5 * 256 + int(member[0, 1]), 501 * 256 + int(member[0, 2])])
    expected = [scalar_noise(token, seed, position) for token in ids.tolist()]
    assert torch.allclose(gumbel_noise(ids, stream)[0], torch.tensor(expected), atol=0, rtol=2**-23)


def test_every_group_has_its_largest_where_it_says() -> None:
    stream = Stream.of([3, 2**63 + 9], [0, 4])
    noise_RGM = gumbel_noise(torch.arange(40 * GROUP_SIZE), stream).view(2, 40, GROUP_SIZE)
    highest, member = group_noise(torch.arange(40), stream)
    assert torch.equal(noise_RGM.amax(-1), highest.float())
    assert torch.equal(noise_RGM.argmax(-1), member)


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_noise_is_gumbel_whole_and_per_place_in_a_group(seed: int) -> None:
    noise = noise_of(torch.arange(200_192), seed=seed, position=3).double()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.03
    # Kolmogorov-Smirnov: the uniform transform of Gumbel numbers; 1.95 / sqrt(n) is the 0.1 % point.
    uniforms = (-(-noise).exp()).exp().sort().values
    steps = torch.arange(1, len(uniforms) + 1, dtype=torch.float64) / len(uniforms)
    assert (uniforms - steps).abs().max().item() < 1.95 / len(uniforms) ** 0.5
    # Members of one group are independent: no correlation between neighbours, or between largest and sum.
    pairs = noise.view(-1, 2)
    assert abs(torch.corrcoef(pairs.T)[0, 1].item()) < 0.015
    by_place = noise.view(-1, GROUP_SIZE).mean(0)
    assert (by_place - 0.5772).abs().max().item() < 5 * (torch.pi**2 / 6 / 782) ** 0.5


def test_noise_stays_inside_its_span() -> None:
    smallest_exponential = -math.log1p(-(2.0**-32))
    largest_exponential = -math.log1p(-0.99999994)
    largest = math.log(256) - math.log(smallest_exponential)
    lowest_of_group = math.log(256) - math.log(largest_exponential)
    smallest = -math.log(math.exp(-lowest_of_group) + largest_exponential)
    assert largest - smallest < NOISE_SPAN
    noise = noise_of(torch.arange(200_000), seed=11, position=3)
    assert noise.max() <= largest
    assert noise.min() >= smallest


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    ids = torch.arange(100)
    noise = noise_of(ids, seed=1, position=2)
    assert torch.equal(noise_of(ids.flip(0), seed=1, position=2).flip(0), noise)
    assert torch.equal(noise_of(ids[40:41], seed=1, position=2), noise[40:41])
    assert not torch.isclose(noise_of(ids, seed=1, position=3), noise).any()
    assert not torch.isclose(noise_of(ids, seed=1 + 2**40, position=2), noise).any()
    assert torch.equal(noise_of(ids, seed=1 + 2**64, position=2), noise)
    both = Stream.of([1, 7], [2, 9])
    assert torch.equal(gumbel_noise(ids, both)[0], noise)
    assert torch.equal(
        gumbel_noise(ids, both.rows(torch.ones(100, dtype=torch.long))), gumbel_noise(ids, both)[1]
    )
