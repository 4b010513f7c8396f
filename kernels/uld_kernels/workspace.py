"""Device memory that the sampler's kernels hand to each other within one run: how much a shape needs, and a Workspace
that several shapes share. Used by sampler_triton; sized by engines. Knows no launch.

Nothing in it outlives a run: every word is written before it is read, by the same run. So samplers whose runs follow
each other on one stream may lie in one workspace, also where the host launches a run while the one before it is in
flight: the stream begins no kernel of the later run before the earlier one's last has ended. What the host reads
(SampleOutput) and what it writes (records, grammar masks) is each sampler's own.

Legend: B rows to draw, V real vocabulary, M terms of a row at most."""

from __future__ import annotations

from math import prod
from typing import Final

import torch

from uld_kernels.sample_shape import SampleShape

# Tokens of a program of the scan, of a group that one maximum stands for, and of a group of noise. The same for any
# batch, so that a row has the same bits in any.
SCAN_BLOCK: Final = 1024
GROUP_SIZE: Final = 16
NOISE_GROUP_SIZE: Final = 256
# Partial results of one tile: best keys, floats, ints.
NUM_BESTS: Final = 2
NUM_PARTIALS: Final = 8
NUM_INT_PARTIALS: Final = 2

# As far apart as an allocator would place them: kernels are compiled for addresses at multiples of 16.
_ALIGNMENT: Final = 512

_Buffers = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class WorkspaceTooSmall(RuntimeError):
    """A shape needs more than the workspace that was allocated holds. It never grows: recorded graphs hold its
    addresses."""


class Workspace:
    """One block of a device's memory for the samplers of many shapes, of which one runs at a time, on one stream."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    @classmethod
    def of(cls, shape: SampleShape, *, vocab_size: int, device: torch.device) -> Workspace:
        """Just large enough for one shape."""
        return cls(cls.bytes_for(shape, vocab_size), device)

    @staticmethod
    def bytes_for(shape: SampleShape, vocab_size: int) -> int:
        """What a sampler of this shape needs."""
        buffers = _buffers(shape, vocab_size).values()
        return sum(_aligned(prod(sizes) * dtype.itemsize) for dtype, sizes in buffers)

    @property
    def num_bytes(self) -> int:
        return self._bytes.shape[0]

    def lend(self, shape: SampleShape, vocab_size: int) -> dict[str, torch.Tensor]:
        """The buffers of one shape, by name; they lie over those of every other. Raises WorkspaceTooSmall."""
        needed = self.bytes_for(shape, vocab_size)
        if needed > self.num_bytes:
            raise WorkspaceTooSmall(
                f"a sampler of {shape} needs {needed} bytes of workspace, and {self.num_bytes} were set aside"
            )
        found, start = {}, 0
        for name, (dtype, sizes) in _buffers(shape, vocab_size).items():
            size = prod(sizes) * dtype.itemsize
            found[name] = self._bytes[start : start + size].view(dtype).view(sizes)
            start += _aligned(size)
        return found


def num_tiles(vocab_size: int) -> int:
    return -(-vocab_size // SCAN_BLOCK)


def num_groups(vocab_size: int) -> int:
    return -(-vocab_size // GROUP_SIZE)


def _buffers(shape: SampleShape, vocab_size: int) -> _Buffers:
    """What the kernels hand to each other: types and sizes by name."""
    rows, num_terms = shape.num_rows, shape.num_rows * max(1, shape.max_terms)
    tiles, groups = num_tiles(vocab_size), num_groups(vocab_size)
    special = max(1, shape.num_special), vocab_size if shape.num_special else 1
    found: _Buffers = {
        "touched": (torch.int32, special),
        "biases": (torch.float32, special),
        "bests": (torch.int64, (rows, tiles, NUM_BESTS)),
        "partials": (torch.float32, (rows, tiles, NUM_PARTIALS)),
        "int_partials": (torch.int32, (rows, tiles, NUM_INT_PARTIALS)),
        "group_max": (torch.float32, (rows, groups)),
        "group_list": (torch.int32, (rows, groups)),
        "lucky": (torch.float32, (rows, -(-vocab_size // NOISE_GROUP_SIZE))),
        # Room for the whole vocabulary: a list can overflow nothing. Rows touch only what they list.
        "listed_ids": (torch.int32, (rows, vocab_size)),
        "listed_s": (torch.float32, (rows, vocab_size)),
        "listed_b": (torch.float32, (rows, vocab_size)),
    }
    if shape.needs_normalizers:
        found["stream_partials"] = torch.float32, (2, num_terms * 2, tiles)
    if shape.needs_ranks:
        found["rank_groups"] = torch.float32, (num_terms, groups)
        found["rank_list"] = torch.int32, (num_terms, groups)
        found["rank_bad"] = torch.int32, (num_terms, tiles)
        found["rank_listed"] = torch.float32, (num_terms, vocab_size)
    if shape.first_late is not None:
        # Scores of late assistants: of listed tokens, in the order of the list.
        found["late_scores"] = torch.float32, (rows, max(1, shape.max_terms), vocab_size)
        found["starts"] = torch.int32, (rows,)
        found["counts"] = torch.int32, (rows,)
        found["limits"] = torch.float32, (rows,)
    return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
