"""Which of several measured settings to take, and where a sweep bends, as pure functions. Called by tune and
`eval sweep`. Knows no model and no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uld_serve.evaluation.sweep import Point


@dataclass(frozen=True, slots=True)
class Limits:
    """What must stay, on the retain side."""

    max_rise: float
    """Of the NLL, in nats a token."""
    max_cut: float
    """Share of tokens."""

    def hold(self, point: Point) -> bool:
        return point.retain.rise <= self.max_rise and point.retain.cut <= self.max_cut


def forgets_most(points: Sequence[Point]) -> Point | None:
    """The one that raises the forget answers' NLL most; of those that raise it alike, the one whose filter makes
    more of their tokens impossible. None where no point raises it."""
    forgetting = [point for point in points if point.forget.rise > 0]
    return max(forgetting, key=lambda point: (point.forget.rise, point.forget.cut), default=None)


def choose(points: Sequence[Point], limits: Limits) -> Point | None:
    """The one that forgets most within the limits. None where no point is within them and forgets anything."""
    return forgets_most([point for point in points if limits.hold(point)])


def knee(points: Sequence[Point]) -> Point | None:
    """Where more strength begins to cost more than it brings: of points in order of strength, the one farthest above
    the straight line from the first to the last, with what is forgotten over what is lost, each as a share of its range
    (Satopää et al. 2011, "Finding a Kneedle in a Haystack"). The base, which neither forgets nor loses, is the first.
    None where no point lies above that line."""
    losses, gains = ([0.0], [0.0])
    for point in points:
        losses.append(point.retain.rise)
        gains.append(point.forget.rise)
    number = farthest_above_chord(losses, gains)
    return None if number is None else points[number - 1]


def farthest_above_chord(x: Sequence[float], y: Sequence[float]) -> int | None:
    """Index of the point farthest above the line from the first point to the last, both axes scaled to the span of
    those two. Neither end is one; None where none is above, or where x or y does not rise from first to last."""
    if len(x) < 3 or x[-1] <= x[0] or y[-1] <= y[0]:
        return None
    heights = [
        (up - y[0]) / (y[-1] - y[0]) - (along - x[0]) / (x[-1] - x[0]) for along, up in zip(x, y, strict=True)
    ]
    best = max(range(1, len(x) - 1), key=heights.__getitem__)
    # The distance is this height over the square root of 2, at every point.
    return best if heights[best] > 0 else None
