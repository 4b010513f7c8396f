"""Draws one token a row: the largest of log-weights plus noise (Gumbel-max). Called by sampler_reference.

Of many tokens it computes noise for those alone that could win, which changes nothing but the time. Knows no filter
and no sampling parameter.

Legend: L lots (rows), K tokens of one lot, G groups of token ids that share their largest noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

import torch

from uld_kernels.noise import GROUP_BITS, GROUP_SIZE, Stream, group_noise, gumbel_noise

# Up to here, noise for every token costs no more than finding out which could win.
_DRAWN_WHOLE: Final = 4 * GROUP_SIZE


@dataclass(frozen=True, slots=True)
class Lot:
    """Tokens to draw one of, ids ascending, with finite log-weights z. One token needs no luck."""

    ids_K: torch.Tensor
    z_K: torch.Tensor
    seed: int
    position: int


def draw(lots: Sequence[Lot]) -> list[int]:
    """The id of the largest z plus noise of each lot, ties by lowest id."""
    large = [number for number, lot in enumerate(lots) if lot.ids_K.shape[0] > _DRAWN_WHOLE]
    narrowed = dict(zip(large, _contenders([lots[number] for number in large]), strict=True))
    left = [narrowed.get(number, lot) for number, lot in enumerate(lots)]
    best = [int(value_K.argmax().item()) for value_K in _noisy(left)]
    return [int(lot.ids_K[index].item()) for lot, index in zip(left, best, strict=True)]


def _contenders(lots: Sequence[Lot]) -> list[Lot]:
    """Of each lot the tokens whose group's largest z and largest noise reach together what its best group has."""
    if not lots:
        return []
    largest_z_LG = torch.nn.utils.rnn.pad_sequence(
        [_largest_by_group(lot) for lot in lots], batch_first=True, padding_value=-inf
    )
    groups_G = torch.arange(largest_z_LG.shape[1], device=largest_z_LG.device)
    highest_LG, _ = group_noise(groups_G, _stream(lots))
    bound_LG = largest_z_LG + highest_LG.to(torch.float32)
    best_groups = [
        _members(lot, [group]) for lot, group in zip(lots, bound_LG.argmax(-1).tolist(), strict=True)
    ]
    reached_L1 = torch.stack([value_K.max() for value_K in _noisy(best_groups)])[:, None]
    can_win_LG = bound_LG >= reached_L1
    return [
        _members(lot, can_win_G.nonzero()[:, 0].tolist())
        for lot, can_win_G in zip(lots, can_win_LG, strict=True)
    ]


def _largest_by_group(lot: Lot) -> torch.Tensor:
    """The largest z of each group of ids, -inf where the lot has none of it."""
    num_groups = (int(lot.ids_K[-1].item()) >> GROUP_BITS) + 1
    size = num_groups * GROUP_SIZE
    if lot.ids_K.shape[0] == int(lot.ids_K[-1].item()) + 1:  # every id: no scatter needed
        dense_V = torch.nn.functional.pad(lot.z_K, (0, size - lot.z_K.shape[0]), value=-inf)
    else:
        dense_V = lot.z_K.new_full((size,), -inf).index_copy_(0, lot.ids_K, lot.z_K)
    return dense_V.view(num_groups, GROUP_SIZE).amax(-1)


def _members(lot: Lot, groups: Sequence[int]) -> Lot:
    """The part of a lot in some groups, given ascending."""
    edges = torch.tensor([[group, group + 1] for group in groups], device=lot.ids_K.device) << GROUP_BITS
    spans = torch.searchsorted(lot.ids_K, edges).tolist()
    ids = torch.cat([lot.ids_K[start:end] for start, end in spans])
    return Lot(ids, torch.cat([lot.z_K[start:end] for start, end in spans]), lot.seed, lot.position)


def _noisy(lots: Sequence[Lot]) -> list[torch.Tensor]:
    """z plus noise of every lot, the noise all in one call."""
    if all(lot.ids_K.shape[0] == 1 for lot in lots):
        return [lot.z_K for lot in lots]
    sizes = [lot.ids_K.shape[0] for lot in lots]
    lengths = torch.tensor(sizes, device=lots[0].ids_K.device)
    rows = torch.arange(len(lots), device=lengths.device).repeat_interleave(lengths)
    noise = gumbel_noise(torch.cat([lot.ids_K for lot in lots]), _stream(lots).rows(rows))
    return list(torch.split_with_sizes(torch.cat([lot.z_K for lot in lots]) + noise, sizes))


def _stream(lots: Sequence[Lot]) -> Stream:
    device = lots[0].ids_K.device
    return Stream.of([lot.seed for lot in lots], [lot.position for lot in lots], device)
