"""Hands out cache blocks by number and takes them back. Called by the scheduler; knows no tensor or request."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class BlockPool:
    num_blocks: int
    block_size: int
    _free: deque[int] = field(init=False)
    _taken: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._free = deque(range(self.num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of blocks in use, 0 to 1."""
        return len(self._taken) / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def try_take(self, count: int) -> list[int] | None:
        """`count` blocks, or None and nothing taken."""
        if count > len(self._free):
            return None
        taken = [self._free.popleft() for _ in range(count)]
        self._taken.update(taken)
        return taken

    def give_back(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self._taken.remove(block_id)  # KeyError: given back twice, our bug
            self._free.append(block_id)

    def check_integrity(self, held: list[int]) -> None:
        """Every block is either free or held by exactly one sequence."""
        assert len(held) == len(set(held)), "a block is held twice"
        assert set(held) == self._taken, "held blocks and taken blocks differ"
        assert len(self._free) + len(self._taken) == self.num_blocks, "blocks were lost"
