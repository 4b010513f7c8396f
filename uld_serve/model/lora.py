"""Adapters on assistant rows: a bank of low-rank deltas and the linear layers that add them.

Called by the decoder (which rows) and the engine's planner (which adapters). Knows no profile and no request:
an adapter is a key and plain tensors. Low-rank adaptation: y = W x + scaling * B (A x), arXiv 2106.09685 Eq. 3.

Shapes: I input width, O output width, r rank (padded to the bank's largest), G adapters (slots), N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from uld_serve.errors import ProfileMismatch
from uld_serve.model.packed_linear import PackedLinear


@dataclass(slots=True)
class LoraRows:
    """Which rows of the layer being run are assistant rows: those from `start` on, with a bank slot each.

    One object is shared by a model's linear layers and set by its decoder before each run of layers,
    because Hugging Face's MLPs hand no keyword arguments down.
    """

    start: int = 0
    slots_N: torch.Tensor | None = None
    only_slot: int | None = None

    def clear(self) -> None:
        self.slots_N = None


class LoraLinear(nn.Module):
    """A linear layer of the base with room for every adapter's delta on it."""

    def __init__(self, base: nn.Linear | PackedLinear, rows: LoraRows, device: torch.device) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        dtype = base.weight.dtype
        self.A_GrI = torch.zeros(0, 0, base.in_features, dtype=dtype, device=device)
        self.B_GOr = torch.zeros(0, base.out_features, 0, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        rows = self.rows
        if rows.slots_N is None or self.A_GrI.shape[0] == 0:
            return y
        x_NI, y_NO = x[0, rows.start :], y[0, rows.start :]
        if rows.only_slot is not None:
            low_Nr = x_NI @ self.A_GrI[rows.only_slot].T
            y_NO.addmm_(low_Nr, self.B_GOr[rows.only_slot].T)
        else:
            low_N1r = x_NI[:, None] @ self.A_GrI[rows.slots_N].transpose(1, 2)
            y_NO += (low_N1r @ self.B_GOr[rows.slots_N].transpose(1, 2))[:, 0]
        return y

    def grow(self, num_slots: int, rank: int) -> None:
        """Make room for `num_slots` adapters of up to `rank`; what is stored stays."""
        if self.A_GrI.shape[0] >= num_slots and self.A_GrI.shape[1] >= rank:
            return
        num_slots, rank = max(num_slots, self.A_GrI.shape[0]), max(rank, self.A_GrI.shape[1])
        A, B = self.A_GrI, self.B_GOr
        self.A_GrI = A.new_zeros(num_slots, rank, A.shape[2])
        self.B_GOr = B.new_zeros(num_slots, B.shape[1], rank)
        self.A_GrI[: A.shape[0], : A.shape[1]] = A
        self.B_GOr[: B.shape[0], :, : B.shape[2]] = B

    def put(self, slot: int, A_rI: torch.Tensor, B_Or: torch.Tensor) -> None:
        rank = A_rI.shape[0]
        self.clear(slot)
        self.A_GrI[slot, :rank] = A_rI
        self.B_GOr[slot, :, :rank] = B_Or

    def clear(self, slot: int) -> None:
        if slot < self.A_GrI.shape[0]:
            self.A_GrI[slot] = 0
            self.B_GOr[slot] = 0


@dataclass(slots=True)
class AdapterBank:
    """Adapters resident on the device, by key; each holds a slot while anybody uses it.

    Memory grows only for layers that some adapter touches. `acquire` and `release` must pair up.
    """

    layers: nn.ModuleList
    device: torch.device
    rows: LoraRows = field(default_factory=LoraRows)
    _linears: dict[str, LoraLinear] = field(default_factory=dict)
    _slots: dict[str, int] = field(default_factory=dict)
    _users: dict[str, int] = field(default_factory=dict)

    def acquire(self, key: str, tensors: Mapping[str, torch.Tensor], *, scaling: float) -> int:
        """Slot of the adapter `key`, loading its tensors first if it is not resident.

        `tensors` maps "layers.{i}.{module}.lora_A" (r, I) and "….lora_B" (O, r). Raises ProfileMismatch
        when a module does not exist in the base or a shape differs.
        """
        if key not in self._slots:
            self._load(key, tensors, scaling)
        self._users[key] = self._users.get(key, 0) + 1
        return self._slots[key]

    def release(self, key: str) -> None:
        self._users[key] -= 1

    def evict(self, key: str) -> None:
        """Forget an adapter that nobody uses, so that its slot can be taken again."""
        if self._users.get(key, 0):
            raise ProfileMismatch(f"adapter {key} is in use by {self._users[key]} requests")
        slot = self._slots.pop(key)
        self._users.pop(key, None)
        for linear in self._linears.values():
            linear.clear(slot)

    def num_users(self, key: str) -> int:
        return self._users.get(key, 0)

    @property
    def total_users(self) -> int:
        return sum(self._users.values())

    @property
    def resident_bytes(self) -> int:
        return sum(t.nbytes for linear in self._linears.values() for t in (linear.A_GrI, linear.B_GOr))

    def _load(self, key: str, tensors: Mapping[str, torch.Tensor], scaling: float) -> None:
        modules = sorted({name.rsplit(".", 1)[0] for name in tensors})
        pairs = {name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in modules}
        for name, (A_rI, B_Or) in pairs.items():  # all checked before anything is written
            linear = self._linear(name)
            expected = (linear.base.in_features, linear.base.out_features)
            if (A_rI.shape[1], B_Or.shape[0]) != expected:
                raise ProfileMismatch(
                    f"adapter {key}: {name} maps {A_rI.shape[1]} to {B_Or.shape[0]}, the base's maps {expected}"
                )
        slot = self._free_slot()
        for name, (A_rI, B_Or) in pairs.items():
            linear = self._linear(name)
            linear.grow(slot + 1, A_rI.shape[0])
            linear.put(slot, A_rI, B_Or * scaling)
        for linear in self._linears.values():  # rows of this slot read zeros where the adapter has no delta
            linear.grow(slot + 1, 0)
        self._slots[key] = slot

    def _free_slot(self) -> int:
        taken = set(self._slots.values())
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

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
        wrapped.grow(max(self._slots.values(), default=-1) + 1, 0)
        setattr(parent, leaf, wrapped)
        self._linears[name] = wrapped
        return wrapped
