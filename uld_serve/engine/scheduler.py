"""Decides which requests run next and with how many tokens. Called by Engine.step. Knows nothing of tensors,
text or HTTP.

Oldest first. A step has a budget of rows, assistant rows counted. Blocks are taken as tokens come; when none
is left the newest running sequence gives its blocks back and starts again later (preemption by recompute).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from uld_serve.config import EngineConfig
from uld_serve.engine.block_pool import BlockKey, BlockPool, block_keys
from uld_serve.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Run the next `count` tokens of `sequence`."""

    sequence: Sequence
    count: int


@dataclass(slots=True)
class Scheduler:
    config: EngineConfig
    pool: BlockPool
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    num_preemptions: int = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, *, is_suspect: bool = False, has_failed: bool = False) -> None:
        """Take a sequence out, wherever it is, and free its blocks (BlockPool.give_back). What a failed one has
        computed is not shared again: it may be what made it fail."""
        if has_failed:
            self.pool.withdraw(sequence.block_ids)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._free(sequence, is_suspect=is_suspect)

    def schedule(self) -> list[Scheduled]:
        scheduled: list[Scheduled] = []
        budget = self.config.max_step_rows
        for sequence in list(self.running):
            if sequence not in self.running:  # preempted by an older one in this very step
                continue
            count = self._affordable(sequence, budget)
            if count and self._make_room(sequence, count):
                scheduled.append(Scheduled(sequence, count))
                budget -= self.num_rows(sequence, count)
        if len(self.running) == len(scheduled):  # nobody running was left out, so newcomers may join
            self._admit(scheduled, budget)
        return scheduled

    def advance(self, item: Scheduled) -> None:
        """The scheduled tokens have been run: count them, and publish blocks that are full now."""
        sequence, block_size = item.sequence, self.pool.block_size
        first_new = sequence.num_computed // block_size
        sequence.num_computed += item.count
        num_full = sequence.num_computed // block_size
        if num_full > first_new:
            keys = self._keys(sequence, num_full * block_size)
            for block_id, key in list(zip(sequence.block_ids, keys, strict=False))[first_new:]:
                self.pool.publish(block_id, key)

    def num_rows(self, sequence: Sequence, count: int) -> int:
        """Rows of the widened batch: `count` target rows, and one row a stream at every scored position."""
        scored = len(sequence.scored_positions(count)) + sequence.draws_after(count)
        return count + scored * len(sequence.plan.streams)

    def check_integrity(self) -> None:
        self.pool.check_integrity([b for sequence in self.running for b in sequence.block_ids])
        assert not any(sequence.block_ids for sequence in self.waiting), "a waiting sequence holds blocks"

    def _admit(self, scheduled: list[Scheduled], budget: int) -> None:
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            self._reuse_prefix(sequence)
            count = self._affordable(sequence, budget)
            needed = self.pool.blocks_for(sequence.num_computed + count) - len(sequence.block_ids)
            blocks = self.pool.try_take(needed) if count else None
            if blocks is None:
                self._free(sequence)
                return
            sequence.block_ids += blocks
            if sequence.num_cached is None:
                sequence.num_cached = sequence.num_computed
            self.running.append(self.waiting.popleft())
            scheduled.append(Scheduled(sequence, count))
            budget -= self.num_rows(sequence, count)

    def _affordable(self, sequence: Sequence, budget: int) -> int:
        """The longest next chunk whose rows fit the budget; 0 if none."""
        count = min(sequence.remaining, budget)
        while count and self.num_rows(sequence, count) > budget:
            excess = self.num_rows(sequence, count) - budget
            count -= max(1, excess // (1 + len(sequence.plan.streams)))
        return max(count, 0)

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens, taken from the newest sequences if need be."""
        needed = self.pool.blocks_for(sequence.num_computed + count) - len(sequence.block_ids)
        while (blocks := self.pool.try_take(max(needed, 0))) is None:
            newest = self.running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        sequence.block_ids += blocks
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence, is_suspect=True)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Start from cached blocks. At least one token is left to run, and a prompt that is scored runs whole:
        its scores are not in the cache."""
        if sequence.scores_prompt:
            return
        usable = (sequence.num_tokens - 1) // self.pool.block_size
        keys = self._keys(sequence, usable * self.pool.block_size)
        sequence.block_ids = self.pool.take_cached(keys)
        sequence.num_computed = len(sequence.block_ids) * self.pool.block_size

    def _keys(self, sequence: Sequence, num_tokens: int) -> list[BlockKey]:
        token_ids = sequence.tokens(0, num_tokens)
        return list(block_keys(token_ids, block_size=self.pool.block_size, salt=sequence.cache_salt))

    def _free(self, sequence: Sequence, *, is_suspect: bool = False) -> None:
        self.pool.give_back(sequence.block_ids, is_suspect=is_suspect)
        sequence.block_ids = []
        sequence.num_computed = 0
