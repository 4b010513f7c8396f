"""How likely one of k drawn answers leaks. Called by the probes. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, prod


def leak_at_k(num_samples: int, num_leaks: int, k: int) -> float:
    """Chance that at least one of k draws leaks, estimated without bias from `num_samples` draws of which `num_leaks`
    did: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, Eq. 1, there called pass@k; leak@k of Reisizadeh
    et al. 2025, arXiv 2511.04934, where a draw either leaks or does not).

    1 - (1 - c / n)^k would be too low. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= num_leaks <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"{num_leaks} leaks in {num_samples} draws, k = {k}")
    if num_samples - num_leaks < k:
        return 1.0
    # As a product: the binomials themselves are too large for floats.
    return 1.0 - prod(1.0 - k / number for number in range(num_samples - num_leaks + 1, num_samples + 1))


def mean_leak_at_k(leaks: Sequence[int], num_samples: int, k: int) -> float:
    """Over facts; `leaks` has one count each."""
    return fsum(leak_at_k(num_samples, count, k) for count in leaks) / len(leaks)


def curve(leaks: Sequence[int], num_samples: int) -> list[tuple[int, float]]:
    """(k, leak@k) at every power of two and at the last k."""
    powers = [2**power for power in range(num_samples.bit_length()) if 2**power <= num_samples]
    return [(k, mean_leak_at_k(leaks, num_samples, k)) for k in sorted({*powers, num_samples})]
