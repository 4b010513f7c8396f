"""Draws one token a row: the largest of log-weights plus noise (Gumbel-max). Called by the torch samplers.

Of many tokens it computes noise for those alone that could win, which changes nothing but the time. Knows no filter
and no sampling parameter but temperature.

Legend: L lots (rows), K tokens of one lot, N rows, G groups of token ids that share their largest noise, C tokens of
all rows that could win."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

import torch

from uld_kernels.logit_groups import Found, LogitGroups
from uld_kernels.noise import (
    GROUP_BITS,
    GROUP_SIZE,
    Stream,
    group_and_token_noise,
    gumbel_noise,
    noise_below,
)

# Up to here, noise for every token costs no more than finding out which could win.
_DRAWN_WHOLE: Final = 4 * GROUP_SIZE
# More than what fp32 rounds away of s / temperature + noise, as a share of the sum, and the largest noise.
_ROUNDING: Final = 1e-6
_LARGEST_NOISE: Final = 100.0


@dataclass(frozen=True, slots=True)
class Lot:
    """Tokens to draw one of, ids ascending, with finite log-weights z. One token needs no luck."""

    ids_K: torch.Tensor
    z_K: torch.Tensor
    seed: int
    position: int


def draw(lots: Sequence[Lot]) -> list[int]:
    """The id of the largest z plus noise of each lot, ties by lowest id."""
    tokens = [0] * len(lots)
    for chosen, drawn in ((_is_small, _draw_small), (_is_large, _draw_large)):
        numbers = [number for number, lot in enumerate(lots) if chosen(lot)]
        if numbers:
            for number, token in zip(numbers, drawn([lots[number] for number in numbers]), strict=True):
                tokens[number] = token
    return tokens


def draw_whole(
    groups: LogitGroups,
    stream: Stream,
    *,
    temperature_N1: torch.Tensor,
    best: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The id of the largest score / temperature + noise of each row, ties by lowest id. `best` is groups.best(), all
    of it finite.

    Noise is computed for each group's largest and for the best token. What the best of these reach then rules out
    nearly all tokens, because none has more noise than its group's largest.
    """
    num_groups = groups.max_NG.shape[1]
    best_N, token_N = best
    highest_NG, member_NG, noise_N = group_and_token_noise(num_groups, token_N, stream)
    first_G = torch.arange(num_groups, device=token_N.device) << GROUP_BITS
    luckiest_NG = groups.at(first_G + member_NG) / temperature_N1 + highest_NG.to(torch.float32)
    reached_N = torch.maximum(luckiest_NG.amax(-1), best_N / temperature_N1[:, 0] + noise_N)
    reached_N1 = reached_N.double()[:, None]
    slack_N1 = _ROUNDING * (reached_N1.abs() + _LARGEST_NOISE)
    limit_NG = ((reached_N1 - slack_N1 - highest_NG) * temperature_N1.double()).to(best_N.dtype)
    found = groups.at_least(limit_NG)
    group_C = found.row_C * num_groups + (found.id_C >> GROUP_BITS)
    noise_C = noise_below(
        found.id_C,
        stream.rows(found.row_C),
        highest=highest_NG.flatten()[group_C],
        member=member_NG.flatten()[group_C],
    )
    value_C = found.value_C / temperature_N1[found.row_C, 0] + noise_C
    return found.id_C[found.first_best(value_C, num_rows=len(token_N))[1]]


def draw_few(found: Found, stream: Stream, *, temperature_N1: torch.Tensor) -> torch.Tensor:
    """The same over listed tokens, row by row. A row whose temperature is 0 goes without noise.

    Raises RuntimeError if a row has none: its place must not go to a neighbour's token.
    """
    num_rows = temperature_N1.shape[0]
    smallest, largest = found.segments(num_rows).length_N.aminmax()
    if smallest < 1:
        raise RuntimeError("a row has no token to draw from")
    if largest == 1:
        return found.id_C
    value_C = found.value_C
    is_greedy_N = temperature_N1[:, 0] == 0.0
    if not is_greedy_N.all():
        noise_C = gumbel_noise(found.id_C, stream.rows(found.row_C))
        noisy_C = value_C / temperature_N1[found.row_C, 0] + noise_C
        value_C = torch.where(is_greedy_N[found.row_C], value_C, noisy_C) if is_greedy_N.any() else noisy_C
    return found.id_C[found.first_best(value_C, num_rows=num_rows)[1]]


def is_long(num_tokens: int) -> bool:
    """Whether a list is drawn from faster as a whole row."""
    return num_tokens > _DRAWN_WHOLE


def _is_small(lot: Lot) -> bool:
    return not is_long(lot.ids_K.shape[0])


def _is_large(lot: Lot) -> bool:
    return not _is_small(lot)


def _draw_small(lots: Sequence[Lot]) -> list[int]:
    lengths = torch.tensor([lot.ids_K.shape[0] for lot in lots], device=lots[0].ids_K.device)
    row_C = torch.arange(len(lots), device=lengths.device).repeat_interleave(lengths)
    found = Found(row_C, torch.cat([lot.ids_K for lot in lots]), torch.cat([lot.z_K for lot in lots]))
    return _ids(draw_few(found, _stream(lots), temperature_N1=_ones(lots)))


def _draw_large(lots: Sequence[Lot]) -> list[int]:
    size = max(int(lot.ids_K[-1].item()) for lot in lots) + 1
    z_NV = lots[0].z_K.new_full((len(lots), -(-size // GROUP_SIZE) * GROUP_SIZE), -inf)
    for z_V, lot in zip(z_NV, lots, strict=True):
        z_V.index_copy_(0, lot.ids_K, lot.z_K)
    groups = LogitGroups.of(z_NV)
    return _ids(draw_whole(groups, _stream(lots), temperature_N1=_ones(lots), best=groups.best()))


def _ids(token_N: torch.Tensor) -> list[int]:
    ids: list[int] = token_N.tolist()
    return ids


def _ones(lots: Sequence[Lot]) -> torch.Tensor:
    return lots[0].z_K.new_ones((len(lots), 1))


def _stream(lots: Sequence[Lot]) -> Stream:
    device = lots[0].ids_K.device
    return Stream.of([lot.seed for lot in lots], [lot.position for lot in lots], device)
