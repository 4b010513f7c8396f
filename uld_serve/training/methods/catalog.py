"""All methods and presets by name. Read by command and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from uld_serve.training.methods.ascent import GA, NPO
from uld_serve.training.methods.divergence import DIVERGENCE
from uld_serve.training.methods.margin import MARGIN
from uld_serve.training.methods.method import Method
from uld_serve.training.methods.offset import OFFSET
from uld_serve.training.methods.rkld import RKLD
from uld_serve.training.methods.rkld_distill import RKLD_DISTILL
from uld_serve.training.methods.uld import ULD
from uld_serve.training.methods.undial import UNDIAL

METHODS: Mapping[str, Method] = {
    one.name: one for one in (MARGIN, ULD, RKLD, RKLD_DISTILL, UNDIAL, DIVERGENCE, OFFSET, GA, NPO)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Published numbers: a value and where it stands, by setting."""

    method: str
    values: Mapping[str, tuple[object, str]]


_ULD = "arXiv 2406.08607"
_ULD_CODE = "the code published with arXiv 2406.08607, defaults"
_RKLD = "arXiv 2406.01983"
_UNDIAL = "the code published with arXiv 2402.10052"
_OPEN = "open-unlearning's UNDIAL"

PRESETS: Mapping[str, Preset] = {
    "uld-paper": Preset(
        method="uld",
        values={
            "exit": (8, _ULD),
            "rank": (32, _ULD),
            "alpha": (32, _ULD),
            "retain_weight": (6.5, _ULD),
            "strength": (0.75, f"{_ULD}, TOFU; 0.5 on Harry Potter"),
            "tau": (0.01, _ULD),
            "lr": (1e-3, _ULD),
            "epochs": (10.0, _ULD),
            "forget_batch": (16, f"half of the batch of 32 of {_ULD}"),
            "retain_batch": (16, f"half of the batch of 32 of {_ULD}"),
        },
    ),
    "uld-official": Preset(
        method="uld",
        values={
            "exit": (8, _ULD_CODE),
            "rank": (16, _ULD_CODE),
            "alpha": (32, _ULD_CODE),
            "dropout": (0.05, _ULD_CODE),
            "retain_weight": (5.0, _ULD_CODE),
            "strength": (0.8, f"{_ULD_CODE}, TOFU; 0.7 and 0.5 on Harry Potter"),
            "filter": ("official", _ULD_CODE),
            "tau": (0.1, _ULD_CODE),
            "lr": (1e-3, _ULD_CODE),
            "epochs": (10.0, _ULD_CODE),
            "forget_batch": (16, f"half of the batch of 32 of {_ULD_CODE}"),
            "retain_batch": (16, f"half of the batch of 32 of {_ULD_CODE}"),
        },
    ),
    "rkld-paper": Preset(
        method="rkld-distill",
        values={
            "teacher_strength": (8.0, f"{_RKLD}, TOFU; 4 on Harry Potter"),
            "lr": (1e-5, _RKLD),
            "epochs": (10.0, f"{_RKLD}, of strengthening; the student as many"),
            "direction": ("reverse", _RKLD),
            "retain_weight": (1.0, f"{_RKLD}: 0 or 1"),
            "retain_term": ("nll", _RKLD),
        },
    ),
    "undial-official": Preset(
        method="undial",
        values={
            "adjust": (3.0, _UNDIAL),
            "rank": (8, _UNDIAL),
            "modules": ("qv", _UNDIAL),
            "retain_term": ("none", _UNDIAL),
        },
    ),
    "undial-open-unlearning": Preset(
        method="undial", values={"adjust": (10.0, _OPEN), "lr": (1e-4, _OPEN), "retain_term": ("nll", _OPEN)}
    ),
}
