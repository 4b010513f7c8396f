"""Integer codes of rules, filters, compositions and row statuses, as tensors carry them. Imports nothing.

Used by reference, the kernels and whoever packs rows for them; the names are those of profile.json."""

from __future__ import annotations

from typing import Final

# Combine rules. A row without a term is `identity`; a term always has one of the other four.
IDENTITY: Final = 0
SUBTRACT: Final = 1
RELU_DIFFERENCE: Final = 2
PAIR_LINEAR: Final = 3
PAIR_RANK: Final = 4

# Filters. PLAUSIBILITY and OFFICIAL look at the target before combining, FUSED at the scores after it.
NO_FILTER: Final = 0
PLAUSIBILITY: Final = 1
OFFICIAL: Final = 2
FUSED: Final = 3

# How the penalties of several terms become one.
COMPOSE_MAX: Final = 0
COMPOSE_SUM: Final = 1

# What became of a row.
OK: Final = 0
NUMERICAL: Final = 1
NOTHING_KEPT: Final = 2

RULE_CODES: Final = {
    "identity": IDENTITY,
    "subtract": SUBTRACT,
    "relu_difference": RELU_DIFFERENCE,
    "pair_linear": PAIR_LINEAR,
    "pair_rank": PAIR_RANK,
}
FILTER_CODES: Final = {
    "none": NO_FILTER,
    "plausibility": PLAUSIBILITY,
    "official": OFFICIAL,
    "fused": FUSED,
}
COMPOSE_CODES: Final = {"max": COMPOSE_MAX, "sum": COMPOSE_SUM}
