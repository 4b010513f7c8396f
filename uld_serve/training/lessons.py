"""Which examples a run learns from, step by step. Called by trainer; knows no model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from torch.utils.data import Dataset

from uld_serve.training.examples import Kind
from uld_serve.training.settings import Settings
from uld_serve.training.states import Observed


class Lessons(Dataset[Observed]):
    """The whole run's examples in order: every step has its share of each kind, shuffled anew each time that a
    kind has been used up. Item i depends on the seed and i alone, so a resumed run meets the same examples."""

    def __init__(
        self, pools: Mapping[Kind, Sequence[Observed]], settings: Settings, *, num_processes: int = 1
    ) -> None:
        """`num_processes` take turns at the batches; a step is as many more of them."""
        shares = {
            Kind.FORGET: settings.forget_batch,
            Kind.DETOUR: settings.detour_batch,
            Kind.RETAIN: settings.retain_batch,
        }
        shares = {kind: share for kind, share in shares.items() if pools.get(kind)}
        self._slots = [(kind, rank) for kind, share in shares.items() for rank in range(share)]
        self._shares, self._pools, self._seed = shares, pools, settings.seed
        self._num_batches = settings.steps * settings.grad_accum * num_processes
        self._orders: dict[tuple[Kind, int], list[int]] = {}

    @property
    def batch_size(self) -> int:
        return len(self._slots)

    def __len__(self) -> int:
        return self._num_batches * self.batch_size

    def __getitem__(self, index: int) -> Observed:
        batch, slot = divmod(index, self.batch_size)
        kind, rank = self._slots[slot]
        pool = self._pools[kind]
        epoch, place = divmod(batch * self._shares[kind] + rank, len(pool))
        return pool[self._order(kind, epoch)[place]]

    def _order(self, kind: Kind, epoch: int) -> list[int]:
        if (kind, epoch) not in self._orders:
            order = list(range(len(self._pools[kind])))
            random.Random(f"{self._seed}:{kind}:{epoch}").shuffle(order)
            self._orders[kind, epoch] = order
        return self._orders[kind, epoch]
