"""Hands out cache blocks by number, takes them back, and remembers what full ones hold. Called by the scheduler;
knows no tensor and no request.

Prefix cache: a full block is known by a key that covers every token up to its end, so that a later sequence with
the same beginning can share it. What else its contents depend on (a profile, a tenant) is in the key's salt. A
block that nobody holds keeps its contents until its place is needed; the one longest out of use goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

BlockKey = bytes


class BlockKeys:
    """The keys of a growing sequence's full blocks; each token is hashed once. `salt` keeps apart what must not be
    shared: tenants who must not time each other's cache, profiles with keys and values of their own."""

    __slots__ = ("_block_size", "_chain", "_keys")

    def __init__(self, *, block_size: int, salt: str = "") -> None:
        self._block_size = block_size
        self._chain = hashlib.blake2b(salt.encode(), digest_size=16)
        self._keys: list[BlockKey] = []

    def first(self, num_blocks: int, tokens: Callable[[int, int], Sequence[int]]) -> list[BlockKey]:
        """Keys of the first blocks. `tokens(start, count)` gives the sequence's token ids, always the same ones."""
        for block in range(len(self._keys), num_blocks):
            # Fixed width per token: no two token sequences give the same bytes.
            ids = tokens(block * self._block_size, self._block_size)
            self._chain.update(array("q", ids).tobytes())
            self._keys.append(self._chain.digest())
        return self._keys[:num_blocks]


@dataclass(slots=True)
class BlockPool:
    num_blocks: int
    block_size: int
    num_hits: int = 0
    num_lookups: int = 0
    _unused: list[int] = field(init=False)
    _idle: OrderedDict[int, None] = field(init=False, default_factory=OrderedDict)
    _holders: dict[int, int] = field(init=False, default_factory=dict)
    _key_of: dict[int, BlockKey] = field(init=False, default_factory=dict)
    _block_of: dict[BlockKey, int] = field(init=False, default_factory=dict)
    _suspect: set[int] = field(init=False, default_factory=set)
    _to_clear: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._unused = list(reversed(range(self.num_blocks)))

    @property
    def num_free(self) -> int:
        """Blocks that could be taken now, those with idle contents included."""
        return len(self._unused) + len(self._idle)

    @property
    def num_held(self) -> int:
        return len(self._holders)

    @property
    def usage(self) -> float:
        """Share of blocks held by sequences, 0 to 1."""
        return len(self._holders) / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def try_take(self, count: int) -> list[int] | None:
        """`count` blocks with nothing in them, or None and nothing taken."""
        if count > self.num_free:
            return None
        taken = [self._unused.pop() if self._unused else self._evict() for _ in range(count)]
        self._holders.update(dict.fromkeys(taken, 1))
        self._to_clear += [block_id for block_id in taken if block_id in self._suspect]
        self._suspect.difference_update(taken)
        return taken

    def pop_to_clear(self) -> list[int]:
        """Blocks taken since the last call that may hold NaN or infinity. Attention reads whole blocks and hides what
        lies beyond a sequence's end by a weight of 0, which would not hide those."""
        found, self._to_clear = self._to_clear, []
        return found

    def num_known(self, keys: Sequence[BlockKey]) -> int:
        """How many blocks long the longest known beginning of `keys` is."""
        return next((n for n, key in enumerate(keys) if key not in self._block_of), len(keys))

    def take_cached(self, keys: Sequence[BlockKey], *, at_most: int | None = None) -> list[int]:
        """The blocks of the longest known beginning of `keys`, now held by the caller too."""
        found = [self._block_of[key] for key in keys[: self.num_known(keys)][:at_most]]
        for block_id in found:
            self._idle.pop(block_id, None)
            self._holders[block_id] = self._holders.get(block_id, 0) + 1
        self.num_lookups += len(keys)
        self.num_hits += len(found)
        return found

    def publish(self, block_id: int, key: BlockKey) -> None:
        """Say what a full block holds. The first block with a key keeps it."""
        if block_id not in self._key_of and key not in self._block_of:
            self._key_of[block_id] = key
            self._block_of[key] = block_id

    def withdraw(self, block_ids: Sequence[int]) -> None:
        """Let nobody find these blocks by what they hold any more; who holds them keeps them."""
        for block_id in block_ids:
            key = self._key_of.pop(block_id, None)
            if key is not None:
                del self._block_of[key]
                if block_id in self._idle:
                    del self._idle[block_id]
                    self._unused.append(block_id)

    def give_back(self, block_ids: Sequence[int], *, is_suspect: bool = False) -> None:
        """Later blocks first, so that the beginning of a prefix outlives its end. `is_suspect`: nothing has shown
        that what they hold is finite."""
        if is_suspect:
            self._suspect.update(block_ids)
        for block_id in reversed(block_ids):
            self._holders[block_id] -= 1  # KeyError: given back twice, our bug
            if self._holders[block_id] == 0:
                del self._holders[block_id]
                if block_id in self._key_of:
                    self._idle[block_id] = None
                else:
                    self._unused.append(block_id)

    def check_integrity(self, held: Sequence[int]) -> None:
        """Every block is unused, idle, or held by as many sequences as the pool believes."""
        counts: dict[int, int] = {}
        for block_id in held:
            counts[block_id] = counts.get(block_id, 0) + 1
        assert counts == self._holders, "holders and the pool's counts differ"
        everywhere = [*self._unused, *self._idle, *self._holders]
        assert sorted(everywhere) == list(range(self.num_blocks)), "a block is lost or in two places"
        assert {self._block_of[key]: key for key in self._block_of} == self._key_of, "keys and blocks differ"

    def _evict(self) -> int:
        block_id, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block_id)]
        return block_id
