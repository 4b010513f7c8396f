"""The block pool: nothing is lost, nothing is shared that differs, idle contents go oldest first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
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


def test_blocks_are_told_by_salt_as_well_as_by_tokens() -> None:
    assert len({keys([1, 2], salt=salt)[0] for salt in ("", "0:", "1:a", "1:b")}) == 4


def test_what_may_hold_nan_is_cleared_before_its_next_use_and_once() -> None:
    pool = BlockPool(2, 2)
    bad, good = pool.try_take(2)
    assert pool.pop_to_clear() == []
    pool.give_back([bad], is_suspect=True)
    pool.give_back([good])
    assert sorted(pool.try_take(2)) == sorted([bad, good])
    assert pool.pop_to_clear() == [bad]
    assert pool.pop_to_clear() == []
    pool.give_back([bad, good])
    pool.try_take(2)
    assert pool.pop_to_clear() == []


def test_counts_say_what_is_held_and_what_was_found() -> None:
    pool = BlockPool(4, 2)
    first = pool.try_take(2)
    for block_id, key in zip(first, keys([1, 2, 3, 4]), strict=True):
        pool.publish(block_id, key)
    assert pool.take_cached(keys([1, 2, 3, 4, 5, 6]), at_most=1) == first[:1]
    assert (pool.num_lookups, pool.num_hits) == (3, 1)
    assert (pool.num_held, pool.num_free, pool.usage) == (2, 2, 0.5)
    assert [pool.blocks_for(n) for n in (0, 1, 2, 3)] == [0, 1, 1, 2]
    assert pool.try_take(3) is None
    assert pool.num_free == 2


def test_a_shared_block_is_held_until_its_last_holder_gives_it_back() -> None:
    pool = BlockPool(2, 2)
    [block_id] = pool.try_take(1)
    pool.publish(block_id, keys([1, 2])[0])
    pool.take_cached(keys([1, 2]))
    pool.give_back([block_id])
    pool.check_integrity([block_id])
    pool.give_back([block_id])
    pool.check_integrity([])
    with pytest.raises(KeyError):
        pool.give_back([block_id])


def test_the_first_block_with_a_key_keeps_it() -> None:
    pool = BlockPool(3, 2)
    first, second, third = pool.try_take(3)
    one, other = keys([1, 2]) + keys([3, 4])
    pool.publish(first, one)
    pool.publish(second, one)
    pool.publish(first, other)
    assert pool.take_cached([one]) == [first]
    assert pool.num_known([other]) == 0
    pool.withdraw([third])
    pool.check_integrity([first, first, second, third])


def test_idle_blocks_are_taken_from_the_end_of_a_prefix_first() -> None:
    pool = BlockPool(2, 2)
    first, last = pool.try_take(2)
    for block_id, key in zip((first, last), keys([1, 2, 3, 4]), strict=True):
        pool.publish(block_id, key)
    pool.give_back([first, last])
    assert pool.try_take(1) == [last]
    assert pool.num_known(keys([1, 2, 3, 4])) == 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda pool: pool._holders.clear(), "counts differ"),
        (lambda pool: pool._unused.pop(), "lost or in two places"),
        (lambda pool: pool._key_of.clear(), "keys and blocks differ"),
    ],
)
def test_a_pool_that_disagrees_with_itself_says_so(spoil: Callable[[BlockPool], object], said: str) -> None:
    pool = BlockPool(3, 2)
    [held] = pool.try_take(1)
    pool.publish(held, keys([1, 2])[0])
    pool.check_integrity([held])
    spoil(pool)
    with pytest.raises(AssertionError, match=said):
        pool.check_integrity([held])


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
