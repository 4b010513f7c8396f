"""Where an adapter sits in the base, and on which of its modules. Named by a method's lessons; read by whoever runs or
writes the adapter. Knows no tensor and no objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KeysValues = Literal["borrowed", "own"]
Modules = Literal["all", "qv"]

BORROWING = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""No k_proj and v_proj: an assistant that borrows attends over the target's keys and values."""

OWN = ("q_proj", "k_proj", "v_proj", *BORROWING[1:])
QUERY_VALUE = ("q_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class Place:
    """Layers fork..exit-1. kv "own" computes its own keys and values at every position, from the target's rows at
    `fork`; with all layers that is the target itself with an adapter."""

    fork: int
    exit: int
    kv: KeysValues = "borrowed"
    modules: Modules = "all"

    @property
    def borrows(self) -> bool:
        return self.kv == "borrowed"

    @property
    def layers(self) -> range:
        return range(self.fork, self.exit)

    @property
    def target_modules(self) -> tuple[str, ...]:
        if self.modules == "qv":
            return ("q_proj",) if self.borrows else QUERY_VALUE
        return BORROWING if self.borrows else OWN
