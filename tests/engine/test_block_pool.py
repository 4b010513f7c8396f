"""The block pool: nothing is lost, nothing is shared that differs, idle contents go oldest first."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from uld_serve.engine.block_pool import BlockKeys, BlockPool


def keys(tokens: list[int], *, salt: str = "") -> list[bytes]:
    block_keys = BlockKeys(block_size=2, salt=salt)
    return block_keys.first(len(tokens) // 2, lambda start, count: tokens[start : start + count])


def test_keys_cover_everything_before_them_and_the_salt() -> None:
    assert keys([1, 2, 3, 4, 5])[:2] == keys([1, 2, 3, 4])
    assert keys([9, 2, 3, 4])[1] != keys([1, 2, 3, 4])[1]
    assert keys([1, 2], salt="tenant") != keys([1, 2])
    assert keys([1]) == []


def test_the_longest_known_beginning_is_shared() -> None:
    pool = BlockPool(4, 2)
    first = pool.try_take(2)
    for block_id, key in zip(first, keys([1, 2, 3, 4]), strict=True):
        pool.publish(block_id, key)
    assert pool.take_cached(keys([1, 2, 3, 4, 5, 6])) == first
    assert pool.take_cached(keys([1, 2, 7, 8])) == first[:1]
    assert pool.take_cached(keys([7, 8])) == []


def test_a_released_block_keeps_its_contents_until_its_place_is_needed() -> None:
    pool = BlockPool(2, 2)
    [block_id] = pool.try_take(1)
    pool.publish(block_id, keys([1, 2])[0])
    pool.give_back([block_id])
    assert pool.num_free == 2
    assert pool.take_cached(keys([1, 2])) == [block_id]
    pool.give_back([block_id])
    assert pool.try_take(2) is not None
    assert pool.take_cached(keys([1, 2])) == []


def test_withdrawn_blocks_are_found_by_nobody_and_not_lost() -> None:
    pool = BlockPool(3, 2)
    held, idle = pool.try_take(2)
    for block_id, key in zip((held, idle), keys([1, 2, 3, 4]), strict=True):
        pool.publish(block_id, key)
    pool.give_back([idle])
    pool.withdraw([held, idle])
    assert pool.take_cached(keys([1, 2])) == []
    pool.check_integrity([held])
    assert pool.num_free == 2


class PoolMachine(RuleBasedStateMachine):
    """Random sequences come, publish, share and go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, 2)
        self.held: list[tuple[list[int], list[int]]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def come(self, tokens: list[int]) -> None:
        blocks = self.pool.take_cached(keys(tokens))
        new = self.pool.try_take(self.pool.blocks_for(len(tokens)) - len(blocks))
        if new is None:
            self.pool.give_back(blocks)
            return
        self.held.append((tokens, blocks + new))

    @rule(which=st.integers(0, 5))
    def publish(self, which: int) -> None:
        if which < len(self.held):
            tokens, blocks = self.held[which]
            for block_id, key in zip(blocks, keys(tokens), strict=False):
                self.pool.publish(block_id, key)

    @rule(which=st.integers(0, 5))
    def go(self, which: int) -> None:
        if which < len(self.held):
            self.pool.give_back(self.held.pop(which)[1])

    @invariant()
    def adds_up(self) -> None:
        self.pool.check_integrity([block_id for _, blocks in self.held for block_id in blocks])


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
