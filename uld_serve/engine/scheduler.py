"""Decides which requests run next and with how many tokens. Called by Engine.step. Knows nothing of tensors,
text or HTTP.

Who decodes goes before who still runs a prompt, else oldest first; tenants with fewer running requests are let in
before others. A step has a budget of rows, assistant rows counted. Blocks are taken as tokens come; when a pool has
none left the newest running sequence that holds some of it gives all its blocks back and starts again later
(preemption by recompute).

What it schedules is in flight until `advance` or `take_back`. While a step is in flight the next one may be scheduled,
as if nobody ended in it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from uld_serve.config import EngineConfig
from uld_serve.engine.block_pool import BlockPool
from uld_serve.engine.pools import Pools
from uld_serve.engine.sequence import Scheduled, Sequence


@dataclass(slots=True)
class Scheduler:
    config: EngineConfig
    pools: Pools
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    num_preemptions: int = 0

    @property
    def pool(self) -> BlockPool:
        """The target's."""
        return self.pools.target

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, *, is_suspect: bool = False, has_failed: bool = False) -> None:
        """Take a sequence out, wherever it is, and free its blocks (BlockPool.give_back). What a failed one has
        computed is not shared again: it may be what made it fail."""
        if has_failed:
            self.pools.withdraw(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._free(sequence, is_suspect=is_suspect)

    def schedule(self) -> list[Scheduled]:
        """The next step, when nothing is in flight."""
        return _start(self._choose(self._make_room))

    def schedule_ahead(self) -> list[Scheduled]:
        """The next step while one is in flight. Nobody is preempted for it, and nothing is in it where that step must
        be known first: a draw hangs on its tokens, or blocks are lacking that may come free."""
        if any(one.params.needs_tokens and one.num_pending and one.remaining for one in self.running):
            return []
        lacks_blocks = False

        def has_room(sequence: Sequence, count: int) -> bool:
            nonlocal lacks_blocks
            lacks_blocks = lacks_blocks or not self.pools.try_extend(sequence, sequence.num_started + count)
            return not lacks_blocks

        scheduled = self._choose(has_room)
        return [] if lacks_blocks else _start(scheduled)

    def _choose(self, has_room: Callable[[Sequence, int], bool]) -> list[Scheduled]:
        scheduled: list[Scheduled] = []
        budget, num_done = self.config.max_step_rows, 0
        for sequence in sorted(self.running, key=lambda one: one.remaining > 1):
            if sequence not in self.running:  # preempted by an older one in this very step
                continue
            count = self._affordable(sequence, budget)
            if count and has_room(sequence, count):
                scheduled.append(sequence.next(count))
                budget -= scheduled[-1].num_rows
            elif not count and not sequence.remaining:
                num_done += 1  # its last token is in flight
        # An older one may have taken the blocks of a newer one that was scheduled before it.
        still_running = {id(sequence) for sequence in self.running}
        scheduled = [item for item in scheduled if id(item.sequence) in still_running]
        if len(self.running) - num_done == len(scheduled):  # nobody was left out, so newcomers may join
            self._admit(scheduled, budget)
        return scheduled

    def advance(self, item: Scheduled) -> None:
        """The scheduled tokens have been run and went well: count them, and publish blocks that are full now."""
        sequence, block_size = item.sequence, self.pools.block_size
        sequence.in_flight.remove(item)
        first_new = item.first // block_size
        sequence.num_computed = item.first + item.count
        self.pools.publish(sequence, first_new, sequence.num_computed // block_size)

    def take_back(self, scheduled: Iterable[Scheduled]) -> None:
        """As if these, the last ones scheduled, had never been."""
        for item in scheduled:
            if item.is_live:
                item.sequence.in_flight.remove(item)

    def check_integrity(self) -> None:
        self.pools.check_integrity(self.running)
        assert not any(one.block_ids for one in self.waiting), "a waiting sequence holds blocks"
        assert not any(one.in_flight for one in self.waiting), "a waiting sequence is in flight"
        for one in self.running:
            ends = [one.num_computed, *(item.first + item.count for item in one.in_flight)]
            assert [item.first for item in one.in_flight] == ends[:-1], "tokens in flight with a gap"
            room = len(one.block_ids) * self.pools.block_size
            assert one.num_started <= min(room, one.max_len), "tokens in flight without room"

    def _admit(self, scheduled: list[Scheduled], budget: int) -> None:
        """Nobody is let in for whom a step would have no row once all decode: the newest would wait for the oldest to
        end."""
        room = self.config.max_step_rows - sum(one.plan.rows_a_token for one in self.running)
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            sequence = self._next()
            if sequence.plan.rows_a_token > room:
                return
            self._reuse_prefix(sequence)
            count = self._affordable(sequence, budget)
            if not count or not self.pools.try_extend(sequence, sequence.num_computed + count):
                self._free(sequence)
                return
            if sequence.num_cached is None:
                sequence.num_cached = sequence.num_computed
                sequence.started_at = time.monotonic_ns()
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.is_preempted = False
            room -= sequence.plan.rows_a_token
            scheduled.append(sequence.next(count))
            budget -= scheduled[-1].num_rows

    def _next(self) -> Sequence:
        """Of those who wait: whoever ran before, then the tenant with the fewest running, then the oldest."""
        num_running = Counter(sequence.tenant for sequence in self.running)
        return min(self.waiting, key=lambda one: (not one.is_preempted, num_running[one.tenant]))

    def _affordable(self, sequence: Sequence, budget: int) -> int:
        """The longest next chunk whose rows fit the budget; 0 if none."""
        plan = sequence.plan
        count = min(sequence.remaining, budget // len(plan.lanes))
        while count > 0 and (excess := sequence.next(count).num_rows - budget) > 0:
            count -= max(1, excess // (len(plan.lanes) + plan.num_borrowing))
        return max(count, 0)

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens, from the newest sequences if need be; False if it had to give way itself.

        The oldest can take from all others, in every pool, so it always gets on.
        """
        num_tokens = sequence.num_started + count
        while not self.pools.try_extend(sequence, num_tokens):
            short = self.pools.lacking(sequence, num_tokens)
            newest = next(one for one in reversed(self.running) if any(x.pool == short for x in one.lanes))
            self._preempt(newest)
            if newest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence, is_suspect=True)
        sequence.is_preempted = True
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Start from cached blocks. At least one token is left to run, and a prompt runs from where it is scored:
        its scores are not in the cache."""
        block_size = self.pools.block_size
        found = self.pools.reuse_prefix(sequence, sequence.num_reusable // block_size)
        sequence.num_computed = found * block_size

    def _free(self, sequence: Sequence, *, is_suspect: bool = False) -> None:
        """What is in flight writes to the last blocks, and nobody looks whether that goes well."""
        suspect_from = None
        if is_suspect or sequence.in_flight:
            suspect_from = 0 if is_suspect else sequence.num_computed // self.pools.block_size
        self.pools.free(sequence, suspect_from=suspect_from)
        sequence.num_computed = 0
        sequence.in_flight = []


def _start(scheduled: list[Scheduled]) -> list[Scheduled]:
    for item in scheduled:
        item.sequence.in_flight.append(item)
    return scheduled
