"""The block pools of all caches, and what sequences hold of them: blocks for every lane of a sequence or for none.
Called by the scheduler. Knows no tensor and no profile: a lane is a pool's name and a salt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Series
from dataclasses import dataclass

from uld_serve.engine.block_pool import BlockKeys, BlockPool
from uld_serve.engine.sequence import Lane, Sequence
from uld_serve.engine.streams import TARGET_POOL, LanePlan


@dataclass(slots=True)
class Pools:
    """One pool for the target's keys and values; others only where some profile needs them."""

    by_name: dict[str, BlockPool]

    @property
    def target(self) -> BlockPool:
        return self.by_name[TARGET_POOL]

    @property
    def block_size(self) -> int:
        return self.target.block_size

    def lanes(self, plans: Series[LanePlan], *, tenant: str = "") -> list[Lane]:
        """Empty lanes. `tenant` keeps apart those who must not share (or time) a cache."""
        return [
            Lane(plan.pool, BlockKeys(block_size=self.block_size, salt=f"{len(tenant)}:{tenant}{plan.salt}"))
            for plan in plans
        ]

    def longest(self, plans: Series[LanePlan]) -> int:
        """Tokens of the longest sequence with such lanes that can ever run."""
        counts = Counter(plan.pool for plan in plans)
        return min(self.by_name[name].num_blocks // n for name, n in counts.items()) * self.block_size

    def lacking(self, sequence: Sequence, num_tokens: int) -> str | None:
        """The pool that has too few free blocks for the sequence's first `num_tokens`; None if none."""
        count = self.target.blocks_for(num_tokens) - len(sequence.block_ids)
        wanted: dict[str, int] = {}
        for lane in sequence.lanes:
            wanted[lane.pool] = wanted.get(lane.pool, 0) + count
        return next((name for name, n in wanted.items() if n > self.by_name[name].num_free), None)

    def try_extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens` in every lane, or nothing taken."""
        count = self.target.blocks_for(num_tokens) - len(sequence.block_ids)
        if count <= 0:
            return True
        if self.lacking(sequence, num_tokens) is not None:
            return False
        for lane in sequence.lanes:
            blocks = self.by_name[lane.pool].try_take(count)
            assert blocks is not None, "enough was free a moment ago"
            lane.block_ids += blocks
        return True

    def reuse_prefix(self, sequence: Sequence, num_blocks: int) -> int:
        """Hold the longest beginning that is cached in every lane, of `num_blocks` at most; its number of blocks."""
        keys = [lane.keys.first(num_blocks, sequence.tokens) for lane in sequence.lanes]
        known = [self.by_name[lane.pool].num_known(k) for lane, k in zip(sequence.lanes, keys, strict=True)]
        for lane, own in zip(sequence.lanes, keys, strict=True):
            lane.block_ids = self.by_name[lane.pool].take_cached(own, at_most=min(known))
        return min(known)

    def publish(self, sequence: Sequence, first: int, end: int) -> None:
        """Say what the sequence's blocks [first, end), which are full now, hold."""
        if first == end:
            return
        for lane in sequence.lanes:
            keys = lane.keys.first(end, sequence.tokens)
            pool = self.by_name[lane.pool]
            for block_id, key in zip(lane.block_ids[first:end], keys[first:], strict=True):
                pool.publish(block_id, key)

    def withdraw(self, sequence: Sequence) -> None:
        for lane in sequence.lanes:
            self.by_name[lane.pool].withdraw(lane.block_ids)

    def free(self, sequence: Sequence, *, suspect_from: int | None = None) -> None:
        """Give all blocks back; nothing has shown that what those from `suspect_from` on hold is finite."""
        for lane in sequence.lanes:
            pool, end = self.by_name[lane.pool], suspect_from
            if end is not None:
                pool.give_back(lane.block_ids[end:], is_suspect=True)
            pool.give_back(lane.block_ids[:end])
            lane.block_ids = []

    def check_integrity(self, running: Series[Sequence]) -> None:
        for name, pool in self.by_name.items():
            lanes = [lane for sequence in running for lane in sequence.lanes if lane.pool == name]
            pool.check_integrity([block_id for lane in lanes for block_id in lane.block_ids])
        for sequence in running:
            assert len({len(lane.block_ids) for lane in sequence.lanes}) == 1, "lanes of unequal length"
