"""Runs tests/ops/device in the Triton interpreter, in a process of its own: the interpreter is chosen on import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


SECONDS = {"not slow": 240, "slow": 3000}


@pytest.mark.parametrize(
    "selection",
    [
        pytest.param("not slow", marks=pytest.mark.timeout(SECONDS["not slow"] + 40)),
        pytest.param("slow", marks=[pytest.mark.slow, pytest.mark.timeout(2 * SECONDS["slow"])]),
    ],
)
def test_kernels_in_the_interpreter_equal_the_torch_sampler(selection: str) -> None:
    tests = Path(__file__).parent / "device"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(tests),
            "-m",
            selection,
            "-p",
            "no:cacheprovider",
            "--timeout",
            str(SECONDS[selection]),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
