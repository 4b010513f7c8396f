"""Freed memory goes back to the system, also from between blocks that stay."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from uld_serve.model import heap

PAGE_BYTES = 4096
NUM_BLOCKS, BLOCK_BYTES = 1500, 100_000  # below 128 KiB, from where glibc may map blocks of their own
HAS_TRIM = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@pytest.mark.skipif(not HAS_TRIM, reason="the C library has no malloc_trim")
def test_holes_between_blocks_that_stay_are_given_back() -> None:
    # The system may take pages away or another thread fill them meanwhile: once in three times is enough.
    assert max(_given_back_bytes() for _ in range(3)) > NUM_BLOCKS * BLOCK_BYTES / 2


def _given_back_bytes() -> int:
    large, small = [], []
    for _ in range(NUM_BLOCKS):
        large.append(bytearray(BLOCK_BYTES))
        small.append(bytearray(1000))
    before = _resident_bytes()
    large.clear()  # gives back by itself where the small ones have found room elsewhere
    heap.give_back()
    assert len(small) == NUM_BLOCKS
    return before - _resident_bytes()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    heap.give_back()
