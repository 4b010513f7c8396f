"""Rank 0's runner and bank: they tell the other ranks what they do themselves, in the same order. Used by Engine.of in
place of the plain ones when a base is shared. Knows no request.

A rank that fails in a step leaves the sums of all others unfinished, so that no part of a batch can be tried again:
whatever a step raises here is RanksLost, and ends the engine with an error for every request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from uld_serve.engine.ranks import Acquire, Clear, EvictAll, Ranks, Release, Run
from uld_serve.engine.runner import Runner
from uld_serve.errors import RanksLost
from uld_serve.model.adapter_bank import AdapterBank
from uld_serve.model.head import Scores
from uld_serve.model.row_batch import RowBatch
from uld_serve.model.shards import Adapter, part_of


@dataclass(slots=True, kw_only=True)
class LeadingRunner(Runner):
    ranks: Ranks

    @classmethod
    def around(cls, runner: Runner, ranks: Ranks) -> LeadingRunner:
        return cls(decoder=runner.decoder, cache=runner.cache, ranks=ranks)

    @property
    def keeps_state(self) -> bool:
        return False

    def run(self, rows: RowBatch) -> Scores:
        self.ranks.tell(Run(rows_on(rows, torch.device("cpu"))))
        try:
            return Runner.run(self, rows)
        except Exception as error:
            raise RanksLost(f"a step shared with other processes failed ({type(error).__name__})") from error

    def clear(self, block_ids: Sequence[int]) -> None:
        self.ranks.tell(Clear(list(block_ids)))
        Runner.clear(self, block_ids)


@dataclass(frozen=True, slots=True)
class LeadingBank:
    """The planner's bank: this rank's own, and word to the others."""

    bank: AdapterBank
    ranks: Ranks

    @property
    def total_users(self) -> int:
        return self.bank.total_users

    def acquire(self, key: str, load: Callable[[], Adapter]) -> int:
        adapter = None if self.bank.holds(key) else load()
        self.ranks.tell(Acquire(key, adapter))
        return acquire_part(self.bank, self.ranks, Acquire(key, adapter))

    def release(self, key: str) -> None:
        self.ranks.tell(Release(key))
        self.bank.release(key)

    def evict_all(self, prefix: str) -> int:
        self.ranks.tell(EvictAll(prefix))
        return self.bank.evict_all(prefix)


def acquire_part(bank: AdapterBank, ranks: Ranks, wanted: Acquire) -> int:
    """The same on every rank, so that slots and what is evicted are the same too. Raises as that of AdapterBank."""

    def own_part() -> Adapter:
        assert wanted.adapter is not None, "an adapter that one rank holds and another does not"
        return part_of(wanted.adapter, ranks.part)

    return bank.acquire(wanted.key, own_part)


def rows_on(rows: RowBatch, device: torch.device) -> RowBatch:
    """On a device. Ranks share no separate models and no assistants with keys and values of their own."""
    has_others = bool(rows.separate or rows.lanes)
    assert not has_others, "rows that ranks do not share"
    return replace(
        rows,
        token_ids_T=rows.token_ids_T.to(device),
        positions_T=rows.positions_T.to(device),
        slots_T=rows.slots_T.to(device),
        head_rows=rows.head_rows.to(device),
    )
