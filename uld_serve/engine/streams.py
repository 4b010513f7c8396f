"""What a request runs, as numbers and names: streams and where they fork, lanes of keys and values, terms of the
combine rule. Made by the planner, read by scheduler, batch and sampler. Knows no profile, tensor or text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from uld_serve.engine.request import ReceiptEntry

Compose = Literal["max", "sum"]

TARGET_POOL, OWN_POOL = "target", "own"


@dataclass(frozen=True, slots=True)
class Seat:
    """An adapter held in a bank: its key there and its slot."""

    key: str
    slot: int


@dataclass(frozen=True, slots=True)
class LanePlan:
    """Keys and values that a request keeps at every position: which pool they come from, and what they depend on
    besides its tokens, as the salt of their blocks' keys."""

    pool: str
    salt: str


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """One assistant: where it forks and exits, and its adapter.

    One that borrows (`lane` 0, the target's) has a row at each scored position; one with keys and values of its own
    has a row at every position and the plan's lane `lane`. `model` names the separate model that it runs in; without
    an adapter it has no seat. `is_late`: the rules ask for its logits on some hundred tokens at most.
    """

    fork: int
    exit: int
    seat: Seat | None
    is_late: bool = False
    lane: int = 0
    model: str | None = None

    @property
    def borrows(self) -> bool:
        return self.lane == 0


@dataclass(frozen=True, slots=True)
class TermPlan:
    """One profile's rule. `streams` maps the formula's inputs to indices into Plan.streams."""

    kind: str
    strength: float
    streams: dict[str, int]
    filter_mode: str
    tau: float
    min_keep: int
    protect: bool
    rank_k: int
    dead_zone: float
    tag: int
    entry: ReceiptEntry


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request runs. `lanes[0]` is the target's; `target_seat` the adapter that the target itself carries.

    `terms` are the rules that combine scores; `silent` the receipts of profiles whose rule is the identity, which do
    all they do in the target. `max_positions` bounds a sequence where a separate model's context is shorter.
    """

    streams: tuple[StreamPlan, ...]
    terms: tuple[TermPlan, ...]
    silent: tuple[ReceiptEntry, ...]
    compose: Compose
    lanes: tuple[LanePlan, ...]
    target_seat: Seat | None
    num_borrowing: int
    max_positions: int | None = None

    @property
    def rows_a_token(self) -> int:
        """Rows of the widened batch for one token that is scored."""
        return len(self.lanes) + self.num_borrowing

    @property
    def seats(self) -> list[tuple[str | None, Seat]]:
        """Every adapter held, with the model in whose bank it sits; None is the base."""
        held = [(stream.model, stream.seat) for stream in self.streams if stream.seat is not None]
        return held if self.target_seat is None else [*held, (None, self.target_seat)]
