"""How large the runs of the reliability table are: `ULD_TEST_SCALE=fast` (what each commit runs), `gate` (what must
have passed before a release; `make test-full`) or `aim` (`make soak`). Read once, where tests are collected."""

from __future__ import annotations

import os

SCALES = ("fast", "gate", "aim")
SCALE = os.environ.get("ULD_TEST_SCALE", "fast")
if SCALE not in SCALES:
    raise ValueError(f"ULD_TEST_SCALE is {SCALE!r}; it is one of {', '.join(SCALES)}")


def scaled(*, fast: int, gate: int, aim: int) -> int:
    return {"fast": fast, "gate": gate, "aim": aim}[SCALE]
