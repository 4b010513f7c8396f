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
from uld_serve.model.lora import LoraLinear, LoraRows
from uld_serve.model.packed_linear import PackedLinear

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


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
    _linears: dict[str, LoraLinear] = field(default_factory=dict)
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
        slot = self._slots.pop(key)
        self._users.pop(key, None)
        self._drop(slot)

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
        return sum(linear.resident_bytes for linear in self._linears.values())

    def _load(self, key: str, adapter: Adapter) -> None:
        pairs = self._checked(key, adapter.tensors)
        self._make_room(key, {name: A_rI.shape[0] for name, (A_rI, _) in pairs.items()})
        taken = set(self._slots.values())
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        try:
            for name, (A_rI, B_Or) in pairs.items():
                self._linears[name].put(slot, A_rI, B_Or.float() * adapter.scaling)
        except BaseException:
            self._drop(slot)
            raise
        self._slots[key] = slot
        self.num_loads += 1

    def _checked(self, key: str, tensors: Mapping[str, torch.Tensor]) -> Pairs:
        """A and B by module; all are looked at before anything is written."""
        modules = sorted({name.rsplit(".", 1)[0] for name in tensors})
        pairs = {name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in modules}
        for name, (A_rI, B_Or) in pairs.items():
            base = self._linear(name).base
            expected = (base.in_features, base.out_features)
            if (A_rI.shape[1], B_Or.shape[0]) != expected:
                raise ProfileMismatch(
                    f"adapter {key}: {name} maps {A_rI.shape[1]} to {B_Or.shape[0]}, the base's maps {expected}"
                )
        return pairs

    def _drop(self, slot: int) -> None:
        for linear in self._linears.values():
            linear.drop(slot)

    def _make_room(self, key: str, ranks: Mapping[str, int]) -> None:
        """Evict until one more adapter, of these ranks by module, fits the budget."""
        if self.budget_bytes is None:
            return
        alone = sum(self._linears[name].bytes_of(1, rank) for name, rank in ranks.items())
        if alone > self.budget_bytes:
            raise ProfileMismatch(
                f"adapter {key} takes {alone:,} bytes; all adapters together may have {self.budget_bytes:,}"
            )
        while self._bytes_with(ranks) > self.budget_bytes:
            unused = next((k for k in self._slots if not self._users.get(k, 0)), None)
            if unused is None:
                raise Overloaded(
                    "the adapters in use leave no room for this request's profile; try again later"
                )
            self.evict(unused)
            for linear in self._linears.values():
                linear.compact()

    def _bytes_with(self, ranks: Mapping[str, int]) -> int:
        return sum(linear.bytes_with(ranks.get(name, 0)) for name, linear in self._linears.items())

    def _linear(self, name: str) -> LoraLinear:
        """The layer named "layers.{i}.{module}", wrapped on first use."""
        if name in self._linears:
            return self._linears[name]
        _, index, path = name.split(".", 2)
        parent_path, _, leaf = path.rpartition(".")
        try:
            parent = self.layers[int(index)].get_submodule(parent_path)
            base = getattr(parent, leaf)
        except (AttributeError, IndexError) as error:
            raise ProfileMismatch(f"the adapter changes {name}, which this base does not have") from error
        if not isinstance(base, nn.Linear | PackedLinear):
            raise ProfileMismatch(f"the adapter changes {name}, which is no linear layer in this base")
        wrapped = LoraLinear(base, self.rows, self.device)
        setattr(parent, leaf, wrapped)
        self._linears[name] = wrapped
        return wrapped
