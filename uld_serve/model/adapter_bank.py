"""Adapters resident on the device under a byte budget, by key; paged in when a request needs them and out, least
recently used first, when room is needed. Called by the engine's planner; its rows are set by the decoder.

Knows no profile, request or file: an adapter is what `load` gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from uld_serve.errors import Overloaded, ProfileMismatch
from uld_serve.model.fused_layer import FusedLayer
from uld_serve.model.lora import LoraDelta, LoraLinear, Pair
from uld_serve.model.lora_rows import LoraRows
from uld_serve.model.packed_linear import PackedLinear
from uld_serve.model.shards import SummedLinear

Pairs = dict[LoraDelta, dict[int, Pair]]
"""By product and part."""


class Adapter(Protocol):
    """`tensors` maps "layers.{i}.{module}.lora_A" (r, I) and "….lora_B" (O, r)."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def scaling(self) -> float: ...


@dataclass(slots=True)
class AdapterBank:
    """Each adapter holds a slot while anybody uses it. Memory grows only for layers that some adapter touches.

    `acquire` and `release` must pair up.
    """

    layers: nn.ModuleList
    device: torch.device
    budget_bytes: int | None = None
    rows: LoraRows = field(default_factory=LoraRows)
    num_loads: int = 0
    num_evictions: int = 0
    _deltas: set[LoraDelta] = field(default_factory=set)
    _slots: dict[str, int] = field(default_factory=dict)  # least recently used first
    _users: dict[str, int] = field(default_factory=dict)

    def acquire(self, key: str, load: Callable[[], Adapter]) -> int:
        """Slot of the adapter `key`, which is loaded first if it is not resident.

        Raises ProfileMismatch when a module does not exist in the base or a shape differs, Overloaded when every
        resident adapter is in use and no room is left for this one, and what `load` raises.
        """
        if key not in self._slots:
            self._load(key, load())
        self._slots[key] = self._slots.pop(key)
        self._users[key] = self._users.get(key, 0) + 1
        return self._slots[key]

    def release(self, key: str) -> None:
        self._users[key] -= 1

    def evict(self, key: str) -> None:
        """Drop an adapter that nobody uses, so that its slot can be taken again."""
        if self._users.get(key, 0):
            raise ProfileMismatch(f"adapter {key} is in use by {self._users[key]} requests")
        self.num_evictions += 1
        slot = self._slots.pop(key)
        self._users.pop(key, None)
        self._drop(slot)

    def evict_all(self, prefix: str) -> int:
        """The same for every adapter whose key begins so, but for those in use; how many."""
        unused = [key for key in self._slots if key.startswith(prefix) and not self._users.get(key, 0)]
        for key in unused:
            self.evict(key)
        return len(unused)

    def holds(self, key: str) -> bool:
        return key in self._slots

    def check(self, key: str, slot: int) -> None:
        """Raise if this is not the adapter in that slot: its rows would otherwise run as the base's."""
        if self._slots.get(key) != slot:
            raise RuntimeError(f"adapter {key} is not in slot {slot}")

    def num_users(self, key: str) -> int:
        return self._users.get(key, 0)

    @property
    def num_resident(self) -> int:
        return len(self._slots)

    @property
    def total_users(self) -> int:
        return sum(self._users.values())

    @property
    def resident_bytes(self) -> int:
        """Of every adapter's tensors as kept here, places left by evicted ones included."""
        return sum(delta.resident_bytes for delta in self._deltas)

    def _load(self, key: str, adapter: Adapter) -> None:
        pairs = self._checked(key, adapter)
        self._make_room(key, pairs)
        taken = set(self._slots.values())
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        try:
            for delta, own in pairs.items():
                delta.put(slot, own)
        except BaseException:
            self._drop(slot)
            raise
        self._slots[key] = slot
        self.num_loads += 1

    def _checked(self, key: str, adapter: Adapter) -> Pairs:
        """A and B by product and part; all are looked at before anything is written."""
        pairs: Pairs = {}
        for name in sorted({name.rsplit(".", 1)[0] for name in adapter.tensors}):
            A_rI, B_Or = adapter.tensors[f"{name}.lora_A"], adapter.tensors[f"{name}.lora_B"]
            delta, part = self._site(name)
            expected = (delta.in_features, delta.sizes[part])
            if (A_rI.shape[1], B_Or.shape[0]) != expected:
                raise ProfileMismatch(
                    f"adapter {key}: {name} maps {A_rI.shape[1]} to {B_Or.shape[0]}, the base's maps {expected}"
                )
            pairs.setdefault(delta, {})[part] = (A_rI, B_Or.float() * adapter.scaling)
        return pairs

    def _drop(self, slot: int) -> None:
        for delta in self._deltas:
            delta.drop(slot)

    def _make_room(self, key: str, pairs: Pairs) -> None:
        """Evict until one more adapter, of these pairs, fits the budget."""
        if self.budget_bytes is None:
            return
        ranks = {delta: max(A_rI.shape[0] for A_rI, _ in own.values()) for delta, own in pairs.items()}
        alone = sum(delta.bytes_of(1, ranks[delta], list(own)) for delta, own in pairs.items())
        if alone > self.budget_bytes:
            raise ProfileMismatch(
                f"adapter {key} takes {alone:,} bytes; all adapters together may have {self.budget_bytes:,}"
            )
        while (
            sum(delta.bytes_with(ranks.get(delta, 0), list(pairs.get(delta, ()))) for delta in self._deltas)
            > self.budget_bytes
        ):
            unused = next((k for k in self._slots if not self._users.get(k, 0)), None)
            if unused is None:
                raise Overloaded(
                    "the adapters in use leave no room for this request's profile; try again later"
                )
            self.evict(unused)
            for delta in self._deltas:
                delta.compact()

    def _site(self, name: str) -> tuple[LoraDelta, int]:
        """Where the deltas of the layer named "layers.{i}.{module}" belong: a product, and which part of it."""
        _, index, path = name.split(".", 2)
        layer = self.layers[int(index)] if int(index) < len(self.layers) else None
        if isinstance(layer, FusedLayer) and path in layer.sites:
            delta, part = layer.sites[path]
        else:
            delta, part = self._wrapped(name, layer, path).delta, 0
        self._deltas.add(delta)
        return delta, part

    def _wrapped(self, name: str, layer: nn.Module | None, path: str) -> LoraLinear:
        """A linear layer of a Hugging Face layer, wrapped on first use."""
        parent_path, _, leaf = path.rpartition(".")
        try:
            parent = nn.Module() if layer is None else layer.get_submodule(parent_path)
            base = getattr(parent, leaf)
        except AttributeError as error:
            raise ProfileMismatch(f"the adapter changes {name}, which this base does not have") from error
        if isinstance(base, SummedLinear):  # the delta's part is summed with the base's
            parent, leaf, base = base, "linear", base.linear
        if isinstance(base, LoraLinear):
            return base
        if not isinstance(base, nn.Linear | PackedLinear):
            raise ProfileMismatch(f"the adapter changes {name}, which is no linear layer in this base")
        wrapped = LoraLinear(base, self.rows, self.device)
        setattr(parent, leaf, wrapped)
        return wrapped
