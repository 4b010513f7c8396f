"""Which row of a padded decode step every sequence of a batch takes, and which of its riders every assistant is. Made
by the decode graphs; knows no tensor's contents.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from uld_serve.model.row_batch import NO_ADAPTER, AssistantRow, RowBatch
from uld_serve.model.static_step import StaticShape, StaticStep

SMALL_SIZES = (1, 2, 4)
SIZE_STEP = 8
# A sequence whose riders differ from its neighbours' has rows that nobody reads; more than this share is a waste.
LARGEST_ROWS_PER_ROW = 2.0


@dataclass(frozen=True, slots=True)
class Seating:
    """Which row of a shape every sequence of a batch takes, and which of its riders every assistant is."""

    shape: StaticShape
    order: list[int]
    adapters: list[list[int]]
    riders: tuple[int, ...]
    sources: tuple[int, ...]

    @classmethod
    def of(cls, rows: RowBatch, *, max_rows: int) -> Seating | None:
        """None for rows that no graph runs: prompts, assistants with their own keys and values, late logits, targets
        with adapters, riders too different."""
        count = len(rows.sequences)
        if not 0 < count <= max_rows or rows.lanes or rows.separate or rows.head_rows.shape[0] != count:
            return None
        if any(one.count != 1 or one.slot != NO_ADAPTER for one in rows.sequences):
            return None
        if any(row.is_late or row.lane is not None for row in rows.assistants):
            return None
        own: list[list[AssistantRow]] = [[] for _ in range(count)]
        for row in rows.assistants:
            own[row.source].append(row)
        kinds = _union([Counter((row.fork, row.exit) for row in riders) for riders in own])
        num_seats = count * (1 + len(kinds))
        if num_seats > LARGEST_ROWS_PER_ROW * (count + len(rows.assistants)):
            return None
        seats = [_seats(riders, kinds) for riders in own]
        order = sorted(
            range(count), key=lambda row: [seat.slot if seat else NO_ADAPTER for seat in seats[row]]
        )
        size = padded_size(count)
        shape = StaticShape(
            num_rows=size,
            num_blocks=_power_of_two(max(len(one.blocks) for one in rows.sequences)),
            riders=tuple(kinds),
        )
        kind_of = {id(seat): kind for riders in seats for kind, seat in enumerate(riders) if seat is not None}
        return cls(
            shape,
            order,
            [_slots([seats[row][kind] for row in order], size) for kind in range(len(kinds))],
            tuple(kind_of[id(row)] for row in rows.assistants),
            tuple(row.source for row in rows.assistants),
        )

    def wanted(self, step: StaticStep) -> list[int]:
        """Rows of the step's result in the batch's order: the targets', then the assistants'."""
        place = {row: at for at, row in enumerate(self.order)}
        targets = [step.row_of(place[row]) for row in range(len(self.order))]
        pairs = zip(self.sources, self.riders, strict=True)
        return targets + [step.row_of(place[source], rider) for source, rider in pairs]


def padded_size(count: int) -> int:
    """1, 2, 4, 8, 16, 24, 32, …"""
    return next((size for size in SMALL_SIZES if count <= size), -(-count // SIZE_STEP) * SIZE_STEP)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _union(counts: list[Counter[tuple[int, int]]]) -> list[tuple[int, int]]:
    """The fewest riders, by fork and exit, among which every sequence finds its own."""
    most: Counter[tuple[int, int]] = Counter()
    for one in counts:
        most |= one
    return sorted(most.elements())


def _seats(riders: list[AssistantRow], kinds: list[tuple[int, int]]) -> list[AssistantRow | None]:
    """A sequence's own riders in the order of `kinds`; None where it has none."""
    left = list(riders)
    seats: list[AssistantRow | None] = []
    for kind in kinds:
        found = next((row for row in left if (row.fork, row.exit) == kind), None)
        if found is not None:
            left.remove(found)
        seats.append(found)
    return seats


def _slots(seats: list[AssistantRow | None], size: int) -> list[int]:
    own = [NO_ADAPTER if seat is None else seat.slot for seat in seats]
    return own + [NO_ADAPTER] * (size - len(own))
