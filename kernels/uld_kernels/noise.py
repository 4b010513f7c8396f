"""Random numbers that depend on nothing but (seed, position, token id): Philox-4x32-10 and Gumbel noise.

Used by the torch sampler and tested against the Triton one. Knows no logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Final

import numpy as np
import torch

from uld_kernels.philox import WORD, Array, first_two_words, philox_4x32

# Triton's uint_to_uniform_float: the largest 31-bit integer times this stays below 1 in fp32.
_TO_UNIFORM: Final = 4.6566127342e-10
_SMALLEST_UNIFORM: Final = 2.0**-32

GROUP_BITS: Final = 8
GROUP_SIZE: Final = 1 << GROUP_BITS
"""Token ids that share their largest noise: see gumbel_noise."""

NOISE_SPAN: Final = 31.0
"""More than max - min of gumbel_noise (27.8 + 3.2): a token this far below the best can never be drawn."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Where noise comes from: the words of 64-bit seeds, and positions. Each broadcasts against token ids, so that
    one call serves many rows."""

    seed_low: torch.Tensor
    seed_high: torch.Tensor
    position: torch.Tensor

    @classmethod
    def of(cls, seeds: Sequence[int], positions: Sequence[int], device: torch.device | None = None) -> Stream:
        """One stream a row, each tensor (rows, 1)."""
        columns = [[seed & WORD for seed in seeds], [(seed >> 32) & WORD for seed in seeds], list(positions)]
        low, high, position = torch.tensor(columns, device=device)[:, :, None].unbind()
        return cls(low, high, position)

    def rows(self, index: torch.Tensor) -> Stream:
        """The stream of each row in `index`, flat; of one number for all where there is one row."""
        if self.position.shape[0] == 1:
            return Stream(self.seed_low[0], self.seed_high[0], self.position[0])
        low, high, position = (
            column[:, 0][index] for column in (self.seed_low, self.seed_high, self.position)
        )
        return Stream(low, high, position)


def group_noise(groups: torch.Tensor, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest noise of each group of GROUP_SIZE token ids, fp64, and the member (0 to 255) that has it.

    It is Gumbel with location log(GROUP_SIZE), as the maximum of so many is, and any member is as likely to have
    it. Counter = (group, position, 1, 0).
    """
    first, second = _words(groups, stream, domain=_domain(1, groups))
    return _highest(_exponential(first), second)


def gumbel_noise(token_ids: torch.Tensor, stream: Stream) -> torch.Tensor:
    """Standard Gumbel noise in fp32, between -3.2 and 27.8; adding it to log-weights makes argmax a draw.

    Drawn from the top down, as in A* sampling (Maddison et al. 2014, arXiv 1411.0030): first the largest of each
    group, then the others below it. So a draw over a whole vocabulary looks at one number a group and then only into
    the groups that can still win. Counter of a token = (id, position, 0, 0), key = the 64-bit seed.

    The logarithms are taken in fp64, so that devices whose logarithms differ in the last bit round to the
    same fp32.
    """
    ids = token_ids + torch.zeros_like(stream.position)
    both = torch.stack([ids >> GROUP_BITS, ids])
    domain = torch.tensor([1, 0], device=ids.device).view(2, *(1,) * ids.ndim)
    first, second = _words(both, stream, domain=domain)
    sizes = _exponential(first)
    highest, member = _highest(sizes[0], second[0])
    return _below(ids, sizes[1], highest=highest, member=member)


def noise_below(
    token_ids: torch.Tensor, stream: Stream, *, highest: torch.Tensor, member: torch.Tensor
) -> torch.Tensor:
    """gumbel_noise of tokens whose group's noise is known."""
    word, _ = _words(token_ids, stream, domain=_domain(0, token_ids))
    return _below(token_ids, _exponential(word), highest=highest, member=member)


def group_and_token_noise(
    num_groups: int, token_N: torch.Tensor, stream: Stream
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """group_noise of the first groups, (N, G) each, and gumbel_noise of one token a row, (N,)."""
    groups_NG = torch.arange(num_groups, device=token_N.device).expand(token_N.shape[0], -1)
    ids = torch.cat([groups_NG, token_N[:, None]], dim=1)
    domain = torch.ones(num_groups + 1, dtype=torch.int64, device=ids.device)
    domain[-1] = 0
    first, second = _words(ids, stream, domain=domain)
    sizes = _exponential(first)
    highest_NG, member_NG = _highest(sizes[:, :-1], second[:, :-1])
    group_N1 = token_N[:, None] >> GROUP_BITS
    own = {"highest": highest_NG.gather(1, group_N1), "member": member_NG.gather(1, group_N1)}
    return highest_NG, member_NG, _below(token_N[:, None], sizes[:, -1:], **own)[:, 0]


def _highest(size: torch.Tensor, member_word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return log(GROUP_SIZE) - size.log(), member_word & (GROUP_SIZE - 1)


def _below(
    token_ids: torch.Tensor, size: torch.Tensor, *, highest: torch.Tensor, member: torch.Tensor
) -> torch.Tensor:
    # P(g <= x | g <= h) = exp(e^-h - e^-x), solved for x.
    below = torch.minimum(-((-highest).exp() + size).log(), highest)
    return torch.where((token_ids & (GROUP_SIZE - 1)) == member, highest, below).to(torch.float32)


def _domain(number: int, ids: torch.Tensor) -> torch.Tensor:
    return torch.full((1,), number, dtype=torch.int64, device=ids.device)


def _words(ids: torch.Tensor, stream: Stream, *, domain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two output words of Philox at counter (id, position, domain, 0)."""
    zero = torch.zeros_like(domain)
    if ids.is_cuda:
        counter = (ids, stream.position, domain, zero)
        first, second, _, _ = philox_4x32(counter, (stream.seed_low, stream.seed_high))
        return first, second
    arrays = _array(ids), _array(stream.position), _array(domain), _array(zero)
    words = first_two_words(arrays, (_array(stream.seed_low), _array(stream.seed_high)))
    return torch.from_numpy(words[0].view(np.int64)), torch.from_numpy(words[1].view(np.int64))


def _array(words: torch.Tensor) -> Array:
    """The same memory; words are never negative."""
    return words.numpy().view(np.uint64)


def _exponential(word: torch.Tensor) -> torch.Tensor:
    """Standard exponential numbers in fp64, -log(1 - u), from uniform u in [2**-32, 1) in fp32.

    The word becomes u as in triton.language.uint_to_uniform_float; 0 is raised to 2**-32, because it would
    become infinite noise.
    """
    folded = torch.minimum(word, word ^ WORD)
    uniform = (folded.to(torch.float32) * _TO_UNIFORM).clamp_min_(_SMALLEST_UNIFORM)
    return uniform.double().neg_().log1p_().neg_()
