"""What two views give away: somebody who sees the best tokens both without and with forgetting can ask which of them it
pushed down. Called by the probes. Knows no model.

Legend: K tokens that a view shows at one position, best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum

FLOOR_NATS = -50.0
"""A token that a filter makes impossible counts as this likely."""


@dataclass(frozen=True, slots=True)
class View:
    """What an API shows at one position: the best tokens and their log-probabilities (nats)."""

    ids_K: tuple[int, ...]
    logprobs_K: tuple[float, ...]

    def rank(self, token: int) -> int | None:
        """From 1; None where it is not shown."""
        return self.ids_K.index(token) + 1 if token in self.ids_K else None


def difference_rank(without: View, forgetting: View, token: int) -> int | None:
    """Rank of the token among those that `without` shows, by how far forgetting lowers each: log p - log p', largest
    first, ties by p. None where `without` does not show it.

    A token that `forgetting` does not show counts as the least likely that it does, so that its fall is
    underestimated, as it is for an attacker who sees no more.
    """
    if token not in without.ids_K:
        return None
    least = max(min(forgetting.logprobs_K), FLOOR_NATS)
    lowered: Mapping[int, float] = dict(zip(forgetting.ids_K, forgetting.logprobs_K, strict=True))
    falls = {
        candidate: value - max(lowered.get(candidate, least), FLOOR_NATS)
        for candidate, value in zip(without.ids_K, without.logprobs_K, strict=True)
    }
    return sorted(without.ids_K, key=lambda candidate: -falls[candidate]).index(token) + 1


@dataclass(frozen=True, slots=True)
class Ranked:
    """Of n tokens, how many come out first, and among the first five."""

    n: int
    first: float
    among_five: float


def ranked(ranks: Sequence[int | None]) -> Ranked:
    """Raises ValueError for none."""
    if not ranks:
        raise ValueError("no token was ranked")
    return Ranked(len(ranks), _share(ranks, 1), _share(ranks, 5))


def _share(ranks: Sequence[int | None], most: int) -> float:
    return fsum(rank is not None and rank <= most for rank in ranks) / len(ranks)
